import ast
import re

import pytest
import yaml

from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.model.network import BERT4Rec
from bert4rec.training.card import model_card
from tests.helpers.datasets import write_dataset

pytestmark = pytest.mark.unit

SMALL = ["data.data_dir=somewhere/films", "model.hidden_units=8", "model.num_heads=2", "model.max_len=8"]


def card_of(tmp_path, *overrides, metrics=None, held_out=1):
    dataset = PreparedDataset(write_dataset(tmp_path / "d", {1: [1, 2, 3], 2: [2, 4]}, 4))
    config = load_config(None, [*SMALL, *overrides])
    model = BERT4Rec(config.model, 4)
    model.held_out = held_out
    metrics = metrics or {"epoch": 5, "train_loss": 1.25, "val_ndcg@10": 0.123456, "seconds": 3.0}
    return model, dataset, model_card(model, config, dataset.manifest, dataset.items(), metrics, "bert4rec-05-0.1235")


def test_a_card_says_what_was_trained_on_what(tmp_path):
    model, dataset, card = card_of(tmp_path, "training.lr=0.01", "model.use_genre_emb=true")
    lines = card.splitlines()
    assert lines[0] == "# bert4rec-05-0.1235"
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters: 2 blocks of width 8, 2 heads" in card
    assert "reads the last 7 items. Metadata at the input: genre." in card
    assert "`films`: 5 interactions of 2 users with 4 items. Training did not see the last item of each user." in card
    assert "somewhere" not in card
    assert f"`{dataset.manifest.fingerprint}`" in card
    assert "`train_ratings.csv` | 1 | " in card
    assert "| val_ndcg@10 | 0.1235 |" in card
    assert "| train_loss | 1.2500 |" in card
    assert "seconds" not in card
    assert "the last item of each user with 3 or more interactions, ranked among all items without" in card
    settings = yaml.safe_load(re.search("```yaml\n(.*?)```", card, re.S).group(1))
    assert settings["training"]["lr"] == 0.01
    assert settings["model"]["hidden_units"] == 8


def test_the_cards_example_names_items_of_the_catalogue(tmp_path):
    _, _, card = card_of(tmp_path)
    history, topk = re.search(r"recommend\((\[.*?\]), topk=(\d)\)", card).groups()
    assert ast.literal_eval(history) == [101, 102, 103]
    assert topk == "4"


def test_full_data_has_no_validation(tmp_path):
    _, _, card = card_of(tmp_path, "data.use_full_data=true", metrics={"epoch": 1, "train_loss": 2.0}, held_out=0)
    assert "Trained on every interaction." in card
    assert "there is no validation" in card
    assert "val_" not in card.split("## Settings")[0]


def test_the_test_item_is_named(tmp_path):
    _, _, card = card_of(tmp_path, "data.holdout=2", held_out=2)
    assert "did not see the last 2 items" in card
    assert "Validation: the last item but one of each user" in card
