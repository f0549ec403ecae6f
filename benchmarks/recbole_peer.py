"""RecBole's BERT4Rec, in an environment of its own: `python -m benchmarks.recbole_peer WORKLOAD`.

It is given one row a user, as the others are; left to itself it would make a row of every prefix of every history.
Its network has dropout inside attention, and a norm more before the logits.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config  # type: ignore[import-not-found]
from recbole.data import create_dataset  # type: ignore[import-not-found]
from recbole.data.dataloader import TrainDataLoader  # type: ignore[import-not-found]
from recbole.model.sequential_recommender import BERT4Rec  # type: ignore[import-not-found]
from recbole.trainer import Trainer  # type: ignore[import-not-found]
from recbole.utils import init_seed  # type: ignore[import-not-found]

from benchmarks.common import Histories, Meter, Workload, report

NAME = "histories"


class _TimeIsUp(Exception):  # noqa: N818 - no error
    pass


class _MeasuredBERT4Rec(BERT4Rec):  # type: ignore[misc]
    meter: Meter
    lengths: torch.Tensor | None = None

    def calculate_loss(self, interaction: Any) -> torch.Tensor:  # noqa: ANN401
        if self.lengths is not None and self.meter.add(self.lengths):  # the step before is done
            raise _TimeIsUp
        self.lengths = interaction[self.ITEM_SEQ_LEN]
        loss: torch.Tensor = super().calculate_loss(interaction)
        return loss


def write_atomic_file(histories: Histories, max_len: int, directory: Path) -> None:
    """RecBole's own format; each history needs a next item, which training does not look at."""
    directory.mkdir()
    lines = ["user_id:token\titem_id_list:token_seq\titem_id:token"]
    for user, (begin, end) in enumerate(zip(histories.offsets[:-1], histories.offsets[1:], strict=True)):
        items = histories.items[max(begin, end - max_len) : end]
        lines.append(f"{user}\t{' '.join(map(str, items))}\t{items[-1]}")
    (directory / f"{NAME}.train.inter").write_text("\n".join(lines))


def main() -> None:
    workload = Workload.from_command_line()
    torch.set_num_threads(workload.threads)
    with tempfile.TemporaryDirectory() as directory:
        write_atomic_file(Histories.load(workload.data), workload.max_len, Path(directory) / NAME)
        config = Config(
            model=_MeasuredBERT4Rec,
            dataset=NAME,
            config_dict={
                "data_path": directory,
                "checkpoint_dir": directory,
                "benchmark_filename": ["train"],
                "alias_of_item_id": ["item_id_list"],
                "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
                "MAX_ITEM_LIST_LENGTH": workload.max_len,
                "n_layers": workload.num_layers,
                "n_heads": workload.num_heads,
                "hidden_size": workload.hidden,
                "inner_size": 4 * workload.hidden,
                "hidden_dropout_prob": workload.dropout,
                "attn_dropout_prob": workload.dropout,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-12,
                "initializer_range": 0.02,
                "mask_ratio": workload.mask_prob,
                "loss_type": "CE",
                "transform": "mask_itemseq",
                "train_batch_size": workload.batch_size,
                "train_neg_sample_args": None,
                "epochs": 1_000_000,
                "seed": workload.seed,
                "use_gpu": False,
                "save_dataset": False,
                "show_progress": False,
            },
        )
        init_seed(workload.seed, reproducibility=False)
        (dataset,) = create_dataset(config).build()
        loader = TrainDataLoader(config, dataset, None, shuffle=True)
        model = _MeasuredBERT4Rec(config, dataset)
        model.meter = Meter(workload.seconds)
        try:
            Trainer(config, model).fit(loader, saved=False, verbose=False)
        except _TimeIsUp:
            report(**model.meter.result())


if __name__ == "__main__":
    main()
