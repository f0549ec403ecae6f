"""RecTools' BERT4RecModel, in an environment of its own: `python -m benchmarks.rectools_peer WORKLOAD`.

Its network differs from ours where it has no options: norms come first, there is dropout inside attention and
feed-forward, and no dense layer before the logits.
"""

import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything  # type: ignore[import-not-found]
from rectools import Columns  # type: ignore[import-not-found]
from rectools.dataset import Dataset  # type: ignore[import-not-found]
from rectools.models import BERT4RecModel  # type: ignore[import-not-found]

from benchmarks.common import Histories, Meter, Workload, report


class _Measure(Callback):  # type: ignore[misc]
    """`fit` works on a copy of it."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.result: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, module: object, outputs: object, batch: Any, index: int) -> None:  # noqa: ANN401
        if self.meter.add((batch["x"] != 0).sum(1)):
            self.result = self.meter.result()
            trainer.should_stop = True


def dataset_of(histories: Histories) -> Dataset:
    lengths = histories.lengths
    place = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], lengths)
    return Dataset.construct(
        pd.DataFrame(
            {
                Columns.User: np.repeat(histories.user_ids, lengths),
                Columns.Item: histories.item_ids[histories.items - 1],
                Columns.Weight: 1,
                Columns.Datetime: pd.to_datetime(place, unit="s"),
            }
        )
    )


def model_of(workload: Workload, callback: Callback | None) -> BERT4RecModel:
    def trainer() -> Trainer:
        return Trainer(
            max_epochs=-1 if callback else 1,
            limit_train_batches=1.0 if callback else 1,
            callbacks=[callback] if callback else None,
            accelerator="cpu",
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
        )

    return BERT4RecModel(
        n_blocks=workload.num_layers,
        n_heads=workload.num_heads,
        n_factors=workload.hidden,
        dropout_rate=workload.dropout,
        mask_prob=workload.mask_prob,
        session_max_len=workload.max_len,
        batch_size=workload.batch_size if callback else 64,
        dataloader_num_workers=workload.loader_workers,
        recommend_torch_device="cpu",
        get_trainer_func=trainer,
    )


def train(workload: Workload, dataset: Dataset) -> dict[str, float]:
    model = model_of(workload, _Measure(Meter(workload.seconds))).fit(dataset)
    copies = [callback for callback in model.fit_trainer.callbacks if isinstance(callback, _Measure)]
    return copies[0].result


def recommend(workload: Workload, dataset: Dataset) -> dict[str, float]:
    """Its own default of 256 users at once."""
    model = model_of(workload, None).fit(dataset)
    users = dataset.user_id_map.external_ids
    began = time.perf_counter()
    rows = model.recommend(users, dataset, k=workload.topk, filter_viewed=True)
    return {"seconds": time.perf_counter() - began, "users": len(users), "rows": len(rows)}


def main() -> None:
    workload = Workload.from_command_line()
    torch.set_num_threads(workload.threads)
    seed_everything(workload.seed)
    dataset = dataset_of(Histories.load(workload.data))
    report(**{"training": train, "recommend": recommend}[workload.task](workload, dataset))


if __name__ == "__main__":
    main()
