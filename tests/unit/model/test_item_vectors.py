import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bert4rec import storage
from bert4rec.config import DataConfig, ModelConfig
from bert4rec.data.dataset import Ragged
from bert4rec.inference.ranking import score_next
from bert4rec.model import batches, item_vectors
from bert4rec.model.item_vectors import ItemVectors, Metadata
from bert4rec.model.network import CONFIG, WEIGHTS, BERT4Rec
from tests.unit.model.test_batches import windows_of

pytestmark = pytest.mark.unit

NUM_ITEMS = 6
GENRES = [[0, 2], [], [1], [0, 1, 2, 3, 4, 5], [5], []]
DIRECTORS = [[0], [1], [], [1], [0], []]


def ragged(lists):
    return Ragged(
        np.array([value for values in lists for value in values], np.int64),
        np.append(0, np.cumsum([len(values) for values in lists])),
    )


def metadata(genres=GENRES, directors=DIRECTORS, titles=True):
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, 5)).astype(np.float32)
    vectors[5] = 0  # without a title
    return Metadata({"genre": (6, ragged(genres)), "director": (2, ragged(directors))}, vectors if titles else None)


def config_of(fusion, **settings):
    return ModelConfig(**{"hidden_units": 8, "num_heads": 2, "max_len": 6, "metadata_fusion": fusion, **settings})


def vectors_of(fusion, data=None, **settings):
    torch.manual_seed(0)
    data = data or metadata()
    vectors = ItemVectors(config_of(fusion, **settings), NUM_ITEMS, data.shape)
    vectors.set_tables(data)
    for parameter in vectors.parameters():
        parameter.data.normal_()
    vectors.embedding.weight.data[0] = 0
    return vectors.eval()


def by_hand(vectors, token):
    """Each feature of one token, and whether it has it."""
    zero = torch.zeros(8)
    values = [[], *GENRES, []][token], [[], *DIRECTORS, []][token]
    genre = vectors.listed["genre"].weight[values[0]].mean(0) if values[0] else zero
    director = vectors.listed["director"].weight[values[1]].mean(0) if values[1] else zero
    row = torch.from_numpy(np.pad(metadata().titles, ((1, 1), (0, 0))))[token]
    title = vectors.title_projection(row) if row.any() else zero
    has = [True, bool(values[0]), bool(values[1]), bool(row.any())]
    return [vectors.embedding.weight[token], genre, director, title], has


@pytest.mark.parametrize("fusion", ["concat", "add", "gate"])
def test_fusion_equals_the_value_by_hand_for_every_token(fusion):
    vectors = vectors_of(fusion)
    tokens = torch.tensor([[3, 0, 4, 4], [7, 1, 6, 5], [2, 0, 0, 7]])
    got = vectors(tokens)
    for place in np.ndindex(*tokens.shape):
        features, has = by_hand(vectors, int(tokens[place]))
        if fusion == "add":
            expected = torch.stack(features).sum(0)
        elif fusion == "concat":
            expected = vectors.concat(torch.cat(features)) if tokens[place] else torch.zeros(8)
        else:
            logits = vectors.gate(torch.cat(features))
            weights = torch.tensor(
                [torch.exp(logit).item() if one else 0 for logit, one in zip(logits, has, strict=True)]
            )
            expected = sum(w * f for w, f in zip(weights / weights.sum(), features, strict=True))
        torch.testing.assert_close(got[place], expected, rtol=1e-4, atol=1e-5)


def test_gates_sum_to_one_and_leave_out_what_an_item_lacks():
    vectors = vectors_of("gate")
    gates = vectors.gates(torch.arange(NUM_ITEMS + 2))
    assert vectors.features == ["item", "genre", "director", "title"]
    torch.testing.assert_close(gates.sum(1), torch.ones(NUM_ITEMS + 2))
    assert gates[7].tolist() == [1, 0, 0, 0]  # [MASK]
    assert gates[0].tolist() == [1, 0, 0, 0]  # padding
    assert gates[6].tolist() == [1, 0, 0, 0]  # the item without anything
    assert (gates[1] > 0).all()
    assert gates[2][1] == 0


@pytest.mark.parametrize("fusion", ["concat", "add", "gate"])
def test_a_masked_position_does_not_see_its_items_metadata(fusion):
    """The metadata of the true item under the mask are changed: the logits there stay the same to the last bit."""

    def hidden(data):
        torch.manual_seed(0)
        model = BERT4Rec(config_of(fusion), NUM_ITEMS, metadata=data).eval()
        tokens = torch.tensor([[1, 3, NUM_ITEMS + 1]])  # item 4 stands under the mask
        return model.encode(batches.pack(tokens, None, torch.device("cpu")))

    changed = metadata([*GENRES[:3], [1], *GENRES[4:]], [*DIRECTORS[:3], [], *DIRECTORS[4:]])
    changed.titles[3] += 1
    assert torch.equal(hidden(metadata()), hidden(changed))
    seen = metadata([[1], *GENRES[1:]])  # item 1 is in the input
    assert not torch.equal(hidden(metadata()), hidden(seen))


@pytest.mark.parametrize("fusion", ["concat", "add", "gate"])
@pytest.mark.parametrize("output_features", ["ids", "fused"])
def test_each_fusion_trains_and_scores_the_same_after_a_round_trip(tmp_path, fusion, output_features):
    torch.manual_seed(0)
    config = config_of(fusion, output_features=output_features)
    data = metadata()
    model = BERT4Rec(config, NUM_ITEMS, "c", data)
    windows = windows_of([[1, 2, 3, 4, 5, 6], [3, 4, 5, 6]] * 5)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    losses = []
    for epoch in range(30):
        (step,) = batches.iter_steps(windows, DataConfig(), config, NUM_ITEMS, epoch, 0, 1, 10_000, torch.device("cpu"))
        loss = sum(model(batch) for batch in step.batches) / step.num_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert all(parameter.grad.any() for parameter in model.parameters())
    np.testing.assert_array_equal(data.titles, metadata().titles)
    assert not model.items.embedding.weight[0].any()
    model.eval()
    model.save_pretrained(str(tmp_path))
    again = BERT4Rec.from_pretrained(str(tmp_path))
    # The projected titles are those of all items at once, so the last digit may differ.
    torch.testing.assert_close(score_next(again, windows)(0, NUM_ITEMS), score_next(model, windows)(0, NUM_ITEMS))
    again.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


def save_as_earlier_versions_did(model, data, directory):
    """With the title embeddings among the weights."""
    model.save_pretrained(str(directory))
    state = load_file(directory / WEIGHTS)
    del state["items.projected_titles"], state["items.has_title"]
    state["items.titles"] = torch.from_numpy(np.pad(data.titles, ((1, 1), (0, 0))))
    save_file(state, directory / WEIGHTS)
    content = storage.read_sealed(str(directory / CONFIG))
    content["weights_sha256"] = storage.sha256(str(directory / WEIGHTS))
    storage.write_sealed(str(directory / CONFIG), content)


def test_a_directory_with_title_embeddings_is_still_read(tmp_path):
    torch.manual_seed(0)
    data, windows = metadata(), windows_of([[1, 2, 3, 4, 5, 6], [3, 4, 5, 6]])
    model = BERT4Rec(config_of("gate", output_features="fused"), NUM_ITEMS, "c", data).eval()
    save_as_earlier_versions_did(model, data, tmp_path)
    again = BERT4Rec.from_pretrained(str(tmp_path))
    assert torch.equal(score_next(again, windows)(0, NUM_ITEMS), score_next(model, windows)(0, NUM_ITEMS))


def test_title_embeddings_are_no_part_of_the_model(tmp_path):
    """Of those on disk, a model directory has the projection: zeros for padding, [MASK] and items without a title."""
    torch.manual_seed(0)
    data = metadata()
    model = BERT4Rec(config_of("add"), NUM_ITEMS, "c", data)
    assert not [name for name in model.state_dict() if "titles" in name]
    model.save_pretrained(str(tmp_path))
    state = load_file(tmp_path / WEIGHTS)
    assert "items.titles" not in state
    assert state["items.has_title"].tolist() == [False, *[True] * 5, False, False]
    with torch.no_grad():
        projected = model.items.title_projection(torch.from_numpy(data.titles[:5]))
    torch.testing.assert_close(state["items.projected_titles"][1:6], projected)
    assert not state["items.projected_titles"][[0, 6, 7]].any()


@pytest.mark.parametrize("output_features", ["ids", "fused"])
def test_blocks_of_titles_change_nothing(monkeypatch, output_features):
    """Of the loss, its gradients and the fused vectors, where the rows of a block are read again in the backward
    pass."""
    config = config_of("gate", output_features=output_features, dropout_rate=0, metadata_dropout=0)
    (step,) = batches.iter_steps(
        windows_of([[1, 2, 3, 4, 5, 6], [3, 4, 5, 6]]),
        DataConfig(),
        config,
        NUM_ITEMS,
        0,
        0,
        1,
        99,
        torch.device("cpu"),
    )

    def trained():
        torch.manual_seed(0)
        model = BERT4Rec(config, NUM_ITEMS, "c", metadata())
        loss = model(step.batches[0])
        loss.backward()
        with torch.no_grad():
            fused = model.items.fuse(torch.arange(NUM_ITEMS + 2))
        gradients = {name: own.grad for name, own in model.named_parameters()}
        return loss.detach(), fused, gradients, model.items.project_titles(torch.arange(NUM_ITEMS + 2))

    whole = trained()
    monkeypatch.setattr(item_vectors, "_ROWS_AT_ONCE", 3)
    torch.testing.assert_close(trained(), whole)


def test_fused_output_is_the_input_vector():
    model = BERT4Rec(config_of("gate", output_features="fused"), NUM_ITEMS, metadata=metadata()).eval()
    weights, _ = model.output_weights()
    assert torch.equal(weights, model.items(torch.arange(1, NUM_ITEMS + 1)))
    ids = BERT4Rec(config_of("gate"), NUM_ITEMS, metadata=metadata())
    assert torch.equal(ids.output_weights()[0], ids.items.embedding.weight[1:-1])


def test_an_item_without_interactions_keeps_a_zero_embedding_and_can_be_scored():
    torch.manual_seed(0)
    config = config_of("gate", output_features="fused", random_mask_prob=0.5)
    model = BERT4Rec(config, NUM_ITEMS, metadata=metadata(), num_new_items=2)
    windows = windows_of([[1, 2, 3, 4], [2, 4, 1]])
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    for epoch in range(20):
        (step,) = batches.iter_steps(
            windows, DataConfig(), config, NUM_ITEMS, epoch, 0, 1, 1000, torch.device("cpu"), num_new_items=2
        )
        for batch in step.batches:
            assert not ((batch.tokens == 5) | (batch.tokens == 6)).any()
        optimizer.zero_grad()
        sum(model(batch) for batch in step.batches).backward()
        optimizer.step()
    assert not model.items.embedding.weight[5:7].any()
    scores = score_next(model.eval(), windows)(0, NUM_ITEMS)
    assert scores[:, 4].std() > 0  # item 5 has genres and a title: its score depends on the user
    assert (scores[:, 5] == -torch.inf).all()  # item 6 has nothing to be scored by


def test_config_of_new_items():
    from bert4rec.config import load_config
    from bert4rec.errors import InputError

    with pytest.raises(InputError, match=r"include_new_items=true needs model\.output_features=fused"):
        load_config(None, ["data.include_new_items=true"])
    with pytest.raises(InputError, match=r"needs model\.share_embeddings=true"):
        load_config(None, ["model.output_features=fused", "model.share_embeddings=false"])
