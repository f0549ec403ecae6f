import itertools

import pytest
import torch

from bert4rec import storage
from bert4rec.config import load_config
from bert4rec.data.windows import training_windows
from bert4rec.errors import InputError
from bert4rec.model.batches import iter_steps
from bert4rec.model.network import BERT4Rec
from bert4rec.training.loop import learning_rate, make_optimizers, train_epoch
from tests.helpers.datasets import random_histories
from tests.unit.model.test_batches import windows_of

pytestmark = pytest.mark.unit


class NotANumberOnce(BERT4Rec):
    """Its third loss is no number, and with it every later one."""

    calls = 0

    def forward(self, *batch):
        self.calls += 1
        return super().forward(*batch) * (torch.nan if self.calls == 3 else 1)


def test_the_step_that_diverged_is_named():
    settings = ["data.batch_size=4", "model.max_len=8", "model.hidden_units=8", "training.warmup_epochs=10"]
    config = load_config(None, settings)
    windows = training_windows(windows_of(list(random_histories(40, 20).values())), config.data)
    model = NotANumberOnce(config.model, 20)
    optimizers = make_optimizers(model, config.training)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(InputError) as raised:
        train_epoch(model, windows, config, 7, optimizers, scaler)
    num_steps = -(-len(windows) // 4)
    assert model.calls == num_steps > 3
    arguments = (windows, config.data, config.model, 20, 7, 0, 1, 10**6, torch.device("cpu"))
    (third,) = next(itertools.islice(iter_steps(*arguments), 2, None)).batches
    batch = storage.fingerprint([[third.tokens.tolist(), third.labels.tolist()]])
    rate = learning_rate(config.training, 7 + 2.5 / num_steps)
    expected = f"loss of epoch 8 is nan at learning rate {rate:g}, first in step 3 of {num_steps} (batch {batch})"
    assert expected in str(raised.value)


@pytest.mark.parametrize("kind", ["adam", "adamw", "muon"])
def test_each_parameter_has_one_optimiser_and_is_trained(kind):
    settings = ["data.batch_size=8", "model.max_len=8", "model.hidden_units=8", "training.weight_decay=0.1"]
    config = load_config(None, [*settings, f"training.optimizer={kind}", "training.lr=0.01"])
    windows = training_windows(windows_of(list(random_histories(40, 20).values())), config.data)
    model = BERT4Rec(config.model, 20)
    optimizers = make_optimizers(model, config.training)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    optimized = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, optimized)) == sorted(map(id, model.parameters()))
    assert all(group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 else 0) for group in groups)
    if kind == "muon":
        by_muon = {id(parameter) for parameter in optimizers[1].param_groups[0]["params"]}
        names = {name for name, parameter in model.named_parameters() if id(parameter) in by_muon}
        layers = ("query", "key_value", "attention_output", "feed_forward.0", "feed_forward.2")
        assert names == {f"blocks.{n}.{layer}.weight" for n in range(2) for layer in layers} | {
            "output_transform.weight"
        }
    before = [parameter.detach().clone() for parameter in model.parameters()]
    losses = [
        train_epoch(model, windows, config, n, optimizers, torch.amp.GradScaler("cpu", enabled=False)) for n in range(3)
    ]
    assert losses[2]["train_loss"] < losses[0]["train_loss"]
    assert {group["lr"] for group in groups} == {losses[2]["lr"]}
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
