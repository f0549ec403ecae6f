import csv
import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bert4rec.config import load_config
from bert4rec.errors import InputError
from bert4rec.tune import outputs
from bert4rec.tune.space import DEFAULT_SPACE, Space, Trial, with_values
from bert4rec.tune.tune import _Sweep, table

pytestmark = pytest.mark.unit

NDCG = "val_ndcg@10"
SMALL_SPACE = {"model.num_heads": {"choice": [2, 3, 4]}, "model.hidden_units": {"choice": [8, 9, 12]}}
VALID_PAIRS = {(2, 8), (4, 8), (3, 9), (2, 12), (3, 12), (4, 12)}


def config_for(space=None, **tune):
    config = load_config(None, ["model.hidden_units=8", "model.num_heads=2", "training.num_epochs=4"])
    return config.model_copy(update={"tune": config.tune.model_copy(update={"space": space, **tune})})


def pair(values):
    return values["model.num_heads"], values["model.hidden_units"]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "tune.space is empty"),
        ({"model.hiden_units": 8}, r"model\.hiden_units does not exist \(did you mean model\.hidden_units\?\)"),
        ({"lr": {"uniform": [0, 1]}}, r"config key lr does not exist"),
        ({"training.lr": {"logunifrom": [1e-4, 1e-2]}}, r"'logunifrom' is none of.*did you mean loguniform\?"),
        ({"training.lr": {"loguniform": [0, 1]}}, r"training\.lr.*must be above 0"),
        ({"training.lr": {"uniform": [0.1, 0.01]}}, r"expected two numbers, the lowest and the highest"),
        ({"training.lr": {"uniform": [-1, 1]}}, r"tune\.space: training\.lr=-1: Input should be greater than 0"),
        ({"model.num_layers": {"int": [1, 2.5]}}, r"expected two whole numbers"),
        ({"model.num_layers": {"choice": [1, "two"]}}, r"model\.num_layers='two'.*valid integer"),
        ({"model.num_layers": {"choice": []}}, r"expected a list of single values"),
        ({"model.num_layers": {"choice": [1], "int": [1, 2]}}, r"expected a value, or one of choice"),
        ({"model.num_layers": {"choice": [1, 2], "when": {"model.heads": 2}}}, r"model\.heads does not exist"),
        (
            {"data.holdout": {"choice": [1, 2]}},
            r"data\.holdout cannot be searched over: trials must have the same data",
        ),
        ({"data.split": {"choice": ["temporal"]}}, r"data\.split cannot be searched over"),
        ({"data.min_item_interactions": {"int": [0, 5]}}, r"data\.min_item_interactions cannot be searched over"),
        ({"inference.topk": {"int": [1, 5]}}, r"inference\.topk cannot be searched over.*data, model, training"),
        (
            {"model.num_heads": {"choice": [3, 5]}},
            r"none of 1,000 draws is a valid config.*num_heads=[35] does not divide",
        ),
    ],
)
def test_a_wrong_space_is_one_clear_message(space, message):
    with pytest.raises(InputError, match=message) as error:
        Space.of(config_for(space))
    assert "\n" not in str(error.value)


def test_the_default_space_is_that_of_the_documentation():
    space = Space.of(config_for())
    assert [domain.key for domain in space.domains] == list(DEFAULT_SPACE)
    for number in range(1, 200):
        values = space.next_values([Trial(n, {}) for n in range(number)])
        assert values["model.hidden_units"] in (64, 128, 256)
        assert values["model.num_layers"] in (1, 2, 3)
        assert 1e-4 <= values["training.lr"] <= 1e-2
        assert 0.1 <= values["model.dropout_rate"] <= 0.5
        assert values["training.lr"] == float(f"{values['training.lr']:.4g}")


def test_random_draws_follow_their_distributions():
    space = Space.of(
        config_for(
            {"training.lr": {"loguniform": ["1e-4", 1e-2]}, "model.num_layers": {"int": [1, 3]}}, search="random"
        )
    )
    drawn = [space.next_values([Trial(n, {}) for n in range(number)]) for number in range(1, 400)]
    logs = np.log10([values["training.lr"] for values in drawn])
    assert np.mean(logs) == pytest.approx(-3, abs=0.1)
    assert np.mean(logs < -3.5) == pytest.approx(0.25, abs=0.08)
    layers = np.bincount([values["model.num_layers"] for values in drawn], minlength=4)
    assert layers[0] == 0
    assert (layers[1:] > 99).all()


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_every_valid_combination_is_tried_once_and_no_other(search):
    space = Space.of(config_for(SMALL_SPACE, search=search))
    trials = []
    while (values := space.next_values(trials)) is not None:
        assert space.next_values(trials) == values  # a continued sweep goes the same way
        trials.append(Trial(len(trials), values, "finished", [{"epoch": 1, NDCG: 0.1}]))
    assert pair(trials[0].values) == (2, 8)  # the config's own come first
    assert sorted(pair(trial.values) for trial in trials) == sorted(VALID_PAIRS)


def test_conditions_and_fixed_values():
    space = Space.of(
        config_for(
            {
                "model.use_genre_emb": {"choice": [True, False]},
                "model.metadata_fusion": {"choice": ["add", "concat"], "when": {"model.use_genre_emb": True}},
                "data.sampling_strategy": {"choice": ["recent", "weighted"], "when": {"model.max_len": [5, 6]}},
                "model.num_layers": 1,
            },
        )
    )
    drawn = [space.next_values([Trial(n, {}) for n in range(number)]) for number in range(40)]
    assert drawn[0] == {"model.use_genre_emb": False, "model.num_layers": 1}
    assert {values["model.use_genre_emb"] for values in drawn} == {True, False}
    for values in drawn:
        assert values["model.num_layers"] == 1
        assert ("model.metadata_fusion" in values) == values["model.use_genre_emb"]
        assert "data.sampling_strategy" not in values  # max_len is 200


def test_tpe_comes_closer_to_the_best_than_random():
    """The score is how near the dropout rate is to 0.4."""

    def distances(search):
        space = Space.of(config_for({"model.dropout_rate": {"uniform": [0, 0.9]}}, search=search, include_config=False))
        trials = []
        for number in range(40):
            values = space.next_values(trials)
            distance = abs(values["model.dropout_rate"] - 0.4)
            trials.append(Trial(number, values, "finished", [{"epoch": 1, NDCG: 1 - distance}]))
        return [1 - trial.history[0][NDCG] for trial in trials[20:]]

    assert np.mean(distances("tpe")) < np.mean(distances("random")) / 1.5


def heard(sweep, ray_id, values):
    """Epochs that the trial is allowed, out of these validation scores."""
    for epoch, value in enumerate(values, 1):
        if sweep.hear(ray_id, {"epoch": epoch, NDCG: value, "train_loss": 1.0, "training_iteration": epoch}):
            return epoch
    return len(values)


CURVES = [
    ([0.5, 0.4, 0.3, 0.1], 4),  # the first has nothing to be compared with
    ([0.4, 0.9, 0.9, 0.9], 1),  # below the median of 0.5
    ([0.45, 0.3, 0.3, 0.3], 2),  # not below the median of 0.5, 0.4; at epoch 2 its best, 0.45, is below 0.5
    ([0.6, 0.2, 0.2, 0.2], 4),  # its best counts; at epoch 4 all is over anyway
    ([0.47, 0.7, 0.8, 0.9], 4),  # the median of 0.5, 0.4, 0.45, 0.6 is 0.475, at which it would stop
]


def test_asha_by_hand_and_after_a_restart(tmp_path):
    """grace_epochs 1, reduction_factor 2, 4 epochs: compared at epochs 1 and 2, with the median."""
    expected = [epochs for _, epochs in CURVES[:4]] + [1]
    config = config_for({"model.dropout_rate": {"uniform": [0, 0.9]}}, grace_epochs=1, reduction_factor=2)
    for restarts in (False, True):
        path, trials, found = str(tmp_path / str(restarts)), [], []
        sweep = _Sweep(Space.of(config), trials, path)
        for number, (curve, _) in enumerate(CURVES):
            if restarts:
                saved = [json.loads((tmp_path / "True" / trial.name / "trial.json").read_text()) for trial in trials]
                trials = [Trial(**content) for content in saved]
                sweep = _Sweep(Space.of(config), trials, path)
            trial = sweep.next_trial(f"id{number}")
            found.append(heard(sweep, f"id{number}", curve))
            if found[-1] == 4:
                sweep.end(f"id{number}", "finished")
            assert trial.epochs == found[-1]
        assert found == expected
        assert [trial.status for trial in trials] == ["finished", "stopped", "stopped", "finished", "stopped"]
        assert [trial.number for trial in outputs.ranked(trials, NDCG)] == [3, 0, 4, 2, 1]


def test_a_running_trial_goes_on_after_a_restart_and_is_not_compared_twice(tmp_path):
    config = config_for({"model.dropout_rate": {"uniform": [0, 0.9]}}, grace_epochs=1, reduction_factor=2)
    sweep = _Sweep(Space.of(config), [], str(tmp_path))
    first, second = sweep.next_trial("a"), sweep.next_trial("b")
    assert not sweep.hear("a", {"epoch": 1, NDCG: 0.2})
    assert not sweep.hear("b", {"epoch": 1, NDCG: 0.9})
    assert first.values != second.values
    trials = [Trial(**json.loads((tmp_path / name / "trial.json").read_text())) for name in (first.name, second.name)]
    again = _Sweep(Space.of(config), trials, str(tmp_path))
    assert again.num_left == 16
    assert again.next_trial("c") is trials[0]
    assert again.next_trial("d") is trials[1]
    assert not again.hear("d", {"epoch": 2, NDCG: 0.8})
    assert not again.hear("d", {"epoch": 2, NDCG: 0.1})  # told again: nothing new
    assert trials[1].history == [{"epoch": 1, NDCG: 0.9}, {"epoch": 2, NDCG: 0.8}]
    assert again.hear("c", {"epoch": 2, NDCG: 0.3})  # below the 0.9 of the other
    assert again.next_trial("e").number == 2


def test_too_many_failures_end_the_sweep_with_the_first_reason(tmp_path, capsys):
    config = config_for({"training.lr": {"loguniform": [1e-4, 1e-2]}}, max_failed_trials=1)
    sweep = _Sweep(Space.of(config), [], str(tmp_path))
    for number, (outcome, is_over) in enumerate([("failed", False), ("finished", False), ("crashed", True)]):
        sweep.next_trial(str(number))
        history = [{"epoch": 1, NDCG: 0.1}]
        sweep.hear(str(number), {"outcome": outcome, "reason": f"reason {number}", "history": history})
        assert sweep.is_over() == is_over
    with pytest.raises(InputError, match=r"2 of 3 trials failed, more than.*=1; the first, trial-000 \(lr=.*reason 0"):
        sweep.check_failures()
    assert "reason 0" in capsys.readouterr().out
    assert [trial.number for trial in outputs.ranked(sweep.trials, NDCG)] == [1, 2]
    again = _Sweep(Space.of(config), sweep.trials, str(tmp_path))
    again.check_failures()  # the crashed one is tried again
    assert again.next_trial("x").number == 2


def test_the_table_has_a_line_a_trial():
    trial = Trial(
        7, {"model.max_len": 50}, "stopped", [{"epoch": 2, NDCG: 0.125}, {"epoch": 4, NDCG: 0.1}], seconds=61.0
    )
    header, line = table([trial], NDCG).splitlines()
    assert header.split() == ["trial", "status", "epochs", NDCG, "at", "epoch", "time", "settings"]
    assert line.split() == ["7", "stopped", "4", "0.1250", "2", "1:01", "max_len=50"]


@pytest.fixture
def finished(tmp_path):
    config = config_for(SMALL_SPACE | {"training.lr": {"loguniform": [1e-4, 1e-2]}})
    lrs = [1e-3, 2e-3, 5e-3, 2e-4]
    trials = [
        Trial(
            number,
            {"model.num_heads": heads, "model.hidden_units": hidden, "training.lr": lr},
            "stopped" if number == 2 else "finished",
            [{"epoch": 1, NDCG: 0.1 * number, "val_mrr": 0.5}, {"epoch": 2, NDCG: 0.15, "val_mrr": 0.25}],
        )
        for number, ((heads, hidden), lr) in enumerate(zip(sorted(VALID_PAIRS), lrs, strict=False))
    ]
    trials.append(Trial(4, trials[0].values, "failed", reason="diverged, at once"))
    return config, Space.of(config), trials, str(tmp_path)


def test_best_config_is_read_back(finished):
    config, _, trials, path = finished
    best = outputs.ranked(trials, NDCG)[0]
    assert best.number == 3
    assert best.best(NDCG) == {"epoch": 1, NDCG: pytest.approx(0.3), "val_mrr": 0.5}
    read = load_config(outputs.write_best_config(config, best, path))
    assert read.model == with_values(config, best.values).model
    assert (read.model.hidden_units, read.model.num_heads, read.training.lr) == (12, 3, 2e-4)
    assert read.training.num_epochs == 4
    assert read.tune.space is None


def test_trials_as_csv_and_parquet(finished):
    _, space, trials, path = finished
    csv_path, parquet_path = outputs.write_table(space, trials, path)
    with open(csv_path) as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(parquet_path)
    assert table.num_rows == len(rows) == 5
    assert [row["status"] for row in rows] == ["finished", "finished", "stopped", "finished", "failed"]
    assert table[NDCG].to_pylist() == [0.15, 0.15, 0.2, pytest.approx(0.3), None]
    assert table["best_epoch"].to_pylist() == [2, 2, 1, 1, None]
    assert table["val_mrr"].to_pylist() == [0.25, 0.25, 0.5, 0.5, None]
    assert [int(row["model.num_heads"]) for row in rows] == [trial.values["model.num_heads"] for trial in trials]
    assert rows[4]["reason"] == "diverged, at once"


def test_plots_are_one_page_that_needs_no_network(finished):
    _, space, trials, path = finished
    with open(outputs.write_plots(space, trials, path)) as file:
        page = file.read()
    for title in ("Optimization History Plot", "Hyperparameter Importances", "Parallel Coordinate Plot"):
        assert title in page
    assert page.count("Plotly.newPlot(") >= 3
    assert "<script src=" not in page
    assert "training.lr" in page


def test_one_trial_has_no_plots(finished, capsys):
    _, space, trials, path = finished
    assert outputs.write_plots(space, trials[:1], path) is None
    assert "no plots" in capsys.readouterr().out


def test_hparams_are_read_by_tensorboard(finished):
    _, space, trials, path = finished
    for _ in range(2):  # written again, not in addition
        root = outputs.write_hparams(space, trials, path)
    found = EventAccumulator(f"{root}/trial-002/tensorboard")
    found.Reload()
    assert [(event.step, pytest.approx(event.value)) for event in found.Scalars(NDCG)] == [(1, 0.2), (2, 0.15)]
    assert [event.value for event in found.Scalars(f"best/{NDCG}")] == [pytest.approx(0.2)]
    plugins = {value.plugin_data.plugin_name for value in found.summary_metadata.values()}
    assert "hparams" in plugins


def test_a_trial_knows_each_epoch_once_in_order():
    trial = Trial(0, {})
    added = [trial.add({"epoch": epoch, NDCG: value}) for epoch, value in ((3, 0.3), (1, 0.3), (3, 0.9))]
    assert added == [True, True, False]
    assert [metrics["epoch"] for metrics in trial.history] == [1, 3]
    assert trial.best(NDCG)["epoch"] == 1  # of equals the first
    assert trial.epochs == 3


def test_default_space_keys_can_be_combined_at_will():
    choices = [DEFAULT_SPACE[key]["choice"] for key in ("model.hidden_units", "model.num_heads")]
    assert all(hidden % heads == 0 for hidden, heads in itertools.product(*choices))
