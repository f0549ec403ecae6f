"""Commands of README.md and docs/*.md on a few users: settings made small, everything else as it is written.

All commands are parsed in tests/unit/test_docs.py. Of those that train, which takes long, README's are run here.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jobs.embed import embed_items
from jobs.evaluate import evaluate_model
from jobs.pipeline import run_pipeline
from jobs.prepare import prepare_dataset
from jobs.recommend import recommend_all
from jobs.report import report_run
from jobs.train import train_model
from tests.helpers import commands

pytestmark = pytest.mark.integration

SMALL = (
    *("model.hidden_units=8", "model.num_heads=2", "model.num_layers=1", "model.max_len=8", "data.batch_size=16"),
    *("training.num_epochs=1", "training.num_workers=1", "training.val_check_interval=1"),
)
PAGES = ("README.md", "data-format.md", "training.md", "scoring.md", "troubleshooting.md")
FOUND = [
    command
    for command in commands.JOBS
    if command.is_shell
    and command.page in PAGES
    and (command.job in ("prepare", "embed", "evaluate", "recommend") or command[:2] == ("README.md", "pipeline"))
]
RUN = [  # the first of each job but pipeline, which test_jobs.py runs; the others with `-m integration`
    pytest.param(
        command, marks=pytest.mark.slow if command.job in {"pipeline", *(c.job for c in FOUND[:place])} else []
    )
    for place, command in enumerate(FOUND)
]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    path = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    rows = [(user, 100 + item, 9e8 + n) for user in range(40) for n, item in enumerate(rng.permutation(30)[:8])]
    ratings = pd.DataFrame(rows, columns=["user", "item", "time"])
    for name in ("train_ratings.csv", "ratings-1.csv"):
        ratings.to_csv(path / name, index=False)
    elsewhere = ratings.assign(
        time=pd.to_datetime(ratings["time"], unit="s", utc=True).dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    )
    elsewhere = elsewhere.set_axis(["userId", "movieId", "watched_at"], axis=1)
    elsewhere.to_csv(path / "log", index=False, sep=";")
    elsewhere.to_csv(path / "log.csv", index=False)
    for name, value in (("title", "Film {}"), ("genre", "G{}"), ("year", "19{}")):
        lines = "".join(f"{100 + item}\t{value.format(50 + item % 7)}\n" for item in range(32))  # two are new
        (path / f"{name}s.tsv").write_text(f"item\t{name}\n{lines}")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("command", RUN, ids=str)
def test_a_command_does_its_job(ray_session, local_training, films, runs, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)  # relative outputs, and lists of items
    pd.DataFrame({"item": range(100, 130)}).to_csv("licensed.csv", index=False)
    (tmp_path / "bought").mkdir()
    pd.DataFrame({"user": [3], "item": [129]}).to_parquet("bought/2026.parquet")
    config = commands.parse(command, f"data.data_dir={films}", f"run.storage_path={runs}", *SMALL)
    if command.job == "embed":
        assert embed_items(config).num_items == 32
        return
    if command.job == "pipeline":
        run_pipeline(config)
        page = max(runs.glob("*/report.html"), key=lambda path: path.stat().st_mtime).read_text()
        assert "What is recommended" in page
        assert "Not evaluated" not in page
        return
    prepared = prepare_dataset(config)
    assert (runs / "prepared" / prepared.rpartition("/")[2] / "manifest.json").is_file()
    if command.job == "prepare":
        return
    best = train_model(config).best_checkpoint
    if command.job == "evaluate":
        evaluate_model(config, best)
    if command.job == "recommend":
        output = recommend_all(config, best)
        assert len(pd.read_parquet(f"{output}/recommendations.parquet")) == 40 * config.inference.topk
        assert "What is recommended" in Path(report_run(best.rpartition("/")[0], prepared, output)).read_text()
