import csv
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bert4rec import storage
from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.evaluation.evaluate import evaluate
from bert4rec.inference.recommend import _publish as publish
from bert4rec.inference.recommend import check_request, recommend
from bert4rec.model.network import BERT4Rec
from tests.helpers.datasets import random_histories, write_dataset
from tests.twins import reference
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

HISTORIES = random_histories(600, NUM_ITEMS, seed=5, longest=28)  # two parts
YEARS = [None if token % 7 == 0 else 1990 + token % 10 for token in range(1, NUM_ITEMS + 1)]
LAST_YEARS = [None if user % 5 == 0 else 1990 + user % 10 for user in range(600)]


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "d", HISTORIES, NUM_ITEMS, YEARS, LAST_YEARS)


@pytest.fixture(scope="module")
def model():
    model = make_model()
    model.catalogue, model.held_out = "test", 2
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    path = str(tmp_path_factory.mktemp("model") / "m")
    model.save_pretrained(path)
    return path


def read(output_path):
    return pq.read_table(f"{output_path}/recommendations.parquet").to_pylist()


def test_every_user_gets_what_the_slow_way_gives(tmp_path, dataset_path, checkpoint, model, capsys, request):
    output = str(tmp_path / "out")
    config = load_config(None, ["inference.topk=7", "inference.batch_size=100"])
    result = recommend(config, dataset_path, checkpoint, output)
    rows = read(output)
    expected, num_short = [], 0
    for index, user in enumerate(sorted(HISTORIES)):
        best = reference.recommendations(model, HISTORIES[user], 7, YEARS, LAST_YEARS[index])
        num_short += len(best) < 7
        expected += [(user, 100 + token, rank) for rank, (token, _) in enumerate(best, start=1)]
    assert [(row["user"], row["item"], row["rank"]) for row in rows] == expected
    assert (result.num_users, result.num_rows, result.num_short_users) == (600, len(expected), num_short)
    assert num_short > 0
    with open(f"{output}/recommendations.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert lines == [["user", "item"], *([str(user), str(item)] for user, item, _ in expected)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "recommendations.csv",
        "recommendations.parquet",
    ]

    request.getfixturevalue("local_parts")
    capsys.readouterr()
    recommend(config, dataset_path, checkpoint, output)
    assert "up to date" in capsys.readouterr().out
    Path(output, "recommendations.csv").write_text("user,item\n")
    recommend(config, dataset_path, checkpoint, output)
    assert "up to date" not in capsys.readouterr().out
    assert len(Path(output, "recommendations.csv").read_text().splitlines()) == 1 + len(expected)
    few = load_config(None, ["inference.topk=7", "inference.users=[1]"]).inference
    with pytest.raises(InputError, match="recommendations of all users, which those of a few would replace"):
        check_request(few, PreparedDataset(dataset_path), output)
    only_csv = load_config(None, ["inference.topk=3", "inference.formats=[csv]", "inference.exclude_seen=false"])
    recommend(only_csv, dataset_path, checkpoint, output)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "recommendations.csv"]


@pytest.mark.usefixtures("local_parts")
def test_less_popular_items_on_request(tmp_path, dataset_path, checkpoint):
    config = load_config(None, ["inference.topk=7", "inference.popularity_discount=0.5"])
    with pytest.raises(InputError, match=r"popularity_discount.*earlier version, which did not keep that"):
        recommend(config, dataset_path, checkpoint, str(tmp_path / "out"))
    model = BERT4Rec.from_pretrained(checkpoint)
    model.item_counts += torch.arange(NUM_ITEMS, 0, -1)
    model.save_pretrained(str(tmp_path / "m"))
    recommend(config, dataset_path, str(tmp_path / "m"), str(tmp_path / "out"))
    best = {
        user: reference.recommendations(model, HISTORIES[user], 7, YEARS, LAST_YEARS[index], popularity_discount=0.5)
        for index, user in enumerate(sorted(HISTORIES))
    }
    expected = [(user, 100 + token) for user, items in best.items() for token, _ in items]
    assert [(row["user"], row["item"]) for row in read(tmp_path / "out")] == expected


@pytest.mark.usefixtures("local_parts")
def test_finished_parts_of_a_killed_job_are_kept(tmp_path, dataset_path, checkpoint, monkeypatch):
    """Stop between scoring and publishing, spoil one part: the rerun does that one again, and no other."""
    config = load_config(None, ["inference.topk=4"])
    recommend(config, dataset_path, checkpoint, str(tmp_path / "whole"))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["bert4rec.inference.recommend"], "_publish", die)
        with pytest.raises(KeyboardInterrupt):
            recommend(config, dataset_path, checkpoint, str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_unfinished"]
    parts = tmp_path / "out" / "_unfinished"
    (parts / "part-00001.json").unlink()
    before = (parts / "part-00000.csv").stat().st_mtime_ns
    seen = {}
    monkeypatch.setattr(
        sys.modules["bert4rec.inference.recommend"],
        "_publish",
        lambda *arguments: seen.update(mtime=(parts / "part-00000.csv").stat().st_mtime_ns) or publish(*arguments),
    )
    recommend(config, dataset_path, checkpoint, str(tmp_path / "out"))
    assert seen["mtime"] == before
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    assert (tmp_path / "out" / "recommendations.csv").read_bytes() == (
        tmp_path / "whole" / "recommendations.csv"
    ).read_bytes()


@pytest.mark.usefixtures("local_parts")
def test_what_cannot_be_scored_is_one_message(tmp_path, dataset_path, checkpoint):
    output = str(tmp_path / "out")
    with pytest.raises(InputError, match=r"inference\.topk=31 is larger than the catalogue, which has 30 items"):
        recommend(load_config(None, ["inference.topk=31"]), dataset_path, checkpoint, output)
    other = BERT4Rec.from_pretrained(checkpoint)
    other.catalogue = "elsewhere"
    other.save_pretrained(str(tmp_path / "m"))
    for work in (recommend, lambda *arguments: evaluate(*arguments[:3])):
        with pytest.raises(InputError, match=r"another catalogue \(fingerprint elsewhere.*fingerprint test"):
            work(load_config(), dataset_path, str(tmp_path / "m"), output)
    with pytest.raises(InputError, match="holds something else"):
        recommend(load_config(), dataset_path, checkpoint, dataset_path)
    other.held_out, other.catalogue = 1, "test"
    other.save_pretrained(str(tmp_path / "m"))
    with pytest.raises(InputError, match=r"last 1 items of each user held out, so it has seen the validation item"):
        evaluate(
            load_config(None, ["data.holdout=2", "evaluation.split=validation"]), dataset_path, str(tmp_path / "m")
        )
    with pytest.raises(InputError, match=r"so it has seen the test item of data\.holdout=2"):
        evaluate(load_config(None, ["data.holdout=2"]), dataset_path, str(tmp_path / "m"))
    with pytest.raises(InputError, match=r"val_ndcg@10 is of the test item, and has chosen the checkpoint"):
        evaluate(load_config(None, ["evaluation.split=test"]), dataset_path, str(tmp_path / "m"))
    refit = load_config(None, ["evaluation.split=test", "training.monitor_metric=train_loss"])
    assert evaluate(refit, dataset_path, str(tmp_path / "m")).split == "test"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        recommend(load_config(), dataset_path, checkpoint, str(tmp_path / "file" / "out"))
    assert not storage.exists(output)


def test_ids_with_commas_and_quotes_survive_the_csv(tmp_path):
    import pyarrow as pa

    from bert4rec.inference.recommend import _write_csv

    for values in (["a,b", 'c"d'], ["plain", "007"]):
        with pa.OSFile(str(tmp_path / "x.csv"), "wb") as stream:
            _write_csv(pa.table({"user": values, "item": [1, 2]}), stream)
        with open(tmp_path / "x.csv", newline="") as file:
            assert list(csv.reader(file)) == [[values[0], "1"], [values[1], "2"]]
    assert (tmp_path / "x.csv").read_text() == "plain,1\n007,2\n"


@pytest.mark.usefixtures("local_parts")
def test_scores_are_the_models_own(tmp_path, dataset_path, checkpoint, model):
    config = load_config(None, ["inference.topk=2", "inference.formats=[parquet]"])
    recommend(config, dataset_path, checkpoint, str(tmp_path / "out"))
    row = read(tmp_path / "out")[0]
    history = HISTORIES[row["user"]]
    with torch.no_grad():
        scores = reference.logits(model, [*history[-11:], NUM_ITEMS + 1])[-1]
    assert row["score"] == pytest.approx(scores[row["item"] - 101].item(), rel=1e-4)


@pytest.mark.usefixtures("local_parts")
def test_lists_of_users_are_sorted_once_and_obeyed(tmp_path, model, checkpoint, monkeypatch, capsys):
    """Lists of users, in two files, from `prepare`'s own sort of data; another content makes everything anew, a killed
    job's parts are kept."""
    (tmp_path / "prepared").mkdir()
    dataset_path = write_dataset(tmp_path / "prepared" / "d", HISTORIES, NUM_ITEMS, YEARS, LAST_YEARS)
    rng = np.random.default_rng(0)
    pairs = sorted({(int(user), int(item)) for user, item in rng.integers((1, 99), (620, 134), (9000, 2))})
    order = rng.permutation(len(pairs))
    for name, chosen in (("a.csv", order[:5000]), ("b.csv", order[5000:])):
        rows = "".join(f"{pairs[place][0]},{pairs[place][1]}\n" for place in chosen)
        (tmp_path / name).write_text("user,item\n" + rows + ("nobody,105\n" if name == "a.csv" else ""))
    settings = ["inference.topk=4", f"inference.candidates=[{tmp_path}/a.csv, {tmp_path}/b.csv]"]
    config, output = load_config(None, settings), str(tmp_path / "out")
    own = {user: {item - 100 for who, item in pairs if who == user} for user in HISTORIES}

    def expected():
        return [
            (user, 100 + token)
            for index, user in enumerate(sorted(HISTORIES))
            for token in [
                token
                for token, _ in reference.recommendations(model, HISTORIES[user], NUM_ITEMS, YEARS, LAST_YEARS[index])
                if token in own[user]
            ][:4]
        ]

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["bert4rec.inference.recommend"], "_publish", die)
        with pytest.raises(KeyboardInterrupt):
            recommend(config, dataset_path, checkpoint, output)
    known = sum(1 for user, _ in pairs if user <= 600)
    said = capsys.readouterr().out
    assert f"{len(pairs) - known + 1:,} of {len(pairs) + 1:,} rows are of users who are not in the data" in said
    assert "5 of 35 items are not in the catalogue, such as" in said
    parts = tmp_path / "out" / "_unfinished"
    (parts / "part-00001.json").unlink()
    kept = (parts / "part-00000.csv").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("bert4rec.inference.sort_lists._sort", die)  # they are sorted already
        patch.setattr(
            sys.modules["bert4rec.inference.recommend"],
            "_publish",
            lambda *given: (parts / "part-00000.csv").stat().st_mtime_ns == kept and publish(*given),
        )
        recommend(config, dataset_path, checkpoint, output)
    assert [(row["user"], row["item"]) for row in read(output)] == expected()
    recommend(config, dataset_path, checkpoint, output)
    assert "up to date" in capsys.readouterr().out

    with open(tmp_path / "b.csv", "a") as file:
        item = next(item for item in range(1, NUM_ITEMS + 1) if item not in own[1])
        file.write(f"1,{100 + item}\n")
    own[1].add(item)
    recommend(config, dataset_path, checkpoint, output)
    assert [(row["user"], row["item"]) for row in read(output)] == expected()
    with open(tmp_path / "a.csv", "a") as file:
        file.write(f"1,{100 + item}\n")
    with pytest.raises(InputError, match=rf"user 1 has item {100 + item} twice"):
        recommend(config, dataset_path, checkpoint, output)
    (tmp_path / "c.csv").write_text("user,item\n700,101\n")
    with pytest.raises(InputError, match=r"c\.csv: no row is of a user and an item of the data, of 1 rows"):
        recommend(load_config(None, [f"inference.exclude={tmp_path}/c.csv"]), dataset_path, checkpoint, output)
