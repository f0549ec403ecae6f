"""`prepare` while something goes wrong: its files are those that one process makes, to the last byte."""

import os
import signal
import sys

import numpy as np
import pandas as pd
import pytest

from bert4rec.config import DataConfig
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.prepare import prepare
from tests.cluster.nodes import Nodes
from tests.helpers.in_process import LocalRayData
from tests.helpers.processes import named, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

RANGE_ROWS = 250_000
PREPARE = """
from importlib import import_module
from bert4rec.cluster.resources import begin
from bert4rec.config import load_config

prepare = import_module("bert4rec.data.prepare")  # the package's attribute is the function
prepare.CHUNK_BYTES, prepare.RANGE_ROWS, prepare._SHARD_ROWS = 2_000_000, {range_rows}, 1
config = load_config(None, ["data.data_dir={data}", "run.storage_path={data}"])
begin(config, meanwhile=("ray.data",))
import_module("bert4rec.data.ray_data").PATIENCE_SECONDS = 20.0
prepare.prepare(config.data, "{path}", print)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five million rows: 100 MB, and as many at several places of the shuffle; a node's store has 100 MB."""
    path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    most = {"user": 20_000, "item": 3000, "time": 10**9}
    rows = pd.DataFrame({name: rng.integers(most[name], size=5_000_000) for name in most})
    rows.to_csv(path / "train_ratings.csv", index=False)
    return path


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """What one process makes of them, in one chunk."""
    module = sys.modules[prepare.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ray_data", LocalRayData)
        patch.setattr(module, "CHUNK_BYTES", 10**9)
        patch.setattr(module, "RANGE_ROWS", RANGE_ROWS)
        patch.setattr(module, "_SHARD_ROWS", 1)
        manifest = prepare(DataConfig(data_dir=str(data)), str(tmp_path_factory.mktemp("whole")))
    assert len(manifest.files) == 21
    return manifest


def start(nodes, data, path):
    code = PREPARE.format(range_rows=RANGE_ROWS, data=data, path=path)
    return nodes.python(code, nodes.directory / "prepare.log")


def assert_ends_with(job, nodes, path, whole):
    assert job.wait() == 0, (nodes.directory / "prepare.log").read_text()
    assert PreparedDataset(str(path), verify=True).manifest == whole


def test_a_killed_worker_of_four_changes_nothing(tmp_path, data, whole):
    with Nodes(head_cpus=4) as nodes:
        job = start(nodes, data, tmp_path / "out")
        wait_for(lambda: named("ray::HashShuffleReduce", nodes.head.pid) or job.poll() is not None)
        killed = named("ray::HashShuffleReduce", nodes.head.pid)
        assert killed, (nodes.directory / "prepare.log").read_text()
        os.kill(killed[0], signal.SIGKILL)
        assert_ends_with(job, nodes, tmp_path / "out", whole)


def test_a_store_that_spills_under_one_worker_changes_nothing(tmp_path, data, whole):
    with Nodes(head_cpus=1) as nodes:
        job, spilled = start(nodes, data, tmp_path / "out"), []

        def is_seen():
            spilled.extend(nodes.directory.glob("ray/session_*/ray_spilled_objects*/*"))
            return spilled or job.poll() is not None

        wait_for(is_seen)
        assert spilled, (nodes.directory / "prepare.log").read_text()
        assert_ends_with(job, nodes, tmp_path / "out", whole)


@pytest.mark.parametrize("stage", ["HashShuffleReduce", "MapBatches(total)"])
def test_a_lost_node_changes_nothing(tmp_path, data, whole, stage):
    """It has shards of rows, or sequences, that are made again on the other node."""
    with Nodes(head_cpus=0) as nodes:
        workers = [nodes.add(), nodes.add()]
        job = start(nodes, data, tmp_path / "out")

        working = []

        def is_seen():
            working.extend(node for node in workers if named(f"ray::{stage}", node.pid))
            return working or job.poll() is not None

        wait_for(is_seen)
        assert working, (nodes.directory / "prepare.log").read_text()
        nodes.kill(working[0])
        assert job.poll() is None, "ended before a node could be lost"
        assert_ends_with(job, nodes, tmp_path / "out", whole)
