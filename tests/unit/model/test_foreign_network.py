"""The same weights in the network of another library give the same scores."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

from tests.helpers.datasets import random_histories
from tests.unit.model.test_network import NUM_ITEMS, make_model, packed

pytestmark = pytest.mark.unit


def as_bert(model):
    """Transformers' BERT with the weights of `model`; it has types of tokens, which BERT4Rec has not."""
    ours = model.config
    sizes = {"hidden_size": ours.hidden_units, "num_attention_heads": ours.num_heads, "type_vocab_size": 1}
    sizes |= {"num_hidden_layers": ours.num_layers, "intermediate_size": 4 * ours.hidden_units}
    config = BertConfig(
        **sizes, vocab_size=NUM_ITEMS + 2, max_position_embeddings=ours.max_len, layer_norm_eps=1e-5, hidden_act="gelu"
    )
    theirs = BertModel(config, add_pooling_layer=False).eval()
    state = {
        "embeddings.word_embeddings.weight": model.items.embedding.weight,
        "embeddings.position_embeddings.weight": model.position_embedding.weight,
        "embeddings.token_type_embeddings.weight": torch.zeros(1, ours.hidden_units),
    }
    of_layers = {"embeddings.LayerNorm": model.embedding_norm}
    for number, block in enumerate(model.blocks):
        of_layers |= {
            f"encoder.layer.{number}.{name}": layer
            for name, layer in {
                "attention.self.query": block.query,
                "attention.output.dense": block.attention_output,
                "attention.output.LayerNorm": block.attention_norm,
                "intermediate.dense": block.feed_forward[0],
                "output.dense": block.feed_forward[2],
                "output.LayerNorm": block.output_norm,
            }.items()
        }
        for kind in ("weight", "bias"):
            key, value = getattr(block.key_value, kind).chunk(2)
            state |= {f"encoder.layer.{number}.attention.self.key.{kind}": key}
            state |= {f"encoder.layer.{number}.attention.self.value.{kind}": value}
    state |= {
        f"{name}.{kind}": getattr(layer, kind) for name, layer in of_layers.items() for kind in ("weight", "bias")
    }
    theirs.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
    return theirs


@pytest.mark.parametrize("num_layers", [1, 3])
def test_scores_are_those_of_bert_in_transformers(num_layers):
    model = make_model(num_layers=num_layers)
    theirs, (weights, bias) = as_bert(model), model.output_weights()
    for history in random_histories(10, NUM_ITEMS, longest=12).values():
        tokens = torch.tensor([history[-12:]])
        scores = F.linear(model.project(model.encode(packed(tokens))), weights, bias)
        from_the_end = torch.arange(tokens.shape[1]).flip(0)[None]
        hidden = theirs(input_ids=tokens, position_ids=from_the_end).last_hidden_state[0]
        expected = F.linear(F.gelu(model.output_transform(hidden)), weights, bias)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
