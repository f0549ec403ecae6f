"""Every row of FEATURES reaches everything that reads a feature; the rows are not listed here."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bert4rec.config import ModelConfig, load_config
from bert4rec.data.dataset import PreparedDataset, read_items
from bert4rec.data.features import FEATURES
from bert4rec.data.files import METADATA
from bert4rec.data.metadata import catalogue_fingerprint, item_table
from bert4rec.errors import InputError
from bert4rec.model.item_vectors import Metadata
from bert4rec.model.network import BERT4Rec
from bert4rec.training.card import model_card
from bert4rec.training.tensorboard import TensorBoardLog
from bert4rec.training.train import with_features
from tests.helpers.datasets import write_dataset

pytestmark = pytest.mark.unit

IDS = pa.array([5, 7, 9])
COUNTS = np.array([3, 2, 1])
PINNED = "5ba36925cc10bc81"
METRICS = {"epoch": 1, "train_loss": 1.0, "val_ndcg@10": 0.5}


def config_using(*names, **others):
    settings = [f"model.use_{name}_emb={str(name in names).lower()}" for name in FEATURES]
    return load_config(None, [*settings, "data.data_dir=/none", *(f"{key}={value}" for key, value in others.items())])


def table_with(*names):
    files = {FEATURES[name].file: pa.table({"item": ["7", "7"], name: ["b", "a"]}) for name in names}
    return item_table(IDS, COUNTS, files, {key: f"{key}.tsv" for key in files}, {})


@pytest.fixture
def dataset(tmp_path):
    return PreparedDataset(write_dataset(tmp_path / "d", {1: [1, 2, 3], 2: [2, 4]}, 4))


def test_a_model_of_any_feature_uses_metadata():
    assert not ModelConfig().uses_metadata
    for name in (*FEATURES, "title"):
        assert ModelConfig.model_validate({f"use_{name}_emb": True}).uses_metadata


def test_every_feature_has_a_key_and_every_key_a_feature():
    keys = {key for key in ModelConfig.model_fields if key.startswith("use_")}
    assert keys == {f"use_{name}_emb" for name in (*FEATURES, "title")}


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_is_read_stored_and_used(name, tmp_path):
    feature = FEATURES[name]
    assert METADATA[feature.file] == name
    table, vocabularies, _ = table_with(name)
    assert vocabularies[name] == (["a", "b"] if feature.is_list else ["b"])
    pa.parquet.write_table(table, tmp_path / "items.parquet")
    items = read_items(str(tmp_path / "items.parquet"), {name: len(values) for name, values in vocabularies.items()})
    size, values = items.listed[name]
    assert (size, len(values.values)) == ((2, 2) if feature.is_list else (1, 1))
    assert Metadata.of(config_using(name).model, items, None).shape == {name: [size, size]}


@pytest.mark.parametrize("name", FEATURES)
def test_a_dataset_gives_every_feature(name, dataset):
    assert name in dataset.items().listed
    assert name in dataset.manifest.vocabularies


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_without_a_file_is_switched_off_and_said_to_be(name, dataset, capsys):
    config = with_features(config_using(name), dataset.manifest)
    assert not getattr(config.model, f"use_{name}_emb")
    assert f"use_{name}_emb is switched off: the data has no {FEATURES[name].file}.tsv" in capsys.readouterr().out
    new = {"data.include_new_items": "true", "model.output_features": "fused"}
    with pytest.raises(InputError, match=f"model.use_{name}_emb"):
        with_features(config_using(name, **new), dataset.manifest)
    known = dataset.manifest.model_copy(update={"vocabularies": {key: ["a"] for key in FEATURES}})
    assert getattr(with_features(config_using(name, **new), known).model, f"use_{name}_emb")


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_is_on_the_card_and_in_tensorboard(name, dataset, tmp_path):
    config = config_using(name)
    card = model_card(BERT4Rec(ModelConfig(), 4), config, dataset.manifest, dataset.items(), METRICS, "m")
    assert f"Metadata at the input: {name}." in card
    manifest = dataset.manifest.model_copy(update={"vocabularies": {key: ["a", "b"] for key in FEATURES}})
    TensorBoardLog(str(tmp_path)).close(config, manifest, METRICS, [METRICS])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert (
        f"num_{FEATURES[name].file}".encode()
        in events.summary_metadata["_hparams_/session_start_info"].SerializeToString()
    )


def test_a_column_without_values_disowns_no_model():
    """Pinned: another fingerprint, and no model that is there can be used any more."""
    table, vocabularies, _ = table_with("genre")
    assert catalogue_fingerprint(table, vocabularies) == PINNED
    for empty in (pa.array([[], [], []], pa.list_(pa.int32())), pa.nulls(3, pa.int32())):
        wider = table.append_column("of no feature", empty)
        assert catalogue_fingerprint(wider, vocabularies) == PINNED
    filled = table.append_column("of no feature", pa.array([[0], [], []], pa.list_(pa.int32())))
    assert catalogue_fingerprint(filled, vocabularies) != PINNED
    assert pc.sum(pc.is_null(table["director"])).as_py() == 3
