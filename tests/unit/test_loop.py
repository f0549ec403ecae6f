import itertools

import pytest
import torch

from bert4rec import storage
from bert4rec.batches import iter_steps, training_windows
from bert4rec.config import load_config
from bert4rec.loop import learning_rate, make_optimizer, train_epoch
from bert4rec.model import BERT4Rec
from bert4rec.storage import InputError
from tests.datasets import random_histories
from tests.unit.test_batches import windows_of

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
    optimizer = make_optimizer(model, config.training)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(InputError) as raised:
        train_epoch(model, windows, config, 20, 0, 7, optimizer, scaler)
    num_steps = -(-len(windows) // 4)
    assert model.calls == num_steps > 3
    arguments = (windows, config.data, config.model, 20, 7, 0, 1, 10**6, torch.device("cpu"))
    (third,) = next(itertools.islice(iter_steps(*arguments), 2, None)).batches
    batch = storage.fingerprint([[third.tokens.tolist(), third.labels.tolist()]])
    rate = learning_rate(config.training, 7 + 2.5 / num_steps)
    expected = f"loss of epoch 8 is nan at learning rate {rate:g}, first in step 3 of {num_steps} (batch {batch})"
    assert expected in str(raised.value)
