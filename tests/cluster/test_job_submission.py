"""The jobs as `ray job submit` runs them, on a head with its dashboard: logs, progress, exit codes, stop and resume."""

import re
import shutil
import threading

import numpy as np
import pytest

from tests.cluster.nodes import ROOT, Nodes
from tests.helpers.processes import wait_for
from tests.integration.test_jobs import SMALL
from tests.integration.training.test_train import without_times

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster():
    with Nodes(head_cpus=2, dashboard=True) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A working copy with data, runs and an environment in it, which must stay behind."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("bert4rec", "jobs", "configs", "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "pyproject.toml", "README.md", "cluster.yaml"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("data/ml-100k", "runs/run", ".venv/lib", ".git/objects"):
        (copy / name).mkdir(parents=True)
        (copy / name / "large").write_bytes(np.random.default_rng(0).bytes(3_000_000))
    return copy


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    data = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    rows = [f"{user},{100 + item},{10**9 + n}" for user in range(40) for n, item in enumerate(rng.permutation(20)[:8])]
    (data / "train_ratings.csv").write_text("\n".join(["user,item,time", *rows, ""]))
    (data / "titles.tsv").write_text(
        "item\ttitle\n" + "".join(f"{100 + i}\tFilm {i} {['war', 'love', 'home'][i % 3]}\n" for i in range(20))
    )
    return [*SMALL, f"data.data_dir={data}", "run.name=run", "training.num_epochs=40", "training.early_stopping=false"]


def submit(cluster, project, job, *arguments, options=()):
    return cluster.cli(
        "submit", *options, "--working-dir", ".", "--", "python", "-m", f"jobs.{job}", *arguments, cwd=project
    )


def history_of(root):
    import json

    return without_times(json.loads((root / "run" / "run.json").read_text())["history"])


@pytest.mark.slow
def test_every_job_and_a_stopped_training(cluster, project, settings, tmp_path):
    settings = [*settings, f"run.storage_path={tmp_path}"]
    embedded = submit(cluster, project, "embed", *settings, "embedding.method=tfidf-svd")
    assert embedded.returncode == 0, embedded.stdout
    assert "20 items, width" in embedded.stdout
    (uploaded,) = cluster.directory.glob("ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    names = sorted(path.name for path in uploaded.iterdir() if path.name != "__pycache__")
    assert names == [
        ".gitignore",
        ".rayignore",
        "README.md",
        "bert4rec",
        "cluster.yaml",
        "configs",
        "jobs",
        "pyproject.toml",
    ]
    assert sum(path.stat().st_size for path in uploaded.rglob("*.*") if path.suffix != ".pyc") < 1_000_000

    prepared = submit(cluster, project, "prepare", *settings)
    assert prepared.returncode == 0, prepared.stdout
    assert "prepared 320 interactions of 40 users with 20 items" in prepared.stdout
    shutil.copytree(tmp_path / "prepared", tmp_path / "whole" / "prepared")

    def stop():
        wait_for(lambda: list((tmp_path / "run").glob("bert4rec-03-*")))
        assert cluster.cli("stop", "first").returncode == 0

    stopper = threading.Thread(target=stop)
    stopper.start()
    stopped = submit(cluster, project, "train", *settings, options=("--submission-id", "first"))
    stopper.join()
    assert "Job 'first' was stopped" in stopped.stdout + stopped.stderr
    assert re.search(r"training: .*\n.*SIGTERM: saving a checkpoint", stopped.stdout), stopped.stdout
    assert not (tmp_path / "run" / "run.json").exists()
    again = submit(cluster, project, "train", *settings)
    assert again.returncode == 0, again.stdout
    assert "continuing run" in again.stdout
    assert "trained 40 epochs" in again.stdout

    evaluated = submit(cluster, project, "evaluate", *settings)
    assert re.search(r"ndcg@10 +0\.\d+ +0\.\d+", evaluated.stdout), evaluated.stdout
    recommended = submit(cluster, project, "recommend", *settings)
    assert "400 recommendations for 40 users" in recommended.stdout
    assert (evaluated.returncode, recommended.returncode) == (0, 0)

    undisturbed = cluster.job("train", *settings[:-1], f"run.storage_path={tmp_path / 'whole'}")
    assert undisturbed.wait() == 0
    assert history_of(tmp_path) == history_of(tmp_path / "whole")


def test_what_is_wrong_is_in_the_jobs_log_and_its_exit_code(cluster, project, settings, tmp_path):
    for overrides, message in (
        (["run.storage_path=runs"], "run.storage_path=runs is relative, and the folder of a submitted job is deleted"),
        ([f"run.storage_path={tmp_path}", "model.num_heads=3"], "model.num_heads=3 does not divide"),
    ):
        failed = submit(cluster, project, "train", *settings, *overrides)
        assert failed.returncode == 1
        assert f"error: {message}" in failed.stdout
    assert list(tmp_path.iterdir()) == []
