import csv
import warnings
from dataclasses import replace

import pytest
import torch

from bert4rec.config import ModelConfig
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.inference.export import ScoringFunction, export_program, write_catalogue, write_onnx, write_torch
from bert4rec.inference.ranking import Exclusions, Ranking, score_next, top_k
from bert4rec.model.batches import last_items
from bert4rec.model.item_vectors import Metadata
from bert4rec.model.network import BERT4Rec
from tests.helpers.datasets import random_times, write_dataset
from tests.unit.model.test_batches import windows_of
from tests.unit.model.test_item_vectors import metadata
from tests.unit.model.test_network import NUM_ITEMS, make_model
from tests.unit.model.test_times import ENCODINGS, timed_model

pytestmark = pytest.mark.unit

HISTORIES = [[3], [5, 9, 4, 1], [*range(1, 12)], [*range(1, 31)], [30, 30, 2]]
"""Below, at and above the model's max_len of 12 with its [MASK]."""


def padded(histories, width):
    return torch.tensor([[0] * (width - len(history)) + history for history in histories])


def model_with(**settings):
    """A model of 6 items, with metadata, of which the last is new and unknown."""
    torch.manual_seed(1)
    config = ModelConfig(**{"hidden_units": 8, "num_heads": 2, "max_len": 6, "num_layers": 2, **settings})
    data = metadata() if settings.get("metadata_fusion") else Metadata.none()
    model = BERT4Rec(config, 6, "c", data, num_new_items=1).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    return model


MODELS = {
    "tied": lambda: make_model(),
    "rotary": lambda: make_model(position_encoding="rotary"),
    "own output, one layer": lambda: model_with(share_embeddings=False, num_layers=1, output_transform=False),
    "causal": lambda: make_model(attention="causal", position_encoding="rotary"),
    "gate, fused output": lambda: model_with(metadata_fusion="gate", output_features="fused"),
    "concat": lambda: model_with(metadata_fusion="concat"),
    "times": lambda: timed_model("rotary+gap+bias+calendar", position_encoding="rotary"),
    "times, causal": lambda: timed_model("rotary+gap+bias+calendar", attention="causal"),
}


def inputs_of(model, histories, width):
    """What a program takes for padded histories: with times of any kind at padding, if the model reads them."""
    inputs = {"history": padded(histories, width)}
    if model.times is not None:
        times, asked = moments(histories)
        inputs |= {"times": padded(times, width), "at": torch.tensor(asked)}
        inputs["times"][inputs["history"] == 0] = 1_234_567_890
    return inputs


def moments(histories):
    """Times of each item, and when the next is asked for."""
    times = list(random_times(dict(enumerate(histories))).values())
    return times, [own[-1] + 1000 * number for number, own in enumerate(times)]


def scores_of(model, histories):
    windows = windows_of(histories)
    times, asked = moments(histories)
    flat = torch.tensor([time for own in times for time in own])
    return score_next(model, replace(windows, times=flat, asked=torch.tensor(asked)))(0, model.num_items)


def run_onnx(path, history, **more):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {name: value.numpy() for name, value in {"history": history, **more}.items()}
    return [torch.from_numpy(output) for output in session.run(None, inputs)]


@pytest.mark.parametrize("name", MODELS)
def test_programs_score_as_the_model_does(name, tmp_path):
    model = MODELS[name]()
    program = export_program(ScoringFunction(model))
    loaded = torch.export.load(write_torch(program, str(tmp_path))).module()
    pytest.importorskip("onnxscript")
    path = write_onnx(program, str(tmp_path))
    histories = [[(token - 1) % model.num_items + 1 for token in history] for history in HISTORIES]
    for chosen in (histories, histories[:1], histories[3:4], histories[1:3]):  # other numbers of users, other lengths
        expected = scores_of(model, chosen)
        for width in (max(map(len, chosen)), 40):
            inputs = inputs_of(model, chosen, width)
            torch.testing.assert_close(loaded(*inputs.values()), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(run_onnx(path, **inputs)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position_encoding", ["learned", "rotary"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_time_encoding_scores_as_the_model_does(encoding, position_encoding):
    model = timed_model(encoding, position_encoding=position_encoding)
    function = ScoringFunction(model).eval()
    expected = scores_of(model, HISTORIES)
    torch.testing.assert_close(function(**inputs_of(model, HISTORIES, 40)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"this program reads times .*; expected history, times and at"):
        function(padded(HISTORIES, 40))


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_top_k_programs_give_what_the_batch_job_gives(exclude_seen, tmp_path, capfd):
    """And the exporters' own chatter stays off the terminal."""
    model = make_model()
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = export_program(ScoringFunction(model, 5, Ranking(exclude_seen=exclude_seen)))
        path = write_onnx(program, str(tmp_path))
    assert not caught
    assert capfd.readouterr() == ("", "")
    windows = windows_of(HISTORIES)
    exclusions = Exclusions.of(windows if exclude_seen else None)
    values, items = top_k(score_next(model, windows), exclusions, len(HISTORIES), NUM_ITEMS, 5)
    there = torch.isfinite(values)
    assert int(there.sum()) == (20 if exclude_seen else 25)  # one user has seen everything
    for scores, tokens in (program.module()(padded(HISTORIES, 30)), run_onnx(path, padded(HISTORIES, 30))):
        torch.testing.assert_close(scores, values, rtol=1e-4, atol=1e-5)
        assert torch.equal(tokens[there], items[there] + 1)


def test_the_weights_are_the_models_and_the_input_its_own():
    """Half a history is padding, as the model's own batches have it."""
    model = make_model()
    function = ScoringFunction(model).eval()
    windows = windows_of(HISTORIES)
    own = last_items(windows, model.config.max_len - 1)
    with torch.no_grad():
        torch.testing.assert_close(function(own), function(padded(HISTORIES, 30)), rtol=1e-5, atol=1e-6)
        model.output_transform.weight.mul_(2)
        assert not torch.allclose(function(own), ScoringFunction(make_model()).eval()(own), atol=1e-3)


def test_the_discount_is_the_batch_jobs():
    model = make_model()
    model.item_counts += torch.arange(NUM_ITEMS)
    ranking = Ranking(popularity_discount=0.3)
    expected = score_next(model, windows_of(HISTORIES), ranking)(0, NUM_ITEMS)
    function = ScoringFunction(model, ranking=ranking).eval()
    torch.testing.assert_close(function(padded(HISTORIES, 30)), expected, rtol=1e-4, atol=1e-5)


def test_tokens_of_items_are_written(tmp_path):
    path = write_dataset(tmp_path / "d", {1: [1, 2, 2]}, 3, years=[1999, None, 2001])
    with open(write_catalogue(PreparedDataset(path).items(), str(tmp_path)), newline="") as file:
        assert list(csv.reader(file)) == [
            ["token", "item", "title", "year"],
            ["1", "101", "film 1", "1999"],
            ["2", "102", "film 2", ""],
            ["3", "103", "film 3", "2001"],
        ]


def test_without_the_extra_onnx_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr("bert4rec.inference.export.ONNX_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(InputError, match=r"onnx needs no_such_package; pip install 'bert4rec-ray\[export\]'"):
        write_onnx(export_program(ScoringFunction(make_model())), str(tmp_path))
