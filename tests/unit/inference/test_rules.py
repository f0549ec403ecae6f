"""Each rule, and all of them together, beside the slow twin, user by user."""

import dataclasses
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bert4rec.config import InferenceConfig, load_config
from bert4rec.data.dataset import ItemTable, Part, Ragged, Sequences
from bert4rec.data.windows import Windows
from bert4rec.errors import InputError
from bert4rec.inference import ranking as ranking_module
from bert4rec.inference.export import ScoringFunction, export_program, write_onnx, write_torch
from bert4rec.inference.item_lists import list_of_items, read_list
from bert4rec.inference.ranking import Exclusions, NextScores, Only, Ranking, score_next, top_k
from bert4rec.inference.recommend import _identity, _open_work, _write_part
from bert4rec.inference.recommender import Ranked, Recommender
from bert4rec.inference.rules import Offer
from bert4rec.inference.selection import Selection, best_list, pick
from tests.helpers.datasets import random_histories
from tests.twins import reference
from tests.twins import rules as twin
from tests.unit.inference.test_blend import blend_of, dense
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = pytest.mark.unit

NUM_USERS = 8
YEARS = [None if item % 7 == 0 else 1990 + item % 10 for item in range(NUM_ITEMS)]
LAST_YEARS = [None if user % 5 == 0 else 1992 + user for user in range(NUM_USERS)]
HISTORIES = [*random_histories(NUM_USERS - 1, NUM_ITEMS, seed=2, longest=9).values(), list(range(1, NUM_ITEMS - 1))]
GENRES = [sorted({item % 3, item % 5 + 1, item % 2 * 4}) if item % 11 else [] for item in range(NUM_ITEMS)]
DIRECTORS = [[item // 4] if item % 6 else [] for item in range(NUM_ITEMS)]


def ragged(rows):
    return Ragged(
        np.array([value for row in rows for value in row], np.int64),
        np.append(0, np.cumsum([len(row) for row in rows])),
    )


ITEMS = ItemTable(
    ids=pa.array([f"film {item}" for item in range(NUM_ITEMS)]),
    count=np.zeros(NUM_ITEMS, np.int64),
    year=np.array([year or 0 for year in YEARS], np.int16),
    has_year=np.array([year is not None for year in YEARS]),
    title=pa.array([f"title {item}" for item in range(NUM_ITEMS)]),
    listed={"genre": (6, ragged(GENRES)), "director": (8, ragged(DIRECTORS)), "writer": (0, ragged([[]] * NUM_ITEMS))},
)
SEQUENCES = Sequences.of(
    pa.array([f"u{user}" for user in range(NUM_USERS)]),
    [np.array(history) for history in HISTORIES],
    pa.array(LAST_YEARS, pa.int16()),
)


@pytest.fixture(scope="module")
def recommender():
    model = make_model()
    model.item_counts += torch.arange(NUM_ITEMS, 0, -1)
    return Recommender(model, ITEMS)


def write_list(path, rows):
    """Rows of items, or of users and items, counted from 0."""
    with_users = bool(rows) and isinstance(rows[0], tuple)
    lines = [f"u{row[0]},film {row[1]}" if with_users else f"film {row}" for row in rows]
    path.write_text("\n".join(["user,item" if with_users else "item", *lines]) + "\n")
    return str(path)


def users_of(recommender, ranking, candidates=(), excluded=()):
    """The twin's users. Lists of users are pairs."""
    plain = dataclasses.replace(ranking, blend=None)
    scores = score_next(recommender.model, Windows.from_sequences(SEQUENCES), plain)(0, NUM_ITEMS).tolist()
    if (blend := ranking.blend) is not None:
        weights = dense(blend.item_weights()).tolist()
        scores = [
            reference.blended(own, weights, history, blend.weight)
            for own, history in zip(scores, HISTORIES, strict=True)
        ]
    users = []
    for user in range(NUM_USERS):
        last = LAST_YEARS[user]
        own = {item for who, item in candidates if who == user}
        users.append(
            twin.User(
                scores=scores[user],
                seen={token - 1 for token in HISTORIES[user]},
                later={item for item in range(NUM_ITEMS) if YEARS[item] and last and YEARS[item] > last},
                candidates=own if any(who == user for who, _ in candidates) else None,
                excluded={item for who, item in excluded if who == user},
            )
        )
    return users


def lists_of(recommender, ranking, k, batch_size=3):
    """What each user gets, [(item, score)]."""
    inference = InferenceConfig(topk=k, batch_size=batch_size)
    rows = [row for batch in recommender.rank(SEQUENCES, inference, ranking) for row in batch.table.to_pylist()]
    found = [[] for _ in range(NUM_USERS)]
    for row in rows:
        found[int(row["user"][1:])].append((int(row["item"][5:]), row["score"]))
        assert row["rank"] == len(found[int(row["user"][1:])])
    return found


def check(recommender, ranking, case, users):
    for user, found in zip(users, lists_of(recommender, ranking, case.k), strict=True):
        assert twin.why_wrong(case, user, [item for item, _ in found]) is None
        written = twin.written_scores(case, user)
        for item, score in found:
            assert score == pytest.approx(written[item], rel=1e-4, abs=1e-5)


ITEM = st.integers(0, NUM_ITEMS - 1)
PAIR = st.tuples(st.integers(0, NUM_USERS - 1), ITEM)
A_LIST = st.one_of(
    st.none(),
    st.lists(ITEM, min_size=1, max_size=NUM_ITEMS, unique=True),
    st.lists(PAIR, min_size=1, max_size=60, unique=True),
)


DRAWN = {
    "exclude_seen": st.booleans(),
    "exclude_future": st.booleans(),
    "popularity_discount": st.sampled_from([0.0, 0.4]),
    "candidates": A_LIST,
    "candidates_default": st.sampled_from(["none", "all"]),
    "exclude": A_LIST,
    "max_per": st.dictionaries(st.sampled_from(["genre", "director"]), st.integers(1, 3), max_size=2),
    "diversity": st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0]),
    "diversity_pool": st.sampled_from([1, 4, 12, 100]),
    "min_score": st.sampled_from([None, None, -0.5, 0.02, 1.0]),
    "scores": st.sampled_from(["logit", "probability"]),
    "blend": st.sampled_from([None, None, "ease", "item-knn"]),
}
"""By rule, its values."""


def test_every_rule_is_drawn():
    assert set(DRAWN) == {rule.name for rule in dataclasses.fields(Ranking)}


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rules=st.fixed_dictionaries(DRAWN),
    k=st.sampled_from([1, 2, 3, 8, NUM_ITEMS]),
    block_bytes=st.sampled_from([2**21, 4 * 3 * 7]),
)
def test_all_rules_together_equal_the_slow_way(recommender, tmp_path_factory, rules, k, block_bytes):
    folder = tmp_path_factory.getbasetemp()
    written = {name: rows for name in ("candidates", "exclude") if (rows := rules[name]) is not None}
    lists = {name: read_list(name, (write_list(folder / f"{name}.csv", rows),)) for name, rows in written.items()}
    blend = rules["blend"] and blend_of(folder, rules["blend"], HISTORIES[:5], 0.8)[0]
    ranking = Ranking(**{**rules, **lists, "blend": blend})
    of_users = {name: rows for name, rows in written.items() if isinstance(rows[0], tuple)}
    for_all = {name: set(rows) for name, rows in written.items() if name not in of_users}
    elsewhere = {"candidates", "exclude", "popularity_discount", "blend"}  # the scores hold the last two already
    case = twin.Case(
        k=k,
        has_users_candidates="candidates" in of_users,
        values={"genre": GENRES, "director": DIRECTORS},
        vectors=recommender.model.items.embedding.weight[1:-1].tolist(),
        **{name: value for name, value in rules.items() if name not in elsewhere},
        **for_all,
    )
    users = users_of(recommender, ranking, of_users.get("candidates", ()), of_users.get("exclude", ()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking_module, "CPU_BLOCK_BYTES", block_bytes)
        check(recommender, ranking, case, users)


def lines(recommender, ranking, k=4):
    """The items that each user gets."""
    return [[item for item, _ in found] for found in lists_of(recommender, ranking, k)]


ANYTHING = Ranking(exclude_seen=False, exclude_future=False)


def test_a_list_for_all_is_all_that_is_scored(recommender, monkeypatch):
    """Cost in proportion: no other item's weights are multiplied."""
    widths = []
    plain = ranking_module.product
    monkeypatch.setattr(
        ranking_module, "product", lambda a, b, *rest, **more: widths.append(len(b)) or plain(a, b, *rest, **more)
    )
    chosen = list_of_items("inference.candidates", [f"film {item}" for item in (3, 17, 20)])
    for found in lines(recommender, dataclasses.replace(ANYTHING, candidates=chosen)):
        assert set(found) == {3, 17, 20}
    assert set(widths) == {3}


def test_users_lists_score_what_somebody_of_the_batch_may_get(recommender, tmp_path, monkeypatch):
    widths = []
    plain = ranking_module.product
    monkeypatch.setattr(
        ranking_module, "product", lambda a, b, *rest, **more: widths.append(len(b)) or plain(a, b, *rest, **more)
    )
    path = write_list(tmp_path / "l.csv", [(0, 5), (0, 9), (1, 9), (4, 2)])
    found = lines(recommender, dataclasses.replace(ANYTHING, candidates=read_list("inference.candidates", (path,))))
    assert [set(each) for each in found] == [{5, 9}, {9}, set(), set(), {2}, set(), set(), set()]
    assert widths == [2, 1]  # batches of three users: items 5 and 9, item 2, none


def test_a_user_whose_list_names_only_unknown_items_gets_nothing(recommender, tmp_path):
    """Even where users without a list get everything: the user has one."""
    (tmp_path / "l.csv").write_text("user,item\nu0,film 5\nu1,unheard of\n")
    ranking = Ranking(candidates=read_list("c", (str(tmp_path / "l.csv"),)), candidates_default="all")
    found = lines(recommender, ranking)
    assert found[1] == []
    assert set(found[0]) <= {5}
    assert len(found[2]) == 4


def test_no_rule_gives_the_files_of_before_to_the_last_byte(recommender, tmp_path):
    """Beside what `rank` did before there were rules: the same table in the same format, and the same identity."""
    inference, ranking = InferenceConfig(topk=6, batch_size=3), Ranking()
    windows, before = Windows.from_sequences(SEQUENCES), []
    for users in torch.split(torch.arange(NUM_USERS), 3):
        histories = windows.users(users)
        scores = score_next(recommender.model, histories, ranking)
        values, items = top_k(scores, ranking.exclusions(histories, ITEMS, SEQUENCES, users), len(users), NUM_ITEMS, 6)
        found = torch.isfinite(values)
        row, place = torch.nonzero(found, as_tuple=True)
        table = {
            "user": SEQUENCES.users.take(pa.array(users[row].numpy())),
            "item": ITEMS.ids.take(pa.array(items[found].numpy())),
            "rank": (place + 1).to(torch.int32).numpy(),
            "score": values[found].numpy(),
        }
        num_found = found.sum(1)
        counts = int((num_found < 6).sum()), int((num_found == 0).sum())
        before.append(Ranked(pa.table(table), len(users), *counts))
    off = Ranking(diversity=0.0, diversity_pool=3, max_per={}, min_score=None, scores="logit")
    part = Part(0, 0, NUM_USERS)
    for name, ranked in {
        "before": before,
        "now": list(recommender.rank(SEQUENCES, inference, ranking)),
        "off": list(recommender.rank(SEQUENCES, inference, off)),
    }.items():
        _write_part(_open_work(str(tmp_path / name), {}), part, ranked, inference)
    files = ["part-00000.csv", "part-00000.json", "recommendations.parquet/part-00000.parquet"]
    for file in files:
        contents = {(tmp_path / name / "_unfinished" / file).read_bytes() for name in ("before", "now", "off")}
        assert len(contents) == 1, file
    recommender.model.save_pretrained(str(tmp_path / "m"))
    assert json.dumps(_identity(str(tmp_path / "m"), InferenceConfig(), ranking)["settings"]) == (
        '{"topk": 10, "batch_size": 512, "score_memory_mb": 256, "exclude_seen": true, "exclude_future": true, '
        '"popularity_discount": 0.0, "formats": ["parquet", "csv"]}'
    )


def test_max_per_by_hand():
    """Two of a value at most; the list goes on further down, and ends where nothing is left."""
    values = torch.tensor([[9.0, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 6]]).sort(descending=True, dim=1).values
    items = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    genres = ragged([[0], [0, 1], [0], [1], [], [1]])
    table = dataclasses.replace(ITEMS, listed={"genre": (2, genres)})
    for cap, expected in ((1, [0, 3, 4, -1]), (2, [0, 1, 3, 4]), (3, [0, 1, 2, 3])):
        selection = Selection.of(Ranking(max_per={"genre": cap}), table)
        assert pick(values, items, 4, selection, None).tolist() == [expected, expected]


def test_diversity_by_hand():
    """d = 0.5, over a pool of scores 1, 0.8 and 0, so r = 1, 0.8 and 0. Item 0 first; then item 1, like it, has
    0.5 * 0.8 - 0.5 * 1 = -0.1, and item 2, unlike it, 0. Item 3 is behind the pool."""
    values = torch.tensor([[1.0, 0.8, 0.0, -0.1]])
    vectors = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [-1, 0]]])
    selection = Selection.of(Ranking(diversity=0.5, diversity_pool=3), ITEMS)
    assert pick(
        values, torch.tensor([[0, 1, 2, 3]]), 4, selection, lambda items: vectors[:, : items.shape[1]]
    ).tolist() == [[0, 2, 1, 3]]


def test_probabilities_sum_to_one_over_what_a_user_may_get(recommender):
    ranking = Ranking(scores="probability")
    for found in lists_of(recommender, ranking, NUM_ITEMS):
        assert sum(score for _, score in found) == pytest.approx(1, abs=1e-5)
    above = lists_of(recommender, dataclasses.replace(ranking, min_score=0.05), NUM_ITEMS)
    assert 0 < sum(len(found) for found in above) < NUM_USERS * 20
    assert min(score for found in above for _, score in found) >= 0.05


def test_which_items_are_excluded_is_what_apply_excludes():
    generator = torch.Generator().manual_seed(0)
    row, item = (torch.randint(0, high, (25,), generator=generator) for high in (6, 9))
    exclusions = Exclusions(
        row[:10],
        item[:10],
        torch.arange(9, dtype=torch.int32),
        torch.tensor([3, 9, 9, 5, 8, 9], dtype=torch.int32),
        torch.arange(9) == 4,
        Only(row[10:], item[10:], torch.tensor([True, False, True, True, False, True])),
    )
    block = exclusions.apply(torch.zeros(6, 9))
    for number in range(9):
        assert exclusions.has(torch.full((6,), number)).tolist() == (block[:, number] == -torch.inf).tolist()
    columns, users = torch.tensor([1, 2, 5, 8]), torch.tensor([0, 2, 5])
    assert torch.equal(exclusions.within(columns).apply(torch.zeros(6, 4)), block[:, columns])
    assert torch.equal(exclusions.of_users(users).apply(torch.zeros(3, 9)), block[users])


BAD_LISTS = {
    "user,film\nu1,film 3\n": r"l\.csv: no column item; found user, film; expected item",
    "": r"l\.csv: the file is empty; expected a header with the columns item",
    "item\n": r"l\.csv: no data rows; expected an item in each row",
    "user,item\n": r"l\.csv: no data rows; expected a user and an item in each row",
    'item,x\n"",1\nfilm 3,2\n': r"l\.csv, data row 1: item is missing",
    "user,item\nu1,film 3\nu1,film 4\nu1,film 3\n": r"user 'u1' has item 'film 3' twice; expected each item of",
    "user,item\nu1,film 3\n,film 4\n": r"l\.csv, line 3: user is missing",
    "item\nnothing\nelse\n": r"l\.csv: none of its 2 items is in the catalogue, which has 30 items, such as 'film 0'",
    "item,x\nfilm 3\n": r"l\.csv: not readable as CSV",
}


@pytest.mark.parametrize("content", BAD_LISTS)
@pytest.mark.parametrize("key", ["candidates", "exclude"])
def test_an_unusable_list_is_one_line(recommender, tmp_path, content, key):
    (tmp_path / "l.csv").write_text(content)
    with pytest.raises(InputError, match=BAD_LISTS[content]) as error:
        lines(recommender, Ranking.of(InferenceConfig(**{key: str(tmp_path / "l.csv")})))
    assert "\n" not in str(error.value)


def test_other_unusable_rules_are_one_line(recommender, tmp_path):
    for override, message in {
        "inference.max_per={gener: 2}": r"max_per: no feature 'gener'; expected one of genre, director, writer",
        "inference.max_per={genre: 0}": r"inference\.max_per\.genre='0': Input should be greater than 0",
        "inference.candidates=[]": r"inference\.candidates=\[\]",
        "inference.candidates=/nowhere/l.csv": r"/nowhere/l\.csv: no such file",
        f"inference.exclude={tmp_path}/*.csv": r"\*\.csv: no such file; the directory holds",
        "inference.max_per={writer: 2}": r"max_per: writer: no item of the data has any",
        "inference.diversity=2": r"less than or equal to 1",
    }.items():
        with pytest.raises(InputError, match=message):
            lines(recommender, Ranking.of(load_config(None, [override]).inference))
    (tmp_path / "a.csv").write_text("item\nfilm 1\n")
    (tmp_path / "b.csv").write_text("user,item\nu1,film 1\n")
    with pytest.raises(InputError, match=r"a\.csv: no column user, which .*b\.csv has"):
        read_list("inference.exclude", (f"{tmp_path}/*.csv",))


def test_lists_count_by_their_content(tmp_path):
    (tmp_path / "a.csv").write_text("item\nfilm 1\n")
    (tmp_path / "b.csv").write_text("item\nfilm 1\n")
    a, b = (Ranking.of(InferenceConfig(exclude=(str(tmp_path / name),))) for name in ("a.csv", "b.csv"))
    assert a.identity() == b.identity()
    (tmp_path / "b.csv").write_text("item\nfilm 2\n")
    assert a.identity() != Ranking.of(InferenceConfig(exclude=(str(tmp_path / "b.csv"),))).identity()
    assert a.identity() != Ranking.of(InferenceConfig(candidates=(str(tmp_path / "a.csv"),))).identity()


def test_lists_from_parquet_and_compressed_csv(tmp_path):
    pq.write_table(pa.table({"item": ["film 1", "film 2"]}), tmp_path / "a.parquet")
    with gzip.open(tmp_path / "b.csv.gz", "wt") as file:
        file.write('item,since\n"film 3",1999\n')
    given_list = read_list("inference.exclude", (f"{tmp_path}/a.parquet", f"{tmp_path}/*.gz"))
    assert given_list.ids.to_pylist() == ["film 1", "film 2", "film 3"]
    places, note = given_list.places(ITEMS)
    assert places.tolist() == [1, 2, 3]
    assert note is None


def many(recommender, **given_items):
    histories = [[f"film {token - 1}" for token in history] for history in HISTORIES]
    frame = recommender.recommend_many(histories, topk=5, last_years=LAST_YEARS, batch_size=3, **given_items)
    assert list(frame.columns) == ["history", "rank", "item", "title", "score"]
    assert (frame["title"] == "title " + frame["item"].str[5:]).all()
    return [[int(item[5:]) for item in frame[frame["history"] == user]["item"]] for user in range(NUM_USERS)]


def test_many_histories_get_what_users_get(recommender):
    assert many(recommender) == lines(recommender, Ranking(), 5)
    without = list_of_items("exclude", ["film 3", "film 8"])
    assert many(recommender, exclude={"film 8", "film 3"}) == lines(recommender, Ranking(exclude=without), 5)
    own = [{f"film {item}" for item in range(user, 30, 3)} for user in range(NUM_USERS)]
    own[6] = set()
    for name, is_allowed in (("candidates", lambda user, item: f"film {item}" in own[user]), ("exclude", None)):
        found = many(recommender, **{name: own})
        users = users_of(recommender, Ranking())
        for user, listed in enumerate(found):
            outside = {item for item in range(NUM_ITEMS) if f"film {item}" not in own[user]}
            users[user].excluded = outside if is_allowed else set(range(NUM_ITEMS)) - outside
            assert twin.why_wrong(twin.Case(k=5), users[user], listed) is None


def test_many_histories_wrongly_asked_are_one_line(recommender, tmp_path):
    (tmp_path / "l.csv").write_text("user,item\nu1,film 3\n")
    of_users = Ranking(exclude=read_list("inference.exclude", (str(tmp_path / "l.csv"),)))
    for arguments, message in (
        ({"histories": [["film 1"], []]}, "history 1 is empty"),
        ({"histories": [["film 1"]], "exclude": [{"film 1"}, {"film 2"}]}, "exclude: 2 collections for 1 histories"),
        ({"histories": [["film 1"]], "candidates": {"film 99"}}, "not in the catalogue: item 'film 99'"),
        ({"histories": [["film 1"]], "last_years": [1, 2]}, "last_years: 2 values for 1 histories"),
        ({"histories": [["film 1"]], "ranking": of_users}, "has a list for each user, and a history has no user"),
        ({"histories": [["film 1"]], "topk": 31}, "expected 1 to 30"),
    ):
        with pytest.raises(InputError, match=message):
            recommender.recommend_many(**arguments)
    assert len(recommender.recommend_many([])) == 0


PROGRAMS = {
    "caps": {"max_per": {"genre": 1, "director": 1}},
    "diversity": {"diversity": 0.6, "diversity_pool": 12},
    "diversity, caps": {"diversity": 0.6, "diversity_pool": 6, "max_per": {"genre": 2}},
    "probability": {"min_score": 0.05, "scores": "probability", "exclude": list_of_items("e", ["film 3", "film 8"])},
    "list for all": {"candidates": list_of_items("c", [f"film {item}" for item in range(0, 30, 2)])},
}
PADDED = torch.tensor([[0] * (28 - len(own)) + own for own in HISTORIES])


def check_program(recommender, ranking, k, values, tokens):
    for user, found in enumerate(lists_of(recommender, ranking, k)):
        kept = torch.isfinite(values[user])
        assert (tokens[user][kept] - 1).tolist() == [item for item, _ in found]
        assert values[user][kept].tolist() == pytest.approx([score for _, score in found], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("rules", PROGRAMS)
def test_programs_make_the_lists_of_the_batch_job(recommender, rules):
    ranking = Ranking(exclude_future=False, **PROGRAMS[rules])
    with torch.inference_mode():
        check_program(recommender, ranking, 8, *ScoringFunction(recommender.model, 8, ranking, ITEMS).eval()(PADDED))


def test_written_programs_hold_the_rules(recommender, tmp_path):
    rules = PROGRAMS["diversity"] | PROGRAMS["probability"] | {"max_per": {"director": 1}}
    ranking = Ranking(exclude_future=False, **rules)
    program = export_program(ScoringFunction(recommender.model, 2, ranking, ITEMS))
    check_program(recommender, ranking, 2, *torch.export.load(write_torch(program, str(tmp_path))).module()(PADDED))
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(write_onnx(program, str(tmp_path)), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"history": PADDED.numpy()})
    check_program(recommender, ranking, 2, *(torch.from_numpy(output) for output in outputs))


def test_a_program_refuses_lists_of_users(recommender, tmp_path):
    (tmp_path / "l.csv").write_text("user,item\nu1,film 3\n")
    ranking = Ranking.of(InferenceConfig(candidates=str(tmp_path / "l.csv")))
    with pytest.raises(
        InputError, match=r"candidates: .*l\.csv: has a list for each user, and a program knows no users"
    ):
        ScoringFunction(recommender.model, 3, ranking, ITEMS)


@pytest.mark.parametrize("block_bytes", [2**21, 4 * 2 * 7])
@pytest.mark.parametrize("diversity", [0.0, 0.4])
def test_a_capped_list_goes_on_beyond_what_was_ranked_first(monkeypatch, block_bytes, diversity):
    """The first 25 items share a genre, so that a list of three needs items behind the first fifteen (or the pool)."""
    monkeypatch.setattr(ranking_module, "CPU_BLOCK_BYTES", block_bytes)
    for shared, expected in ((25, [0, 25, 26]), (29, [0, 29]), (30, [0])):
        genres = ragged([[0]] * shared + [[] for _ in range(NUM_ITEMS - shared)])
        table = dataclasses.replace(ITEMS, listed={"genre": (1, genres)})
        selection = Selection.of(Ranking(max_per={"genre": 1}, diversity=diversity, diversity_pool=4), table)
        scores = NextScores(torch.tensor([[1.0], [2.0]]), -torch.arange(30.0)[:, None], torch.zeros(30))
        offer = Offer(None, NUM_ITEMS, Exclusions.of(None))
        values, items = best_list(scores, offer, 3, selection, lambda items: torch.ones(*items.shape, 1))
        for user, factor in enumerate((1, 2)):
            kept = torch.isfinite(values[user])
            assert items[user][kept].tolist() == expected
            assert values[user][kept].tolist() == [-factor * item for item in expected]
