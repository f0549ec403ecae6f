"""When recommendations are asked for: everything that recommends, against the slow way."""

import pyarrow.parquet as pq
import pytest

from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.inference import recommend
from bert4rec.inference.ranking import NO_RULES, load_for
from bert4rec.inference.recommender import Recommender
from bert4rec.training.train import check_times
from jobs import recommend as few
from tests.helpers.datasets import random_histories, random_times, write_dataset
from tests.helpers.in_process import without_ray
from tests.twins import reference
from tests.unit.model.test_network import NUM_ITEMS, make_model
from tests.unit.model.test_times import timed_model

pytestmark = pytest.mark.unit

HISTORIES = random_histories(30, NUM_ITEMS, seed=3, longest=20)
TIMES = random_times(HISTORIES)
LAST = max(times[-1] for times in TIMES.values())
YEARS = [2001 + token for token in range(1, NUM_ITEMS + 1)]
LAST_YEARS = [int(reference.datetime.fromtimestamp(times[-1], reference.UTC).year) for times in TIMES.values()]
AT = 1_767_225_600  # 2026-01-01


class Place:
    """A dataset and a model, where the jobs find them."""

    def __init__(self, root, encoding):
        self.root = root
        self.settings = [f"run.storage_path={root}", "inference.topk=5", "inference.formats=[parquet]"]
        self.settings += ["data.data_dir=/d", f"inference.checkpoint_path={root / 'run' / 'm'}"]
        self.path = load_config(None, self.settings).prepared_path
        (root / "prepared").mkdir()
        write_dataset(root / "prepared" / self.path.rpartition("/")[2], HISTORIES, NUM_ITEMS, YEARS, times=TIMES)
        self.model = timed_model(encoding) if encoding else make_model()
        self.model.catalogue = "test"
        self.checkpoint = str(root / "run" / "m")
        self.model.save_pretrained(self.checkpoint)

    def all_users(self, name, *overrides):
        config = load_config(None, [*self.settings, *overrides])
        recommend.recommend(config, self.path, self.checkpoint, str(self.root / name))
        return self.rows(name)

    def few_users(self, name, *overrides):
        output = f"inference.output_path={self.root / name}"
        few.recommend_users(load_config(None, [*self.settings, output, *overrides]))
        return self.rows(name)

    def rows(self, name):
        found = {}
        for row in pq.read_table(self.root / name / "recommendations.parquet").to_pylist():
            found.setdefault(row["user"], []).append((row["item"], pytest.approx(row["score"], rel=1e-4, abs=1e-5)))
        return found

    def expected(self, user, at):
        times = TIMES[user] if self.model.times is not None else None
        last_year = LAST_YEARS[user - 1]
        best = reference.recommendations(self.model, HISTORIES[user], 5, YEARS, last_year, times=times, at=at)
        return [(100 + token, score) for token, score in best]


@pytest.fixture
def place(tmp_path, monkeypatch):
    without_ray(monkeypatch, recommend)
    return Place(tmp_path, "rotary+gap+bias+calendar")


@pytest.fixture
def place_without(tmp_path, monkeypatch):
    """The model reads no times."""
    without_ray(monkeypatch, recommend)
    return Place(tmp_path, None)


def test_all_users_are_asked_at_one_moment(place):
    """By default at the last interaction of the data; exclude_future goes by the year of the same moment."""
    for name, override, at in (("default", [], LAST), ("new year", ["inference.at=2026-01-01"], AT)):
        rows = place.all_users(name, *override)
        for user in HISTORIES:
            assert rows.get(user, []) == place.expected(user, at), (name, user)
    assert place.rows("default") != place.rows("new year")


def test_a_few_users_get_what_all_get(place):
    for name, override in (("default", []), ("new year", ["inference.at=2026-01-01"])):
        rows = place.all_users(name, *override)
        chosen = place.few_users(f"few {name}", "inference.users=[3, 4, 17]", *override)
        assert chosen == {user: rows[user] for user in (3, 4, 17)}


def test_new_users_of_a_file_and_one_history(place):
    lines = [
        f"{user},{100 + token},{time}.75"
        for user in (3, 4)
        for token, time in zip(HISTORIES[user], TIMES[user], strict=True)
    ]
    (place.root / "new.csv").write_text("\n".join(["user,item,time", *lines]))
    file = f"inference.users_file={place.root / 'new.csv'}"
    last = max(TIMES[3][-1], TIMES[4][-1])  # of the file, not of the data
    recommender = Recommender(place.model, PreparedDataset(place.path).items())
    for name, override, at in (("default", [], last), ("new year", ["inference.at=2026-01-01"], AT)):
        rows = place.few_users(name, file, *override)
        assert rows == {user: place.expected(user, at) for user in (3, 4)}
        history = [100 + token for token in HISTORIES[3]]
        one = recommender.recommend(history, 5, times=TIMES[3], at=at)
        assert list(zip(one["item"], one["score"], strict=True)) == rows[3]
    place.model.times.usual_gap.fill_(77)
    assert recommender.recommend(history, 5, times=TIMES[3]).equals(
        recommender.recommend(history, 5, times=TIMES[3], at=TIMES[3][-1] + 77)
    )
    by_text = recommender.recommend([101, 102], 5, times=["2025-12-31", "2025-12-31T10:00+01:00"], at="2026-01-01")
    assert by_text.equals(recommender.recommend([101, 102], 5, times=[AT - 86_400, AT - 54_000], at=AT))
    early = recommender.recommend([101, 102], 5, times=[AT - 86_400, AT - 54_000], at=AT, last_year=2010)
    assert not set(early["item"]) & {100 + token for token in range(1, NUM_ITEMS + 1) if YEARS[token - 1] > 2010}


def test_without_times_the_moment_is_for_later_releases_alone(place_without):
    rows, later = place_without.all_users("default"), place_without.all_users("at", "inference.at=2026-01-01")
    for user in HISTORIES:
        assert rows.get(user, []) == place_without.expected(user, None)
        assert later.get(user, []) == place_without.expected(user, AT)
    assert place_without.few_users("few", "inference.users=[3]", "inference.at=2026-01-01") == {3: later[3]}


def test_results_of_another_moment_are_made_again(place, capsys, monkeypatch):
    place.all_users("out", "inference.at=2026-01-01")
    capsys.readouterr()
    place.all_users("out", "inference.at=1767225600")
    assert "is up to date" in capsys.readouterr().out
    monkeypatch.setattr("bert4rec.inference.moment.time.time", lambda: AT + 86_400.5)
    rows = place.all_users("out", "inference.at=now")
    assert "is up to date" not in capsys.readouterr().out
    assert rows[3] == place.expected(3, AT + 86_400)


def test_bad_times_are_one_message(place, tmp_path):
    early = (
        r"asked for at 2001-09-09T01:46:40Z \(inference.at\), before an interaction of 20\d\d-.*; expected no earlier"
    )
    with pytest.raises(InputError, match=early):
        place.all_users("out", "inference.at=1000000000")
    with pytest.raises(InputError, match=early):
        place.few_users("out", "inference.at=1000000000", "inference.users=[3, 4]")
    (tmp_path / "new.csv").write_text("user,item\n1,101\n")
    with pytest.raises(InputError, match=r"new\.csv: no column time, which the model needs \(model\.time_encoding\)"):
        place.few_users("out", f"inference.users_file={tmp_path / 'new.csv'}")
    recommender = Recommender(place.model, PreparedDataset(place.path).items())
    for more, problem in (
        ({}, "this model reads times .*; expected times=, one for each item"),
        ({"times": [1]}, "times: 1 for a history of 2 items"),
        ({"times": [5, 4]}, "times: 5 stands before 4; expected the latest last"),
        ({"times": [5, "x"]}, "times: 'x' is no time"),
        ({"times": [5, 6], "at": 5}, "asked for at 1970-01-01T00:00:05Z"),
        ({"times": [5, 6], "at": "soon"}, "at: 'soon' is no time"),
    ):
        with pytest.raises(InputError, match=problem):
            recommender.recommend([101, 102], **more)


def test_data_without_times_or_with_one_time_are_refused(place, tmp_path):
    config = load_config(None, ["model.time_encoding=gap"])
    dataset = PreparedDataset(write_dataset(tmp_path / "without", HISTORIES, NUM_ITEMS))
    missing = "without: the interactions have no column time, which model.time_encoding needs"
    with pytest.raises(InputError, match=missing):
        check_times(config, dataset)
    with pytest.raises(InputError, match=missing):
        load_for(dataset, place.checkpoint, NO_RULES)
    times = {user: [7] * len(items) for user, items in HISTORIES.items()}
    dataset = PreparedDataset(write_dataset(tmp_path / "same", HISTORIES, NUM_ITEMS, times=times))
    with pytest.raises(InputError, match="same: all interactions have the same time, 7; expected different times"):
        check_times(config, dataset)
    check_times(load_config(None, []), dataset)
