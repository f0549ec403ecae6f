import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert4rec import storage
from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.report import charts
from bert4rec.report import page as report
from tests.helpers.datasets import random_histories, write_dataset

pytestmark = pytest.mark.unit

HISTORIES = {1: [1, 2, 3], 2: [1, 1], 3: [4]}
YEARS = [1990, 2000, 2010, None, 2020]
LAST_YEARS = [1995, 2000, None]
BEST = {"epoch": 2, "train_loss": 1.5, "lr": 0.1, "tokens_per_second": 10.0, "val_ndcg@10": 0.25, "val_gate/item": 0.7}
RUN = {"history": [{**BEST, "epoch": 1, "val_ndcg@10": 0.125}, BEST], "best_metrics": BEST}


def write_recommendations(path, rows, **settings):
    path.mkdir()
    table = pa.table(
        {
            "user": pa.array([row[0] for row in rows], pa.int64()),
            "item": pa.array([row[1] for row in rows], pa.int64()),
            "rank": pa.array([row[2] for row in rows], pa.int32()),
            "score": pa.array([row[3] for row in rows], pa.float32()),
        }
    )
    pq.write_table(table, path / "part-00000.parquet")
    settings = load_config().inference.model_dump() | {"topk": 2} | settings
    return report.Recommendations(str(path), settings, num_short_users=1)


def read_block(page, name):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)[1])


def titles_of(page):
    return re.findall(r"<h3>(.*?)</h3>", page)


@pytest.fixture
def dataset(tmp_path):
    path = write_dataset(tmp_path / "d", HISTORIES, 5, YEARS, LAST_YEARS, genres=[[0], [0, 1], [], [1], []])
    return PreparedDataset(path)


def test_users_by_hand(dataset):
    users = report._read_users(dataset, dataset.items())
    assert users.length.tolist() == [3, 2, 1]
    assert users.seen.tolist() == [3, 1, 1]
    # user 1, last in 1995: 2000, 2010, 2020 are later, of which 2000 and 2010 are seen; user 2: 2010 and 2020
    assert users.future.tolist() == [1, 2, 0]
    assert users.last_year.tolist() == [1995, 2000, 0]


def test_later_releases_are_those_after_the_moment_asked_for(dataset, tmp_path):
    assert report._read_users(dataset, dataset.items(), 1_300_000_000).future.tolist() == [1, 1, 1]  # 2011
    given = write_recommendations(tmp_path / "r", [(1, 105, 1, 2.5)], at=1_300_000_000)
    page = report.render(load_config(), dataset, "run", RUN, None, given)
    assert "unseen items released after the year asked for (inference.at)" in page


def test_the_moment_asked_for_filters_later_releases_where_the_data_have_no_times(tmp_path):
    dataset = PreparedDataset(write_dataset(tmp_path / "d", HISTORIES, 5, YEARS))
    given = write_recommendations(tmp_path / "r", [(1, 105, 1, 2.5)], at=1_300_000_000)  # 2011
    page = report.render(load_config(), dataset, "run", RUN, None, given)
    assert "Later releases" in titles_of(page)
    assert "No later releases are filtered" not in page


def test_gaps_and_sessions_by_hand(tmp_path):
    """Of three users; the second has one interaction, and the third one session."""
    histories = {1: [1, 2, 3, 4], 2: [5], 3: [1, 2, 3]}
    start, day = 1_000_000_000, 86_400
    times = {1: [start, start, start + 1800, start + 40 * day], 2: [start], 3: [start, start + 59, start + 1858]}
    dataset = PreparedDataset(write_dataset(tmp_path / "d", histories, 5, times=times))
    gaps, lengths, num_single = report._read_gaps(dataset)
    named = dict(zip(report._GAPS, gaps.tolist(), strict=True))
    assert {name: count for name, count in named.items() if count} == {
        "same second": 1,
        "under a minute": 1,
        "to 30 minutes": 1,
        "to a day": 1,
        "to a year": 1,
    }
    assert lengths.tolist() == [2, 1, 1, 1, 3]
    assert num_single == 2
    page = report.render(load_config(), dataset, "run", RUN, None, "none")
    assert "From 2001-09-09T01:46:40Z to 2001-10-19T01:46:40Z. A session ends where nothing follows for 30 min" in page
    assert {"Gaps", "Lengths of sessions"} <= set(titles_of(page))


def test_users_over_many_parts_are_those_of_a_loop(tmp_path):
    rng = np.random.default_rng(3)
    histories = random_histories(1100, 30)  # three parts
    years = [None if n % 7 == 0 else int(rng.integers(1990, 2000)) for n in range(30)]
    last_years = [None if n % 5 == 0 else int(rng.integers(1990, 2000)) for n in range(1100)]
    dataset = PreparedDataset(write_dataset(tmp_path / "d", histories, 30, years, last_years))
    users = report._read_users(dataset, dataset.items())
    for row, (history, last) in enumerate(zip(histories.values(), last_years, strict=True)):
        later = [n for n, year in enumerate(years) if last and year and year > last and n + 1 not in history]
        assert users.future[row] == len(later)
        assert users.seen[row] == len(set(history))


def test_recommendations_by_hand(dataset, tmp_path):
    rows = [(1, 105, 1, 2.5), (1, 104, 2, 1.0), (2, 105, 1, 0.5), (3, 101, 1, 3.0), (3, 102, 2, 2.0)]
    given = write_recommendations(tmp_path / "r", rows)
    assert report._count_recommended(dataset, dataset.items(), given).tolist() == [1, 1, 0, 1, 2]
    browser = report._browser(dataset, dataset.items(), report._read_users(dataset, dataset.items()), given)
    assert [user["user"] for user in browser["users"]] == ["3", "2", "1"]  # by length
    assert browser["users"][2] == {
        "user": "1",
        "length": 3,
        "year": 1995,
        "history": [2, 1, 0],
        "top": [(4, 2.5), (3, 1.0)],
    }
    assert browser["items"][1] == ["film 2", 2000, ["genre 0", "genre 1"]]
    page = report.render(load_config(), dataset, "run", RUN, None, given)
    assert "<b>4 (80%)</b>" in page  # coverage
    assert read_block(page, "browser")["users"][0]["top"] == [[0, 3.0], [1, 2.0]]
    assert {"Gates", "Genres", "Later releases", "Seen items", "Most recommended"} <= set(titles_of(page))
    assert len(read_block(page, "charts")) == page.count('role="img"')


def evaluation_of(systems, protocol="all", groups=("1-9", "10-49"), notes=()):
    return {
        "split": "test",
        "num_users": 3,
        "num_items": 5,
        "protocols": {protocol: systems, "uniform-100": {name: {"hr@10": 0.875} for name in systems}},
        "by_history_length": {
            protocol: {group: {s: {"num_users": n, "ndcg@10": 0.5} for s in systems} for n, group in enumerate(groups)}
        },
        "by_target_popularity": {protocol: {"head": {s: {"num_users": 3, "ndcg@10": 0.5} for s in systems}}},
        "beyond_accuracy": {name: {"coverage": 0.375} for name in systems},
        "notes": list(notes),
    }


def test_metrics_of_every_system_and_protocol_are_shown(dataset):
    systems = {"BERT4Rec": {"hr@10": 0.5, "ndcg@10": 0.25}, "popularity": {"hr@10": 0.125}}
    page = report.render(load_config(), dataset, "run", RUN, evaluation_of(systems, notes=["ease left out"]), "none")
    assert "<td>HR@10</td><td>0.5000</td><td>0.1250</td>" in page
    assert "<td>NDCG@10</td><td>0.2500</td><td></td>" in page
    assert "<td>HR@10</td><td>0.8750</td><td>0.8750</td>" in page
    assert "<td>coverage</td><td>0.3750</td><td>0.3750</td>" in page
    assert "<li>Ease left out.</li>" in page
    charts = dict(zip(titles_of(page), read_block(page, "charts"), strict=False))
    assert charts["HR@10"]["data"][1]["y"] == [0.125, 0.875]
    assert charts["NDCG@10"]["data"][1]["y"] == [None, None]
    assert charts["NDCG@10 by length of history"]["data"][0]["x"] == ["10-49<br>1 users"]  # nobody is in the other


def test_the_blend_of_an_evaluation_is_named(dataset):
    systems = {name: {"hr@10": 0.5, "ndcg@10": 0.25} for name in ("BERT4Rec", "BERT4Rec+ease", "ease")}
    for rules, is_named in (({"blend": {"model": "ease", "weight": 0.06, "is_chosen": True}}, True), ({}, False)):
        page = report.render(load_config(), dataset, "run", RUN, evaluation_of(systems) | {"rules": rules}, "none")
        line = "BERT4Rec+ease adds the scores of ease with weight 0.06, chosen on the validation."
        assert (line in page) == is_named


def test_the_query_time_of_an_evaluation_is_named(dataset):
    systems = {"BERT4Rec": {"hr@10": 0.5, "ndcg@10": 0.25}, "BERT4Rec/target": {"hr@10": 0.5, "ndcg@10": 0.25}}
    evaluation = evaluation_of(systems) | {"query_time": "last"}
    page = report.render(load_config(), dataset, "run", RUN, evaluation, "none")
    assert (
        "BERT4Rec is asked for it at the usual time after the item before it, BERT4Rec/target at its own time" in page
    )


def test_without_times_metadata_training_or_recommendations(tmp_path):
    dataset = PreparedDataset(write_dataset(tmp_path / "d", HISTORIES, 5))
    page = report.render(load_config(), dataset, "run", None, None, "No recommendations yet.")
    for words in (
        "No item has a year of release",
        "Training has not finished",
        "Not evaluated",
        "No later releases are filtered",
        "The data have no column time.",
    ):
        assert words in page
    assert page.count("No recommendations yet.") == 2
    assert "Gates" not in titles_of(page)


def test_filters_that_were_off_are_said_to_be(dataset, tmp_path):
    settings = {"exclude_seen": False, "exclude_future": False, "popularity_discount": 0.3}
    given = write_recommendations(tmp_path / "r", [(1, 105, 1, 2.5)], **settings)
    page = report.render(load_config(), dataset, "run", RUN, None, given)
    assert "inference.exclude_seen=false" in page
    assert "inference.exclude_future=false" in page
    assert "inference.popularity_discount=0.3" in page
    assert "Seen items" not in titles_of(page)


def test_what_others_wrote_is_text(dataset, tmp_path, monkeypatch):
    attack = "</script><img src=x onerror=alert(1)><b>'\""
    table = pq.read_table(tmp_path / "d" / "items.parquet")
    table = table.set_column(4, "title", pa.array([attack] * 5))
    pq.write_table(table, tmp_path / "d" / "items.parquet")
    manifest = dataset.manifest.model_copy(update={"vocabularies": {"genre": [attack, attack]}, "notes": [attack]})
    monkeypatch.setattr(dataset, "manifest", manifest)
    given = write_recommendations(tmp_path / "r", [(1, 105, 1, 2.5)])
    page = report.render(
        load_config(),
        dataset,
        attack,
        RUN,
        evaluation_of({attack: {attack: 1.0}}, attack, [attack] * 2, [attack]),
        given,
    )
    assert read_block(page, "browser")["items"]["0"] == [attack, 1990, [attack]]
    ours = page.replace(report.plotly.offline.get_plotlyjs(), "")
    assert "<img" not in ours
    assert "<img" not in json.dumps(read_block(page, "charts"))  # as plotly reads it
    popularity = next(c for c in read_block(page, "charts") if c["layout"]["xaxis"].get("title") == {"text": "rank"})
    assert popularity["data"][0]["text"][0].startswith("&lt;/script&gt;&lt;img")


def test_the_page_is_self_contained_and_small(dataset):
    page = report.render(load_config(), dataset, "run", RUN, None, "none")
    assert len(page.encode()) < 6_000_000
    ours = page.replace(report.plotly.offline.get_plotlyjs(), "")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", ours)


def test_ranges_of_a_histogram_cover_every_value():
    values = np.array([0, 1, 1, 2, 3, 9, 100, 1000])
    chart = charts.histogram("t", "c", values, "users")["figure"]["data"][0]
    assert sum(chart["y"]) == len(values)
    assert chart["x"][:5] == ["0", "1", "2", "3", "4–5"]
    assert chart["y"][:5] == [1, 2, 1, 1, 0]
    assert chart["x"][-1] == "724–1,023"


def test_weighted_median():
    assert report._typical(np.array([10, 1, 5]), np.array([1, 1, 1])) == 5
    assert report._typical(np.array([10, 1, 5]), np.array([9, 1, 1])) == 10
    assert report._typical(np.array([10, 1]), np.array([0, 4])) == 1


def test_names_that_are_numbers_are_names(tmp_path):
    path = write_dataset(tmp_path / "d", HISTORIES, 5, genres=[[0], [0, 1], [], [1], []])
    dataset = PreparedDataset(path)
    dataset.manifest.vocabularies["genre"][:] = ["1990", "2"]
    given = write_recommendations(tmp_path / "r", [(1, 105, 1, 2.5), (2, 104, 1, 0.5)])
    numbers = evaluation_of({"BERT4Rec": {"hr@10": 0.5}}, groups=("1", "2"))
    page = report.render(load_config(), dataset, "run", RUN, numbers, given)
    bars = [chart for chart in read_block(page, "charts") if chart["data"][0]["type"] == "bar"]
    (genres,) = [chart for chart in bars if "1990" in chart["data"][0].get("y", [])]
    assert genres["layout"]["yaxis"]["type"] == "category"
    bars.remove(genres)
    assert len(bars) > 3
    assert all(chart["layout"]["xaxis"]["type"] == "category" for chart in bars)


def test_numbers_have_no_more_digits_than_they_mean():
    shown = [report._number(value) for value in (1234.5678901234567, 0.123456, 12345, None)]
    assert shown == ["1,234.6", "0.1235", "12,345", ""]


def test_an_item_without_a_title_shows_its_genres(tmp_path):
    path = write_dataset(tmp_path / "d", HISTORIES, 5, genres=[[0], [0, 1], [], [1], []])
    table = pq.read_table(f"{path}/items.parquet")
    titles = pa.array(["A", None, None, "D", None], pa.string())
    pq.write_table(table.set_column(table.column_names.index("title"), "title", titles), f"{path}/items.parquet")
    manifest = storage.read_sealed(f"{path}/manifest.json")
    manifest["files"]["items.parquet"] = (tmp_path / "d" / "items.parquet").stat().st_size
    storage.commit(path, manifest)
    dataset = PreparedDataset(path)
    assert dataset.descriptions() == ["A", "(genre 0, genre 1)", "", "D", ""]
    assert dataset.names() == ["A", "102 (genre 0, genre 1)", "103", "D", "105"]
    given = write_recommendations(tmp_path / "r", [(1, 102, 1, 2.5), (2, 105, 1, 0.5)])
    page = report.render(load_config(), dataset, "run", RUN, None, given)
    assert "<td>102 (genre 0, genre 1)</td>" in page
