"""One local Ray for the whole session, set up as the jobs do; quiet, and on its own even beside a cluster.

With `-n 2`, one process runs all tests with Ray, which wait for other processes most of the time, and one the others.
"""

import os
import signal

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import ray
import torch

from tests.helpers.processes import free_port
from tests.helpers.s3_server import S3Server

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a script ignores for what it starts with &
S3 = S3Server(free_port())
os.environ |= S3.environment  # before Ray starts, whose workers inherit it; the server starts when a test asks for it

torch.set_num_threads(1)  # the tensors are tiny


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Let one process have all tests with Ray, and keep each other file together."""
    for item in items:
        with_ray = {"integration", "cluster"} & set(item.path.parts)
        item.add_marker(pytest.mark.xdist_group("ray" if with_ray else item.path.name))


def pytest_make_parametrize_id(val, argname):
    """Name no test by bytes: those of an archive hold the time, and all processes must name a test alike."""
    return f"{argname} of {len(val)} bytes" if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def ray_session():
    """A Ray on two cores; the variables with which jobs in processes of their own join it."""
    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield {"RAY_ADDRESS": context.address_info["address"], "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "")}
    ray.shutdown()


@pytest.fixture(scope="session")
def s3():
    """An S3 server, which `s3://bucket/...` leads to in this process, in Ray's workers and in jobs."""
    pytest.importorskip("moto")
    with S3:
        yield S3


@pytest.fixture
def local_training(monkeypatch):
    """Training in this process, without Ray Train's: what only Ray Train can promise is tested without this."""
    from tests.helpers.trainer import LocalTrainer

    monkeypatch.setattr("bert4rec.training.train._trainer", LocalTrainer)


@pytest.fixture
def local_parts(monkeypatch):
    """Users scored and evaluated in this process, part by part, without Ray Data's actors."""

    def map_parts(parts, worker, arguments, num_workers, use_gpu):
        made = worker(*arguments)
        return (made(part) for part in parts)

    for module in ("evaluation.evaluate", "inference.recommend", "inference.fit_blend"):
        monkeypatch.setattr(f"bert4rec.{module}.map_parts", map_parts)


@pytest.fixture
def local_ray_data(monkeypatch):
    """`prepare` in this process, without Ray Data: its blocks are in a list."""
    from tests.helpers.in_process import LocalRayData

    monkeypatch.setattr("bert4rec.data.prepare._ray_data", LocalRayData)
