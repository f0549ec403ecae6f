"""Clusters of several nodes: one is lost, they share no disk, the cluster grows and shrinks by itself.

BERT4REC_REPEATS sets how often the random ones are repeated (docs/reliability.md).
"""

import json
import os
import random
import re
import shutil
import subprocess
import time

import pyarrow.parquet as pq
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from bert4rec.config import load_config
from tests.cluster.nodes import ROOT, Nodes
from tests.helpers.datasets import random_histories, write_dataset
from tests.helpers.processes import REPEATS, named, random_delay, wait_for
from tests.integration.training.test_train import SMALL, without_times
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def nodes():
    with Nodes(head_cpus=0) as cluster:
        yield cluster


def settings_for(root, *overrides):
    """Settings of a job on a dataset in `root`, which is put where the job looks for it."""
    settings = [f"run.storage_path={root}", f"data.data_dir={root}/data", *overrides]
    path = load_config(None, settings).prepared_path
    if not os.path.exists(path):
        shutil.copytree(root / "dataset", path)
    return settings


def training(root, *overrides):
    if not (root / "dataset").exists():
        write_dataset(root / "dataset", random_histories(75, 20), 20)
    common = ["training.num_epochs=30", "training.early_stopping=false", "training.num_workers=2"]
    return settings_for(root, *SMALL, *common, *overrides)


def history_of(root, name):
    return json.loads((root / name / "run.json").read_text())["history"]


def lose_the_node_of_a_worker(nodes, workers, condition):
    """Kill one of the nodes on which a training worker runs."""
    wait_for(condition)
    time.sleep(random_delay())
    lost = next(node for node in workers if named("RayTrainWorker", node.pid))
    nodes.kill(lost)


def output_of(nodes, name):
    return (nodes.directory / f"{name}.log").read_text()


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_a_lost_node_of_training_changes_nothing(nodes, tmp_path, repeat):
    """A new one takes its place; the history is that of an undisturbed run on the same nodes."""
    workers = [nodes.add(), nodes.add()]
    whole = nodes.job("train", *training(tmp_path, "run.name=whole"))
    assert whole.wait() == 0, output_of(nodes, "train")
    disturbed = nodes.job("train", *training(tmp_path, "run.name=disturbed"))
    lose_the_node_of_a_worker(nodes, workers, lambda: list((tmp_path / "disturbed").glob("bert4rec-02-*")))
    assert not (tmp_path / "disturbed" / "run.json").exists()
    nodes.add()
    assert disturbed.wait() == 0, output_of(nodes, "train")
    assert without_times(history_of(tmp_path, "disturbed")) == without_times(history_of(tmp_path, "whole"))


def test_training_saves_before_a_node_goes_that_tells_so(nodes, tmp_path):
    """SIGTERM to `ray start`, as Kubernetes ends a pod; the epochs have 125 steps, and only the last is validated."""
    write_dataset(tmp_path / "dataset", random_histories(2000, 20), 20)
    several = ["training.num_epochs=30", "training.val_check_interval=30"]
    workers = [nodes.add(), nodes.add()]
    whole = nodes.job("train", *training(tmp_path, *several, "run.name=whole"))
    assert whole.wait() == 0, output_of(nodes, "train")
    disturbed = nodes.job("train", *training(tmp_path, *several, "run.name=disturbed", "training.max_failures=0"))
    wait_for(lambda: re.search(r"training: \d+%", output_of(nodes, "train")))
    workers[0].terminate()
    wait_for(lambda: list((tmp_path / "disturbed").glob("unfinished-*")))
    nodes.add()
    assert disturbed.wait() == 0, output_of(nodes, "train")
    assert without_times(history_of(tmp_path, "disturbed")) == without_times(history_of(tmp_path, "whole"))
    assert not list((tmp_path / "disturbed").glob("unfinished-*"))


def test_with_min_workers_the_remaining_node_goes_on_alone(nodes, tmp_path):
    """Without dropout another number of workers changes only the order of additions."""
    workers = [nodes.add(), nodes.add()]
    settings = ["model.dropout_rate=0", "training.min_workers=1"]
    whole = nodes.job("train", *training(tmp_path, "run.name=whole", *settings))
    assert whole.wait() == 0, output_of(nodes, "train")
    disturbed = nodes.job("train", *training(tmp_path, "run.name=disturbed", *settings))
    lose_the_node_of_a_worker(nodes, workers, lambda: list((tmp_path / "disturbed").glob("bert4rec-02-*")))
    assert disturbed.wait() == 0, output_of(nodes, "train")
    for one, two in zip(history_of(tmp_path, "disturbed"), history_of(tmp_path, "whole"), strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-3)
        assert one["val_mrr"] == pytest.approx(two["val_mrr"], abs=3e-2)


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_a_lost_node_of_scoring_costs_no_user(nodes, tmp_path, repeat):
    write_dataset(tmp_path / "dataset", random_histories(6000, NUM_ITEMS, longest=20), NUM_ITEMS)
    model = make_model()
    model.catalogue = "test"
    model.save_pretrained(str(tmp_path / "m"))
    settings = settings_for(
        tmp_path, "inference.topk=5", "inference.batch_size=4", f"inference.checkpoint_path={tmp_path}/m"
    )
    workers = [nodes.add(), nodes.add()]
    whole = nodes.job("recommend", *settings, f"inference.output_path={tmp_path}/whole")
    assert whole.wait() == 0, output_of(nodes, "recommend")
    disturbed = nodes.job("recommend", *settings, f"inference.output_path={tmp_path}/out")
    wait_for(lambda: list((tmp_path / "out" / "_unfinished").glob("part-*.json")))
    time.sleep(random_delay())
    nodes.kill(random.choice(workers))
    assert disturbed.poll() is None, "ended before a node could be lost"
    assert disturbed.wait() == 0, output_of(nodes, "recommend")
    for name in ("out", "whole"):
        table = pq.read_table(tmp_path / name / "recommendations.parquet")
        assert sorted(set(table["user"].to_pylist())) == list(range(1, 6001))
    assert table.equals(pq.read_table(tmp_path / "out" / "recommendations.parquet"))
    csv = "recommendations.csv"
    assert (tmp_path / "out" / csv).read_bytes() == (tmp_path / "whole" / csv).read_bytes()


def test_nodes_that_share_no_disk_are_told_before_any_work(nodes, tmp_path):
    """A node that sees an empty folder in the place of the head's."""
    root = tmp_path / "runs"
    root.mkdir()
    apart = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs none {root} && exec "$@"', "sh")
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount in a namespace of his own")
    nodes.add(before=apart)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train_ratings.csv").write_text("user,item\n1,2\n")
    job = nodes.job("prepare", f"run.storage_path={root}", f"data.data_dir={tmp_path}/data")
    assert job.wait() == 2
    log = output_of(nodes, "prepare")
    assert f"error: run.storage_path={root}: node " in log
    assert "does not see what this node has there; set a path on a disk that all nodes share, or s3://" in log
    assert list(root.iterdir()) == []


def reduced(address):
    """cluster.yaml on this machine: Ray's own fake provider, small nodes, a short idle timeout."""
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    sizes = {"head": {"CPU": 0}, "cpu_worker": {"CPU": 1}, "gpu_worker": {"CPU": 1, "GPU": 1}}
    for name, kind in config["available_node_types"].items():
        kind |= {"resources": sizes[name], "node_config": {}, "max_workers": min(kind["max_workers"], 2)}
        kind.pop("docker", None)
    # the fake provider's head is always of this type
    config["head_node_type"] = "ray.head.default"
    config["available_node_types"]["ray.head.default"] = config["available_node_types"].pop("head")
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "disable_node_updaters": True,
        "launch_multiple": True,
        "head_node_id": "f" * 51 + "00000",
    }
    return config | {"provider": provider, "idle_timeout_minutes": 0.1, "docker": {}}


WATCH = """
import json, sys, time, ray
ray.init(log_to_driver=False, logging_level="ERROR")
while True:
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    print(json.dumps([[int(sum(r.get(k, 0) for r in alive)) for k in ("CPU", "GPU")], len(alive)]), flush=True)
    time.sleep(0.5)
"""
A_GPU = """
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
print(ray.get(ray.remote(num_gpus=1)(lambda: ray.get_runtime_context().get_assigned_resources()).remote()))
"""


def test_a_cluster_of_nothing_but_a_head_grows_and_shrinks(tmp_path):
    """Training and scoring bring the nodes they need, which go when idle; what asks for a GPU brings a GPU node."""
    with Nodes(head_cpus=0, dashboard=True, autoscaling=reduced) as nodes:
        watched = nodes.directory / "watched"
        nodes.python(WATCH, watched)

        def seen():
            """([CPUs, GPUs], nodes) of each moment so far."""
            return [json.loads(line) for line in watched.read_text().splitlines()]

        wait_for(seen)
        assert seen() == [[[0, 0], 1]] * len(seen())
        settings = training(tmp_path, "run.name=run", "training.num_epochs=4", "inference.num_workers=2")
        for job, least in (("train", 3), ("recommend", 2)):  # scoring begins on one node and may end before a second
            before = len(seen())
            done = nodes.cli("submit", "--working-dir", ".", "--", "python", "-m", f"jobs.{job}", *settings)
            assert done.returncode == 0, done.stdout
            assert max(moment[1] for moment in seen()[before:]) >= least, "a head, and nodes of one core"
            wait_for(lambda: seen()[-1] == [[0, 0], 1], why="for the nodes to go")
        assert "waiting for it to grow" in done.stdout or "waiting for the first node" in done.stdout
        assert len(history_of(tmp_path, "run")) == 4
        assert pq.read_table(tmp_path / "run" / "recommendations" / "recommendations.parquet")[
            "user"
        ].unique().to_pylist() == list(range(1, 76))
        nodes.python(A_GPU, nodes.directory / "gpu").wait()
        assert "'GPU': 1.0" in (nodes.directory / "gpu").read_text()
        assert any(moment[0][1] == 1 for moment in seen())
        wait_for(lambda: seen()[-1] == [[0, 0], 1], why="for the node to go")
