import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bert4rec.config import ModelConfig, load_config
from bert4rec.data.dataset import ITEMS, Manifest
from bert4rec.errors import InputError
from bert4rec.model.network import BERT4Rec, weights_of
from bert4rec.training.warm_start import begin_from, check_start
from tests.unit.model.test_network import make_model

SETTINGS = ["model.hidden_units=16", "model.num_heads=4", "model.max_len=12", "model.use_title_emb=false"]


def save(path, ids, held_out=2, trained_before=None, **settings):
    model = make_model(len(ids), **{"use_title_emb": False, **settings})
    model.held_out, model.trained_before = held_out, trained_before
    model.save_pretrained(str(path))
    columns = {"item": ids, "count": [1] * len(ids), "year": pa.nulls(len(ids), pa.int16()), "title": ids}
    pq.write_table(pa.table(columns), path / ITEMS)
    return model


def manifest(catalogue="catalogue", **cutoffs):
    return Manifest.model_construct(catalogue=catalogue, cutoffs=cutoffs)


@pytest.mark.parametrize("share", [True, False])
def test_each_item_keeps_what_was_learnt_of_it(tmp_path, share):
    old = save(tmp_path, ["a", "b", "c", "d"], share_embeddings=share)
    torch.manual_seed(1)
    model = BERT4Rec(ModelConfig(**{**old.config.model_dump(), "dropout_rate": 0.5}), 5, num_new_items=1)
    own = {name: parameter.clone() for name, parameter in model.named_parameters()}
    begin_from(model, str(tmp_path), pa.array(["d", "x", "b", "a", "c"]))  # c has no interactions any more
    found, before = dict(model.named_parameters()), dict(old.named_parameters())
    per_item = {"items.embedding.weight", "output_bias"} | (set() if share else {"output_embedding"})
    for name, parameter in found.items():
        if name not in per_item:
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    name = "items.embedding.weight"
    expected = [before[name][0], before[name][4], own[name][2], before[name][2], before[name][1]]
    expected += [torch.zeros(16), before[name][5]]
    torch.testing.assert_close(found[name], torch.stack(expected), rtol=0, atol=0)
    for other in per_item - {name}:
        expected = [before[other][3], own[other][1], before[other][1], before[other][0], before[other][2]]
        torch.testing.assert_close(found[other], torch.stack(expected), rtol=0, atol=0)
    assert found["output_bias"].requires_grad


def test_ids_are_compared_as_text_and_other_data_refused(tmp_path):
    old = save(tmp_path, [7, 8])
    model = make_model(2)
    begin_from(model, str(tmp_path), pa.array(["8", "9"]))
    torch.testing.assert_close(model.output_bias[0], old.output_bias[1])
    with pytest.raises(InputError, match=r"model of other data: none of its 2 items, such as 7.*, is among these 1"):
        begin_from(make_model(1), str(tmp_path), pa.array([9]))
    assert len(weights_of(str(tmp_path))) == 64
    with pytest.raises(InputError, match="nowhere"):
        weights_of(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("held_out", "trained_before", "settings", "refusal"),
    [
        (2, None, [], None),
        (1, None, ["model.dropout_rate=0.5", "model.random_mask_prob=0.9"], None),
        (0, None, ["data.use_full_data=true"], None),
        (0, None, [], r"the last 0 items of each user held out, so it has seen the validation item of data\.holdout=1"),
        (
            1,
            None,
            ["data.holdout=2"],
            r"start_from=.*the last 1 items.*data\.holdout=2.*use_full_data=true\) it can go on",
        ),
        (2, None, ["model.hidden_units=8"], r"another network \(model\.hidden_units was 16, is 8\)"),
        (0, 1000, ["data.split=temporal"], None),
        (0, 1001, ["data.split=temporal"], r"interactions until 1001,.*after the validation cut-off 1000"),
        (2, None, ["data.split=temporal"], r"interactions at any time"),
    ],
)
def test_what_training_can_begin_with(tmp_path, held_out, trained_before, settings, refusal):
    save(tmp_path, ["a", "b"], held_out, trained_before)
    config = load_config(None, [*SETTINGS, f"training.start_from={tmp_path}", *settings])
    if refusal is None:
        check_start(config, manifest("another", validation=1000))
    else:
        with pytest.raises(InputError, match=refusal):
            check_start(config, manifest("another", validation=1000))


def test_what_is_no_model_directory_is_named(tmp_path):
    for missing in ("config.json", ITEMS):
        config = load_config(None, [*SETTINGS, f"training.start_from={tmp_path}"])
        with pytest.raises(InputError, match=f"no model directory, as it has no {missing}; expected one such as"):
            check_start(config, manifest())
        make_model(2).save_pretrained(str(tmp_path))


def test_numbers_of_genres_are_those_of_one_catalogue(tmp_path):
    model = BERT4Rec(ModelConfig(hidden_units=16, num_heads=4, max_len=12, use_genre_emb=True, use_title_emb=False), 2,
                     "catalogue", {"genre": [3, 2]})  # fmt: skip
    model.held_out = 1
    model.save_pretrained(str(tmp_path))
    (tmp_path / ITEMS).touch()
    config = load_config(None, [*SETTINGS, f"training.start_from={tmp_path}", "model.use_genre_emb=true"])
    check_start(config, manifest())
    with pytest.raises(InputError, match="a model with metadata"):
        check_start(config, manifest("another"))
