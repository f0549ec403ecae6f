"""Training that begins with the weights of an earlier model instead of random ones (`training.start_from`)."""

import pyarrow as pa
import torch

from bert4rec import storage
from bert4rec.config import Config
from bert4rec.data.dataset import ITEMS, Manifest
from bert4rec.data.ids import find_ids, some_of
from bert4rec.errors import InputError
from bert4rec.inference.recommender import load
from bert4rec.model.network import CONFIG, BERT4Rec

_MAY_DIFFER = {"dropout_rate", "random_mask_prob", "last_item_mask_ratio", "metadata_dropout"}
"""What is of the training alone: all else in `model.` is the network, and the same."""


def check_start(config: Config, manifest: Manifest) -> None:
    """Check before training that it can begin with the model of training.start_from.

    Raises
    ------
    InputError
        If that is no model of the same network, or saw what this training is to be validated by.
    """
    directory = config.training.start_from
    assert directory is not None
    for name in (CONFIG, ITEMS):
        if not storage.exists(storage.join(directory, name)):
            raise InputError(
                f"training.start_from={directory}: no model directory, as it has no {name}; expected one such as "
                "runs/NAME/bert4rec-40-0.1763"
            )
    old = BERT4Rec.from_pretrained(directory)
    network = config.model.model_dump()
    differing = [
        f"model.{key} was {value}, is {network[key]}"
        for key, value in old.config.model_dump().items()
        if key not in _MAY_DIFFER and value != network[key]
    ]
    if differing:
        raise InputError(f"training.start_from={directory}: another network ({'; '.join(differing)})")
    if set(old.metadata_shape) - {"title"} and old.catalogue != manifest.catalogue:
        raise InputError(
            f"training.start_from={directory}: a model with metadata, whose numbers are "
            "those of its own catalogue, and this is another one; train anew"
        )
    if not config.data.use_full_data:  # else nothing is validated
        try:
            old.check_is_held_out("validation", config.data, manifest.cutoffs, f"training.start_from={directory}")
        except InputError as error:
            raise InputError(f"{error}; without validation (data.use_full_data=true) it can go on") from None


@torch.no_grad()
def begin_from(model: BERT4Rec, directory: str, ids: pa.Array) -> None:
    """Copy the weights of a model directory. Items are matched by their ids; an item unknown to it keeps its own.

    Parameters
    ----------
    model : BERT4Rec
        Of the same network (`check_start`).
    ids : Array
        [V] its items.

    Raises
    ------
    InputError
        If no item is known, or a file is missing or damaged.
    """
    old = load(directory)
    old_ids = old.items.ids
    row = torch.from_numpy(find_ids(ids.cast(pa.string()), old_ids))
    known = row >= 0
    if not known.any():
        raise InputError(
            f"training.start_from={directory}: a model of other data: none of its {len(old_ids):,} items, such as "
            f"{some_of(old_ids)}, is among these {len(ids):,}, such as {some_of(ids)}"
        )
    assert isinstance(old.model, BERT4Rec)  # `check_start` refuses an average
    before = dict(old.model.named_parameters())
    for name, own in model.named_parameters():
        if name == "items.embedding.weight":  # padding, the items, [MASK]
            own[0], own[-1] = before[name][0], before[name][-1]
            own[1:-1][known] = before[name][1:-1][row[known]]
            own[len(own) - 1 - model.num_new_items : -1] = 0
        elif name in ("output_bias", "output_embedding"):
            own[known] = before[name][row[known]]
        else:
            own.copy_(before[name])
