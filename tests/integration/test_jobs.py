"""The jobs as a user runs them: separate processes, a Ray of their own, exit codes and what is printed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bert4rec import lease
from bert4rec.config import load_config
from jobs.recommend import recommend_users
from tests.helpers.datasets import write_dataset
from tests.helpers.processes import REPEATS, random_delay, wait_for

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SMALL = ["model.hidden_units=8", "model.num_heads=2", "model.max_len=8", "training.num_epochs=2", "data.batch_size=16"]


def without_ray():
    """The environment without the settings of the tests' own Ray."""
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


def run_job(name, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *arguments],
        cwd=ROOT,
        env=without_ray() | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    rows = [(user, 100 + item, 9e8 + n) for user in range(40) for n, item in enumerate(rng.permutation(20)[:8])]
    pd.DataFrame(rows, columns=["user", "item", "time"]).to_csv(path / "train_ratings.csv", index=False)
    titles = "".join(f"{100 + item}\tFilm {item} (1990)\n" for item in range(20))
    (path / "titles.tsv").write_text("item\ttitle\n" + titles)
    (path / "genres.tsv").write_text("item\tgenre\n" + "".join(f"{100 + i}\tG{i % 3}\n" for i in range(20)))
    return path


def test_pipeline_from_ratings_to_titles(data_dir, tmp_path, request):
    arguments = [*SMALL, f"data.data_dir={data_dir}", f"run.storage_path={tmp_path}", "model.use_genre_emb=true"]
    done = run_job("pipeline", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert "prepared 320 interactions of 40 users with 20 items" in done.stdout
    assert any(line.startswith("ndcg@10") and len(line.split()) == 3 for line in lines)
    assert "mean gates: item 0." in done.stdout
    evaluation = json.loads(next(tmp_path.glob("*/evaluation.json")).read_text())
    shown = next(line.split() for line in lines if line.startswith("ndcg@10"))
    assert [f"{evaluation['protocols']['all'][system]['ndcg@10']:.4f}" for system in evaluation["beyond_accuracy"]] == (
        shown[1:]
    )
    assert "400 recommendations for 40 users" in done.stdout
    assert sum(line.startswith("user ") for line in lines) == 5
    assert "    Film " in done.stdout
    csv_path = next(Path(line.removeprefix("csv: ")) for line in lines if line.startswith("csv: "))
    recommended = pd.read_csv(csv_path)
    history = pd.read_csv(data_dir / "train_ratings.csv")
    assert recommended.groupby("user").size().eq(10).all()
    assert recommended.merge(history, on=["user", "item"]).empty

    ray_session = request.getfixturevalue("ray_session")  # started only now: the first job started its own
    again = run_job("pipeline", *arguments, **ray_session)
    assert again.returncode == 0, again.stderr
    assert f"joining Ray at {ray_session['RAY_ADDRESS']}" in again.stdout
    assert "is already trained" in again.stdout
    assert "is up to date" in again.stdout

    more = [*arguments[-3:-1], "inference.topk=3", f"inference.output_path={tmp_path / 'other'}"]
    recommend_users(load_config(None, more))
    first = recommended.groupby("user").head(3).reset_index(drop=True)
    assert pd.read_csv(tmp_path / "other" / "recommendations.csv").equals(first)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(REPEATS))
def test_a_killed_driver_goes_on_with_the_same_command(data_dir, tmp_path, repeat):
    """SIGKILL after the second checkpoint; the rerun ends with the history of an undisturbed run."""
    settings = [*SMALL, f"data.data_dir={data_dir}", "run.name=run", "training.num_epochs=40"]
    settings.append("training.early_stopping=false")

    def history_of(root):
        epochs = json.loads((root / "run" / "run.json").read_text())["history"]
        return [{k: v for k, v in epoch.items() if k not in ("seconds", "tokens_per_second")} for epoch in epochs]

    for root in (tmp_path / "whole", tmp_path / "killed"):
        assert run_job("prepare", *settings, f"run.storage_path={root}").returncode == 0
    assert run_job("train", *settings, f"run.storage_path={tmp_path / 'whole'}").returncode == 0

    command = [sys.executable, "-m", "jobs.train", *settings, f"run.storage_path={tmp_path / 'killed'}"]
    driver = subprocess.Popen(command, cwd=ROOT, env=without_ray(), stdout=subprocess.DEVNULL)
    while not list((tmp_path / "killed" / "run").glob("bert4rec-02-*")):
        assert driver.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    time.sleep(random_delay())
    driver.kill()
    driver.wait()
    assert not (tmp_path / "killed" / "run" / "run.json").exists()
    again = run_job("train", *settings, f"run.storage_path={tmp_path / 'killed'}")
    assert again.returncode == 0, again.stderr
    assert "continuing run" in again.stdout
    assert len(history_of(tmp_path / "whole")) == 40
    assert history_of(tmp_path / "killed") == history_of(tmp_path / "whole")


@pytest.mark.cluster
@pytest.mark.slow
def test_a_driver_that_gets_sigterm_saves_first(tmp_path):
    """In the middle of an epoch of 125 steps; the rerun ends with the history of an undisturbed run."""
    rng = np.random.default_rng(0)
    rows = [(user, 100 + item, 9e8 + n) for user in range(2000) for n, item in enumerate(rng.permutation(50)[:12])]
    pd.DataFrame(rows, columns=["user", "item", "time"]).to_csv(tmp_path / "train_ratings.csv", index=False)
    settings = [*SMALL, f"data.data_dir={tmp_path}", "run.name=run", "training.num_epochs=6"]
    settings += ["training.early_stopping=false", "training.num_workers=2"]

    def history_of(root):
        epochs = json.loads((root / "run" / "run.json").read_text())["history"]
        return [{k: v for k, v in epoch.items() if k not in ("seconds", "tokens_per_second")} for epoch in epochs]

    for root in (tmp_path / "whole", tmp_path / "ended"):
        assert run_job("prepare", *settings, f"run.storage_path={root}").returncode == 0
    assert run_job("train", *settings, f"run.storage_path={tmp_path / 'whole'}").returncode == 0

    run = tmp_path / "ended" / "run"
    command = [sys.executable, "-m", "jobs.train", *settings, f"run.storage_path={tmp_path / 'ended'}"]
    driver = subprocess.Popen(command, cwd=ROOT, env=without_ray(), stdout=subprocess.PIPE, text=True)
    while not list(run.glob("bert4rec-02-*")):
        assert driver.poll() is None, "ended before it could be stopped"
        time.sleep(0.05)
    driver.terminate()
    assert "SIGTERM: saving a checkpoint" in driver.communicate()[0]
    assert driver.returncode == 128 + 15
    (unfinished,) = run.glob("unfinished-*")
    (run / "unfinished-99-000001").mkdir()  # as a cut-off upload leaves it
    again = run_job("train", *settings, f"run.storage_path={tmp_path / 'ended'}")
    assert again.returncode == 0, again.stderr
    assert history_of(tmp_path / "ended") == history_of(tmp_path / "whole")
    assert not list(run.glob("unfinished-*"))
    assert unfinished.name.startswith("unfinished-0")


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("train", ["model.hiden_units=8"], "config key model.hiden_units does not exist (did you mean"),
        ("prepare", ["data.data_dir={tmp}"], "train_ratings.csv: no such file; the directory holds nothing"),
        ("train", ["data.data_dir={tmp}", "run.storage_path={tmp}"], "no prepared dataset"),
        ("recommend", ["data.data_dir={tmp}", "run.storage_path={tmp}"], "no trained run"),
        ("train", ["--config", "{tmp}/none.yaml"], "none.yaml: no such config file"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, job, arguments, message):
    done = run_job(job, *[argument.format(tmp=tmp_path) for argument in arguments])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def test_the_second_of_two_jobs_says_who_holds_the_run(tmp_path):
    write_dataset(Path(load_config(None, [f"run.storage_path={tmp_path}"]).prepared_path), {1: [1, 2, 3]}, 3)
    with lease.held(str(tmp_path / "run")):
        done = run_job("train", f"run.storage_path={tmp_path}", "run.name=run", "data.data_dir=data/ml-100k")
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [lease.HOLDER]
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"run: in use by another job (host {os.uname().nodename}, pid {os.getpid()}, since 20" in done.stderr


@pytest.mark.parametrize(
    "moment",
    ["imports", "starting Ray", *(pytest.param(line, marks=pytest.mark.slow) for line in ("training run", "protocol"))],
)
def test_ctrl_c_ends_a_job_at_any_moment(data_dir, tmp_path, moment):
    """In a terminal, all processes of the job get it."""
    paths = [f"data.data_dir={data_dir}", f"run.storage_path={tmp_path}", "run.name=run"]
    command = [sys.executable, "-u", "-m", "jobs.pipeline", *SMALL, *paths]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=without_ray(), start_new_session=True, **pipes) as job:
        if moment == "imports":
            wait_for(lambda: "_raylet" in Path(f"/proc/{job.pid}/maps").read_text())
        else:
            while moment not in job.stdout.readline():
                assert job.poll() is None, job.stderr.read()
        os.killpg(job.pid, signal.SIGINT)
        _, errors = job.communicate(timeout=120)
    assert errors == "error: interrupted; run the same command to continue\n"
    assert job.returncode == 130
    wait_for(lambda: not in_session(job.pid), 30, "for the processes of its Ray to end")


def in_session(session):
    """Ids of the living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        found += [int(stat.parent.name)] * (int(own) == session and state != "Z")
    return found


def test_help_lists_every_key():
    done = run_job("train", "--help")
    assert done.returncode == 0
    for key in ("model.hidden_units=256", "training.monitor_metric=val_ndcg@10", "inference.formats=[parquet, csv]"):
        assert key in done.stdout
