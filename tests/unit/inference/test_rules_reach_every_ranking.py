"""Every rule of `Ranking` reaches whatever ranks: through the jobs' own functions, in this process."""

from dataclasses import fields

import pyarrow.parquet as pq
import pytest
import torch

from bert4rec.config import InferenceConfig, load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.windows import Windows, held_out_users
from bert4rec.errors import InputError
from bert4rec.evaluation import evaluate
from bert4rec.inference import recommend
from bert4rec.inference.ranking import Ranking
from bert4rec.inference.recommender import Recommender
from bert4rec.inference.rules import Rules
from bert4rec.report import page
from bert4rec.training.loop import Worker, validate
from bert4rec.training.train import validation_rules, what_shapes_the_result
from jobs import recommend as few
from tests.helpers.datasets import random_histories, write_dataset
from tests.helpers.in_process import exported, without_ray
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = pytest.mark.unit

HISTORIES = random_histories(30, NUM_ITEMS, seed=3, longest=20)
YEARS = [1990 + token % 10 for token in range(1, NUM_ITEMS + 1)]
LAST_YEARS = [1990 + user % 10 for user in range(30)]
EVERYWHERE = {"all users", "a few users", "new users", "one history", "evaluation", "programs", "report"}

LISTS_OF_USERS = ("inference.candidates=OF_USERS",)
DIVERSE = ("inference.diversity=0.9",)

# Of each rule a value that is not the default, what it changes, and what both values need beside it. Evaluation has
# exclude_seen of its own, and ranks among what the others allow with evaluation.candidates only; a program knows no
# years. Scores change no evaluation. Nobody has a row in OF_USERS but the data's users.
RULES = {
    "exclude_seen": ("false", EVERYWHERE - {"evaluation"}, ()),
    "exclude_future": ("false", EVERYWHERE - {"evaluation", "programs"}, ()),
    "popularity_discount": ("0.9", EVERYWHERE, ()),
    "blend": ("{ease: 0.9}", EVERYWHERE - {"programs"}, ()),
    "candidates": ("FOR_ALL", EVERYWHERE - {"evaluation"}, ()),
    "candidates_default": ("all", {"all users", "report"}, LISTS_OF_USERS),
    "exclude": ("EVEN", EVERYWHERE - {"evaluation"}, ()),
    "max_per": ("{genre: 1}", EVERYWHERE, ()),
    "diversity": ("0.9", EVERYWHERE, ()),
    "diversity_pool": ("4", EVERYWHERE, DIVERSE),
    "min_score": ("3", EVERYWHERE, ()),
    "scores": ("probability", EVERYWHERE - {"evaluation"}, ()),
}
OTHERWISE = {"exclude_seen", "candidates_default", "scores"}
"""evaluation.exclude_seen; a choice between users in and outside of a list; what is written."""
OBEYED = {rule for rule, (_, changes, _) in RULES.items() if "evaluation" not in changes} - OTHERWISE
"""Rules that evaluation obeys with evaluation.candidates=true only."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Overrides under which the jobs find a model and a dataset."""
    without_ray(monkeypatch, recommend, evaluate)
    (tmp_path / "for_all.csv").write_text("item\n" + "".join(f"{100 + token}\n" for token in range(3, NUM_ITEMS, 3)))
    (tmp_path / "even.csv").write_text("item\n" + "".join(f"{100 + token}\n" for token in range(2, NUM_ITEMS, 2)))
    pairs = [(user, 101 + (user * item) % NUM_ITEMS) for user in range(1, 28) for item in range(1, 7)]
    (tmp_path / "of_users.csv").write_text("user,item\n" + "".join(f"{u},{i}\n" for u, i in sorted(set(pairs))))
    settings = [f"run.storage_path={tmp_path}", "inference.topk=4", "inference.formats=[parquet]", "export.topk=4"]
    settings += ["data.data_dir=/d", f"inference.checkpoint_path={tmp_path / 'run' / 'm'}"]
    path = load_config(None, settings).prepared_path
    (tmp_path / "prepared").mkdir()
    genres = [[token % 3] for token in range(NUM_ITEMS)]
    write_dataset(
        tmp_path / "prepared" / path.rpartition("/")[2], HISTORIES, NUM_ITEMS, YEARS, LAST_YEARS, genres=genres
    )
    model = make_model()
    model.catalogue, model.held_out = "test", 1
    model.item_counts += torch.arange(NUM_ITEMS, 0, -1) ** 2
    model.save_pretrained(str(tmp_path / "run" / "m"))
    (tmp_path / "run" / "m" / "items.parquet").write_bytes((tmp_path / path / "items.parquet").read_bytes())
    (tmp_path / "new.csv").write_text("user,item,time\n" + "".join(f"1,{item},800000000\n" for item in range(101, 119)))
    return settings


def rows_of(directory):
    return pq.read_table(f"{directory}/recommendations.parquet").to_pylist()


def everything(settings, tmp_path, name, where=EVERYWHERE):
    """What each of `where` gives."""
    config = load_config(None, settings)
    (checkpoint,), path = config.inference.checkpoint_path, config.prepared_path
    dataset, found = PreparedDataset(path), {}
    ranking = Ranking.of(config.inference)
    recommend.recommend(config, path, checkpoint, str(tmp_path / name / "all"))
    found["all users"] = rows_of(tmp_path / name / "all")
    for what, more in {
        "a few users": "inference.users=[1, 2, 3, 4, 5, 6]",
        "new users": f"inference.users_file={tmp_path / 'new.csv'}",
    }.items():
        output = tmp_path / name / what
        few.recommend_users(load_config(None, [*settings, more, f"inference.output_path={output}"]))
        found[what] = rows_of(output)
    model = recommend.read_model(checkpoint)
    history = [100 + token for token in HISTORIES[1]]
    if "one history" in where:
        recommender = Recommender(model, dataset.items(), checkpoint)
        found["one history"] = recommender.recommend(history, topk=4, last_year=1992, ranking=ranking).to_dict()
    result = evaluate.evaluate(config, path, checkpoint)
    found["evaluation"] = result.protocols, result.beyond_accuracy
    if "programs" in where:
        found["programs"] = exported(config, checkpoint, [torch.tensor([[0, 3, 5], [9, 8, 7]])])
    # of the same recommendations: what differs is what the page says of the rules
    same = f"{tmp_path / 'before' / 'all'}/recommendations.parquet"
    given = page.Recommendations(same, config.inference.model_dump(), num_short_users=0)
    lines = page.render(config, dataset, "run", None, None, given).splitlines()
    found["report"] = [line for line in lines if "<td>inference." not in line]  # but for the table of all settings
    return found


def test_every_rule_is_a_key_and_has_an_entry():
    names = [rule.name for rule in fields(Ranking)]
    assert set(RULES) == set(names), f"say in RULES of {__file__} what the rule changes"
    assert set(names) <= set(InferenceConfig.model_fields)
    assert Ranking.of(InferenceConfig()) == Ranking()


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_changes_every_ranking_that_it_is_for(rule, place, tmp_path):
    value, changes, beside = RULES[rule]
    files = {name: str(tmp_path / f"{name.lower()}.csv") for name in ("FOR_ALL", "EVEN", "OF_USERS")}
    base = [*place, *(f"{key}={files.get(to, to)}" for key, _, to in (each.partition("=") for each in beside))]
    where = EVERYWHERE - {"one history", "programs"} if beside == LISTS_OF_USERS else EVERYWHERE
    where = where - {"programs"} if rule == "blend" else where  # they refuse it
    before = everything(base, tmp_path, "before", where)
    after = everything([*base, f"inference.{rule}={files.get(value, value)}"], tmp_path, "after", where)
    assert set(before) == where
    assert {what for what in before if before[what] != after[what]} == changes


@pytest.mark.parametrize("rule", sorted(OBEYED))
def test_evaluation_obeys_on_request(rule, place, tmp_path):
    base = [*place, "evaluation.candidates=true", "evaluation.protocols=[all, uniform-100]"]
    value = RULES[rule][0]
    value = str(tmp_path / f"{value.lower()}.csv") if value in ("FOR_ALL", "EVEN") else value
    before, after = (
        evaluate.evaluate(config := load_config(None, each), config.prepared_path, config.inference.checkpoint_path[0])
        for each in (base, [*base, f"inference.{rule}={value}"])
    )
    for protocol in ("all", "uniform-100"):
        assert before.protocols[protocol] != after.protocols[protocol]
    assert before.num_excluded_targets != after.num_excluded_targets
    assert before.beyond_accuracy != after.beyond_accuracy


def test_a_rule_that_cannot_be_made_is_told_before_any_work(place, tmp_path, monkeypatch):
    config = load_config(None, place)

    def fail(inference):
        raise InputError("no such file")

    monkeypatch.setattr(Ranking, "of", fail)
    with pytest.raises(InputError, match="no such file"):
        recommend.check_request(config.inference, PreparedDataset(config.prepared_path), str(tmp_path / "out"))


def test_a_list_is_compared_with_the_catalogue_before_any_work(place, tmp_path):
    """What is not in the catalogue is told; a list of nothing else is refused by both jobs."""
    config = load_config(None, place)
    dataset, output = PreparedDataset(config.prepared_path), str(tmp_path / "out")
    (tmp_path / "some.csv").write_text("item\n101\n999\n")
    (tmp_path / "none.csv").write_text("item\n998\n999\n")
    some, none = (InferenceConfig(candidates=[str(tmp_path / name)]) for name in ("some.csv", "none.csv"))
    (note,) = recommend.check_request(some, dataset, output)
    assert "999" in note
    assert "some.csv" in note
    with pytest.raises(InputError, match=r"none\.csv"):
        recommend.check_request(none, dataset, output)
    settings = [*place, f"inference.candidates={tmp_path / 'none.csv'}"]
    with pytest.raises(InputError, match=r"none\.csv"):
        evaluate.evaluate(load_config(None, settings), dataset.path, config.inference.checkpoint_path[0])


def test_a_rule_counts_by_its_content(place):
    """Where a rule is read from a file, another content under the same path makes recommendations anew."""
    config = load_config(None, place)
    of = [
        recommend._identity(config.inference.checkpoint_path[0], config.inference, each)
        for each in (Ranking(popularity_discount=0.1), Ranking(popularity_discount=0.2))
    ]
    assert of[0] != of[1]


@pytest.mark.parametrize(
    "rules",
    [
        ["inference.candidates=for_all.csv"],
        ["inference.candidates=of_users.csv", "inference.candidates_default=all"],
        ["inference.exclude=even.csv"],
        ["evaluation.exclude_seen=false"],  # of later releases
    ],
)
def test_validation_in_training_ranks_as_evaluation_does(rules, place, tmp_path):
    model = make_model()
    model.catalogue, model.held_out = "test", 2
    model.save_pretrained(str(tmp_path / "held_out"))
    settings = [*place, "evaluation.candidates=true", "evaluation.split=validation", "data.holdout=2"]
    config = load_config(None, settings + [_with_path(each, tmp_path) for each in rules])
    path = config.prepared_path
    evaluated = evaluate.evaluate(config, path, str(tmp_path / "held_out")).protocols
    (expected,) = (of_systems["BERT4Rec"] for of_systems in evaluated.values())
    dataset = PreparedDataset(path)
    read = dataset.sequences()
    windows, rules_there = Windows.from_sequences(read), Rules(validation_rules(config), dataset.items())
    found = validate(model, windows, config, ruled=(rules_there, read))
    assert {name: found[f"val_{name}"] for name in expected} == pytest.approx(expected)
    assert validate(model, windows, config) != pytest.approx(found)

    shares = [validate(model, windows, config, Worker(rank, 2), ruled=(rules_there, read)) for rank in range(2)]
    sizes = [len(part) for part in held_out_users(windows, config.data, "validation").tensor_split(2)]
    assert sum(size * own["val_ndcg@10"] for size, own in zip(sizes, shares, strict=True)) == pytest.approx(
        sum(sizes) * found["val_ndcg@10"]
    )


def _with_path(setting, directory):
    key, _, value = setting.partition("=")
    return f"{key}={directory / value}" if value.endswith(".csv") else setting


def test_another_list_is_another_run(place, tmp_path):
    settings = [*place, "evaluation.candidates=true", f"inference.exclude={tmp_path / 'even.csv'}"]
    before = what_shapes_the_result(load_config(None, settings))
    (tmp_path / "even.csv").write_text("item\n102\n")
    assert what_shapes_the_result(load_config(None, settings)) != before
    assert "rules of the validation" not in what_shapes_the_result(load_config(None, place))
