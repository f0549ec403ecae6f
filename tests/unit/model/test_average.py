import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bert4rec import storage
from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.windows import Windows
from bert4rec.errors import InputError
from bert4rec.evaluation import evaluate
from bert4rec.inference import recommend
from bert4rec.inference.ranking import Ranking, score_next, score_similar
from bert4rec.inference.recommender import load
from bert4rec.inference.rules import Rules
from bert4rec.inference.vectors import item_vectors, user_vectors
from bert4rec.model.average import Average, checkpoint_and_output, read_model
from bert4rec.model.network import BERT4Rec
from jobs.export import export_model
from tests.helpers.datasets import random_histories, write_dataset
from tests.helpers.in_process import without_ray
from tests.unit.model.test_batches import windows_of
from tests.unit.model.test_network import NUM_ITEMS, make_model

pytestmark = pytest.mark.unit

HISTORIES = random_histories(40, NUM_ITEMS, seed=3, longest=16)
DIFFERENT = (
    {},
    {"attention": "causal", "output_transform": False, "hidden_units": 8, "num_heads": 2, "max_len": 7},
    {"time_encoding": "rotary+gap", "position_encoding": "rotary", "num_heads": 2},
)


def networks():
    """Networks of one catalogue with different settings and weights; one cannot score an item."""
    made = [make_model(**settings) for settings in DIFFERENT]
    for place, network in enumerate(made):
        network.output_bias.data.add_(torch.randn(NUM_ITEMS, generator=torch.Generator().manual_seed(place)))
        network.item_counts[:] = torch.arange(NUM_ITEMS, 0, -1)
        network.catalogue, network.held_out = "test", 2
    return made


def asked_windows():
    windows = windows_of(list(HISTORIES.values()))
    times = 1_000_000 + 3600 * torch.arange(len(windows.items))
    return replace(windows, times=times, asked=times[windows.end - 1] + 7200)


def test_scores_are_the_mean_of_the_networks_scores():
    made, windows = networks(), asked_windows()
    ranking = Ranking(popularity_discount=0.3)
    alone = [score_next(network, windows, ranking)(0, NUM_ITEMS).clone() for network in made]
    assert not torch.allclose(alone[0], alone[1], atol=0.1)
    together = score_next(Average(made), windows, ranking)(0, NUM_ITEMS)
    torch.testing.assert_close(together, sum(alone) / 3, rtol=1e-5, atol=1e-5)
    columns = torch.tensor([1, 4, 17])
    some = score_next(Average(made), windows, ranking, columns)(0, 3)
    torch.testing.assert_close(some, together[:, columns], rtol=1e-5, atol=1e-5)


def test_an_average_moves_as_a_whole():
    average = Average(networks())
    average.output_weights()  # which it keeps
    average.to("meta")
    assert average.device.type == "meta"
    assert [each.device.type for each in average.output_weights()] == ["meta", "meta"]


def test_an_average_reads_times_if_a_network_does():
    made = networks()
    made[2].times.usual_gap.fill_(7200)
    assert Average(made).reads_times
    assert Average(made).usual_gap == 7200
    assert not Average(made[:2]).reads_times
    assert Average(made[:2]).usual_gap == 0


def test_likeness_is_the_mean_of_the_networks_cosines():
    made, items = networks(), torch.tensor([3, 8])
    made[1].unrankable[5] = True
    expected = torch.stack([score_similar(network, items)(0, NUM_ITEMS) for network in made]).mean(0)
    found = score_similar(Average(made), items)(0, NUM_ITEMS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found[:, 5] == -torch.inf).all()
    assert torch.isfinite(found).sum() == 2 * (NUM_ITEMS - 1)


class Place:
    """A dataset, the networks' model directories, and the jobs' own functions in this process."""

    def __init__(self, root, monkeypatch):
        without_ray(monkeypatch, recommend, evaluate)
        self.root, self.settings = root, [f"run.storage_path={root}", "data.data_dir=/d", "inference.topk=4"]
        self.path = load_config(None, self.settings).prepared_path
        (root / "prepared").mkdir()
        write_dataset(root / "prepared" / self.path.rpartition("/")[2], HISTORIES, NUM_ITEMS)
        self.models = []
        for number, network in enumerate(networks()[:2]):
            network.save_pretrained(str(root / str(number) / "best"))
            shutil.copy(f"{self.path}/items.parquet", root / str(number) / "best")
            storage.write_json(str(root / str(number) / "run.json"), {"best_checkpoint": "best"})
            self.models.append(str(root / str(number) / "best"))

    def config(self, models, *more):
        return load_config(None, [*self.settings, f"inference.checkpoint_path=[{', '.join(models)}]", *more])


@pytest.fixture
def place(tmp_path, monkeypatch):
    return Place(tmp_path, monkeypatch)


def test_jobs_rank_with_the_mean(place, capsys):
    """Recommendations and metrics are those of the mean of scores; a run stands for its best model."""
    config = place.config([str(place.root / "0"), place.models[1]])
    checkpoint, output = checkpoint_and_output(config)
    assert f"{checkpoint}: the average of {', '.join(place.models)}" in capsys.readouterr().out
    assert checkpoint_and_output(place.config(place.models))[0] == checkpoint
    for alone in (place.models[0], str(place.root / "0")):
        assert checkpoint_and_output(place.config([alone]))[0] == place.models[0]
    result = evaluate.evaluate(place.config(place.models, "data.holdout=2"), place.path, checkpoint)
    recommend.recommend(place.config(place.models), place.path, checkpoint, output)
    rows = pq.read_table(f"{output}/recommendations.parquet").to_pylist()
    windows = Windows.from_sequences(PreparedDataset(place.path).sequences())
    ranking = Ranking()
    mean = sum(score_next(BERT4Rec.from_pretrained(each), windows, ranking)(0, NUM_ITEMS) for each in place.models) / 2
    for user, own in enumerate(HISTORIES.values()):
        mean[user, torch.tensor(own) - 1] = -torch.inf
    best = mean.topk(4).values
    scores = [row["score"] for row in rows]
    torch.testing.assert_close(torch.tensor(scores).sort().values, best[torch.isfinite(best)].sort().values)
    alone = [evaluate.evaluate(place.config([each], "data.holdout=2"), place.path, each) for each in place.models]
    values = [each.protocols["all"]["BERT4Rec"]["mrr"] for each in (result, *alone)]
    assert len(set(values)) == 3  # it ranks as neither of them does
    evaluate.evaluate(
        place.config(place.models, "data.holdout=2", "inference.blend={ease: 0.1}"), place.path, checkpoint
    )
    assert list(load(checkpoint).recommend([101, 102], 3)["score"]) == pytest.approx(
        sorted(mean_of(place.models, [1, 2]), reverse=True)[:3], rel=1e-5
    )


def mean_of(models, history):
    """Scores of the items that the history lacks."""
    scores = [score_next(BERT4Rec.from_pretrained(each), windows_of([history]))(0, NUM_ITEMS)[0] for each in models]
    return [score for item, score in enumerate((sum(scores) / len(scores)).tolist()) if item + 1 not in history]


def test_vectors_have_the_scores_of_the_mean(place):
    checkpoint, _ = checkpoint_and_output(place.config(place.models))
    model, windows = read_model(checkpoint), windows_of(list(HISTORIES.values()))
    kept, items = item_vectors(model, Ranking(), Rules(Ranking(), PreparedDataset(place.path).items()))
    assert np.array_equal(kept, np.arange(NUM_ITEMS))
    product = user_vectors(model, windows) @ torch.from_numpy(items).T
    torch.testing.assert_close(product, score_next(model, windows)(0, NUM_ITEMS), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_averaged_is_one_message(place):
    checkpoint, _ = checkpoint_and_output(place.config(place.models))
    with pytest.raises(InputError, match=r"is named twice"):
        checkpoint_and_output(place.config([place.models[0], place.models[0]]))
    with pytest.raises(InputError, match=r"model: is an average itself"):
        checkpoint_and_output(place.config([place.models[0], checkpoint]))
    with pytest.raises(InputError, match=r"an average of models, and a program has one network"):
        export_model(place.config(place.models, "export.formats=[torch]"))
    with pytest.raises(InputError, match=r"an average of models; expected a single one"):
        BERT4Rec.from_pretrained(checkpoint)
    with pytest.raises(InputError, match=r"inference\.checkpoint_path"):
        load_config(None, ["inference.checkpoint_path=[]"])
    other = make_model()
    other.catalogue = "another"
    other.save_pretrained(str(place.root / "other"))
    with pytest.raises(InputError, match=r"other: was trained on another catalogue than .*0/best"):
        checkpoint_and_output(place.config([place.models[0], str(place.root / "other")]))


@pytest.mark.parametrize("change", ["removed", "trained anew"])
def test_an_average_of_what_has_changed_is_one_message(place, change):
    checkpoint, _ = checkpoint_and_output(place.config(place.models))
    before = read_model(checkpoint)
    assert isinstance(before, Average)
    if change == "removed":
        shutil.rmtree(place.models[1])
    else:
        other = make_model(hidden_units=8)
        other.catalogue = "test"
        other.save_pretrained(place.models[1])
    with pytest.raises(InputError, match=r"average of models of which .*1/best is missing or has changed"):
        read_model(checkpoint)


def test_held_out_holds_for_each(place):
    other = make_model()
    other.catalogue, other.held_out = "test", 1
    other.save_pretrained(place.models[1])
    config = place.config(place.models, "data.holdout=2")
    checkpoint, _ = checkpoint_and_output(config)
    with pytest.raises(InputError, match=r"has seen the test item"):
        evaluate.evaluate(config, place.path, checkpoint)
