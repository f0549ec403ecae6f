"""What docs/using-a-model.md, export.md and the MLflow part of training.md show, on small data of the same form.

The ways to rank must agree.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]
CONFIG = """
data: {data_dir: data/ml-100k}
model: {hidden_units: 8, num_heads: 2, max_len: 8}
run: {mlflow_uri: "sqlite:///mlflow.db"}
"""


def run(directory, *command, **environment_too):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= environment_too
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_films(directory):
    """40 users with 9 of 30 films each, some of the ids that the guide names among them."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    films = np.array([50, 172, 181, 258, *range(900, 926)])
    users = [5, *range(6, 200, 5)]
    rows = [(user, film, 9e8 + n) for user in users for n, film in enumerate(rng.permutation(films)[:9])]
    pd.DataFrame(rows, columns=["user", "item", "time"]).to_csv(directory / "train_ratings.csv", index=False)
    titles = "".join(f"{film}\tFilm {film}\n" for film in films)
    (directory / "titles.tsv").write_text("item\ttitle\n" + titles)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)


def films_of(text):
    return [int(film) for film in re.findall(r"Film (\d+)", text)]


def recommended(text):
    """Films of the printed tables, a list for each."""
    return [films_of(part) for part in re.split(r"rank +item.*title\n", text)[1:]]


def test_every_example_of_the_guide(ray_session, tmp_path):
    pytest.importorskip("onnxruntime")
    mlflow = pytest.importorskip("mlflow")
    few, new, similar = blocks("using-a-model.md", "bash")
    notebook, elsewhere = blocks("using-a-model.md", "python")
    (export, *_), (onnx, *_) = blocks("export.md", "bash"), blocks("export.md", "python")
    (tracked,) = [block for block in blocks("training.md", "bash") if "mlflow_uri" in block]
    write_films(tmp_path / "data" / "ml-100k")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ml-100k.yaml").write_text(CONFIG)

    printed = run(tmp_path, sys.executable, "-c", notebook, **ray_session)
    (run_path,) = (tmp_path / "runs").glob("ml-100k-*")
    trained = json.loads((run_path / "run.json").read_text())
    assert [epoch["epoch"] for epoch in trained["history"]] == list(range(1, 11))
    assert f"{run_path}/recommendations 400" in printed
    *_, recommendation, likeness, many = printed.split("rank")
    assert set(films_of(many)) <= {50, 172, 181, 258}
    assert len(films_of(recommendation)) == len(films_of(likeness)) == 5

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (logged,) = client.search_runs([client.get_experiment_by_name("ml-100k").experiment_id])
    assert (logged.info.run_name, logged.info.status) == (run_path.name, "FINISHED")
    for ours, theirs in (("train_loss", "train_loss"), ("val_ndcg@10", "val_ndcg_at_10")):
        curve = [(metric.step, metric.value) for metric in client.get_metric_history(logged.info.run_id, theirs)]
        assert curve == [(int(epoch["epoch"]), epoch[ours]) for epoch in trained["history"]]
    assert logged.data.metrics["best/val_ndcg_at_10"] == trained["best_metrics"]["val_ndcg@10"]
    assert logged.data.params["model.hidden_units"] == "8"
    same = "--config configs/ml-100k.yaml training.num_epochs=10"
    assert "is already trained" in run(tmp_path, "bash", "-c", f"{tracked.strip()} {same}")

    everyone = pq.read_table(run_path / "recommendations" / "recommendations.parquet").to_pandas()
    best = [everyone[everyone["user"] == user]["item"].tolist() for user in (5, 196)]
    tables = recommended(run(tmp_path, "bash", "-c", few))
    assert [table[:3] for table in tables] == [items[:3] for items in best]  # behind them, the next user's history

    ((*of_new,),) = recommended(run(tmp_path, "bash", "-c", new))
    assert len(of_new) == 10
    assert of_new[:5] == films_of(recommendation)
    written = pd.read_csv(tmp_path / "new_users" / "recommendations.csv")
    assert written.to_numpy().tolist() == [[9001, item] for item in of_new]
    assert recommended(run(tmp_path, "bash", "-c", similar))[0][:5] == films_of(likeness)

    run(tmp_path, "bash", "-c", export)
    there, name = tmp_path / "there", trained["best_checkpoint"]
    for copy in ("model", name):
        shutil.copytree(run_path / name, there / copy)
    shutil.copytree(run_path / "export", there / "export")
    card = (there / name / "README.md").read_text()
    assert f"| val_ndcg@10 | {trained['best_metrics']['val_ndcg@10']:.4f} |" in card
    (of_card,) = re.findall(r"```python\n(.*?)```", card, re.S)
    shown = films_of(run(there, sys.executable, "-c", "\n".join([onnx, elsewhere, of_card])))
    assert shown[:5] == films_of(recommendation)
    assert len(shown) == 5 + 10 + 5
