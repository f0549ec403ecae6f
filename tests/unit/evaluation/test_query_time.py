"""When a model that reads times is asked for the held-out item, and that nothing later than it is known."""

import math

import pytest

from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.windows import Windows
from bert4rec.evaluation import evaluate
from bert4rec.training.loop import validate
from jobs import evaluate as job
from tests.helpers.datasets import random_histories, random_times, write_dataset
from tests.helpers.in_process import without_ray
from tests.helpers.trainer import run
from tests.twins import reference
from tests.unit.model.test_network import NUM_ITEMS
from tests.unit.model.test_times import timed_model

pytestmark = pytest.mark.unit

HISTORIES = random_histories(30, NUM_ITEMS, seed=4, longest=16)
TIMES = random_times(HISTORIES)
BEFORE = {
    "recent_validation": [0] * 30,
    "validation": [len(items) // 2 for items in HISTORIES.values()],
    "recent_test": [0] * 30,
    "recent_last": [0] * 30,
    "test": [-(-3 * len(items) // 4) for items in HISTORIES.values()],
}
SPLITS = {
    "leave-one-out": ["data.holdout=2"],
    "temporal": ["data.split=temporal"],
}


def targets(split):
    """(user, place of the target in the history) of each user who has one for the validation."""
    for place, (user, items) in enumerate(HISTORIES.items()):
        if split == "temporal":
            known, until = BEFORE["validation"][place], BEFORE["test"][place]
            if known >= 3 and until > known:
                yield user, known
        elif len(items) >= 3:
            yield user, len(items) - 2


@pytest.mark.parametrize("split", SPLITS)
def test_a_model_is_asked_by_both_query_times(split, tmp_path, monkeypatch, capsys):
    without_ray(monkeypatch, evaluate)
    path = write_dataset(tmp_path / "d", HISTORIES, NUM_ITEMS, before=BEFORE, times=TIMES)
    model = timed_model("rotary+gap+bias+calendar")
    model.catalogue, model.held_out, model.trained_before = "test", 2, 1001
    model.times.usual_gap.fill_(86_400)
    model.save_pretrained(str(tmp_path / "run" / "m"))
    ndcg = {}
    for query_time in ("last", "target"):
        gains = []
        for user, place in targets(split):
            items, times = HISTORIES[user], TIMES[user]
            asked = times[place] if query_time == "target" else times[place - 1] + 86_400
            low = max(place - (model.config.max_len - 1), 0)
            tokens, moments = [*items[low:place], NUM_ITEMS + 1], [*times[low:place], asked]
            scores = reference.logits(model, tokens, moments)[-1].tolist()
            rank = reference.rank(scores, items[place] - 1, {token - 1 for token in items[:place]})
            gains.append(1 / math.log2(1 + rank) if rank <= 10 else 0)
        ndcg[query_time] = sum(gains) / len(gains)
    assert abs(ndcg["last"] - ndcg["target"]) > 1e-3
    for query_time, other in (("last", "target"), ("target", "last")):
        settings = [*SPLITS[split], "evaluation.split=validation", f"evaluation.query_time={query_time}"]
        config = load_config(None, settings)
        monkeypatch.setattr(type(config), "prepared_path", path)
        result = job.evaluate_model(config, str(tmp_path / "run" / "m"))
        assert result.query_time == query_time
        found = result.protocols["all"]
        assert list(found) == ["BERT4Rec", f"BERT4Rec/{other}", "popularity"]
        assert found["BERT4Rec"]["ndcg@10"] == pytest.approx(ndcg[query_time])
        assert found[f"BERT4Rec/{other}"]["ndcg@10"] == pytest.approx(ndcg[other])
        printed = capsys.readouterr().out
        assert f"(evaluation.query_time={query_time})" in printed
        assert f"BERT4Rec/{other} at " in printed
        dataset = PreparedDataset(path)
        sequences = dataset.sequences(with_times=True)
        own = validate(model, Windows.from_sequences(sequences), config, before=sequences.before)
        assert own["val_ndcg@10"] == pytest.approx(ndcg[query_time])


def without_seconds(history):
    return [{k: v for k, v in epoch.items() if k not in ("seconds", "tokens_per_second")} for epoch in history]


@pytest.mark.parametrize("query_time", ["last", "target"])
@pytest.mark.parametrize("split", SPLITS)
def test_later_interactions_change_no_earlier_validation(split, query_time, tmp_path):
    """Neither the training nor the validation, to the last digit. Asked at the time of the item before it, the time of
    the target changes nothing either."""
    settings = ["model.hidden_units=8", "model.num_heads=2", "model.max_len=8", "data.batch_size=16"]
    settings += ["training.num_epochs=1", "model.time_encoding=rotary+gap+bias+calendar", "data.data_dir=/nowhere"]
    config = load_config(None, [*settings, *SPLITS[split], f"evaluation.query_time={query_time}"])
    until = dict(targets(split))

    def trained(name, changed, shift_target=0):
        histories, times = {}, {}
        for place, (user, items) in enumerate(HISTORIES.items()):
            # Of a user without a target, all that training does not see is later.
            known = BEFORE["validation"][place] if split == "temporal" else max(len(items) - 2, 0)
            last = until.get(user, known - 1)
            later = range(last + 1, len(items)) if changed else ()
            histories[user] = [token % NUM_ITEMS + 1 if n in later else token for n, token in enumerate(items)]
            times[user] = [time + 987_654 * (n - last) * (n in later) for n, time in enumerate(TIMES[user])]
            if user in until:
                times[user][last] += shift_target
        path = write_dataset(tmp_path / name, histories, NUM_ITEMS, before=BEFORE, times=times)
        history, _ = run(config, path, tmp_path / f"{name}-run")
        return without_seconds(history)

    expected = trained("as it was", False)
    assert trained("changed", True) == expected
    assert (trained("target", True, shift_target=500_000) == expected) == (query_time == "last")
