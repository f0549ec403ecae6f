"""When recommendations are asked for (`inference.at`)."""

import time

from bert4rec.config import InferenceConfig
from bert4rec.data.dataset import Part, PreparedDataset, Sequences, check_is_after
from bert4rec.model.average import Model


def moment_asked(inference: InferenceConfig, model: Model, last: int | None) -> int | None:
    """Unix seconds of `inference.at`; None if it is not set and the model reads no times.

    Parameters
    ----------
    last
        Time of the last interaction in the data: the default of a model that reads times.
    """
    if inference.at == "now":
        return int(time.time())
    return inference.at if inference.at is not None or not model.reads_times else last


def settled(inference: InferenceConfig, model: Model, dataset: PreparedDataset) -> InferenceConfig:
    """The same settings with the moment itself in `at`, for all users of a dataset.

    Raises
    ------
    InputError
        If that is before a user's last interaction, or the model reads times and the dataset has none.
    """
    last = dataset.time_span()[1] if dataset.manifest.has_time or model.reads_times else None
    moment = moment_asked(inference, model, last)
    if moment is not None and last is not None:
        check_is_after(moment, last)
    return inference.model_copy(update={"at": moment})


def read_asked(dataset: PreparedDataset, part: Part, model: Model, inference: InferenceConfig) -> Sequences:
    """The histories of a part, asked for their next items at the `settled` moment; with times if the model reads
    them."""
    sequences = dataset.read_part(part, with_times=model.reads_times)
    assert inference.at != "now", "workers do not look at the clock"
    return sequences if inference.at is None else sequences.asked_at(inference.at)
