"""Exports vectors of items and users, whose inner product is the model's score, for an index of nearest neighbours.

The bias is folded in: an item has its output weights and its bias, a user the projected state at the [MASK] behind the
history, and a 1. Shapes: B users, V items, D hidden_units.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bert4rec import storage
from bert4rec.cluster.resources import begin, for_scoring
from bert4rec.cluster.users import map_parts
from bert4rec.config import Config, InferenceConfig
from bert4rec.data.dataset import Part, PreparedDataset
from bert4rec.data.windows import Windows
from bert4rec.errors import InputError
from bert4rec.inference.export import refuse_blend
from bert4rec.inference.moment import read_asked, settled
from bert4rec.inference.ranking import Ranking, load_for, next_item_states
from bert4rec.inference.rules import Rules
from bert4rec.model.average import Model, read_model
from bert4rec.progress import Progress, Reporter

ITEM_VECTORS = "items.parquet"
USER_VECTORS = "users.parquet"
_UNFINISHED = "_unfinished_users"


def export_vectors(config: Config, dataset: PreparedDataset, checkpoint: str, output_path: str) -> list[str]:
    """Write items.parquet (item, vector) and users.parquet/ (user, vector), each vector [D+1] float32.

    The inner product of a user's and an item's vector is the score that `recommend` gives, with
    `inference.popularity_discount` and at the moment `inference.at`. Items that nobody may get have no row. All other
    rules are the index's user's.

    Returns
    -------
    list of str
        Lines for the user about items that have no row.

    Raises
    ------
    InputError
        If the model belongs to another catalogue, no item is left, or there is a blend.
    """
    ranking = Ranking.of(config.inference)
    refuse_blend(ranking, "the scores of an item-item model are no inner product of short vectors")
    model, items = load_for(dataset, checkpoint, ranking), dataset.items()
    inference = settled(config.inference, model, dataset)
    rules = Rules(ranking, items)
    kept, vectors = item_vectors(model, ranking, rules)
    if not len(kept):
        raise InputError("inference.candidates and inference.exclude leave no item")
    notes = list(rules.notes)
    if missing := len(items.ids) - len(kept):
        notes.append(f"items that nobody may get, or that the model cannot score, have no vector: {missing:,}")
    begin(config, meanwhile=("ray.data",))
    _write(storage.join(output_path, ITEM_VECTORS), "item", items.ids.take(pa.array(kept)), vectors)
    work = storage.join(output_path, _UNFINISHED)
    storage.remove(work)
    filesystem, inner = storage.open_store(work)
    filesystem.create_dir(inner, recursive=True)
    use_gpu, num_workers = for_scoring(config)
    with Progress("computing vectors", dataset.manifest.num_users, "users") as reporter:
        opened = (dataset.path, dataset.manifest.fingerprint)
        parts = dataset.parts()
        arguments = (inference, *opened, checkpoint, work, use_gpu, reporter)
        for _ in map_parts(parts, _UserVectors, arguments, num_workers, use_gpu):
            pass
    users = storage.join(output_path, USER_VECTORS)
    storage.remove(users)
    names = [_name_of(part) for part in parts]
    storage.move(work, users, names)
    storage.wait_until_listed(users, names)
    return notes


@torch.inference_mode()
def item_vectors(model: Model, ranking: Ranking, rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """[A] places in the catalogue of the items that somebody may get, and their vectors [A, D+1] float32."""
    weights, bias = ranking.output_weights(model)
    if rules.forbidden is not None:
        bias = bias.masked_fill(rules.forbidden, -torch.inf)
    kept = torch.isfinite(bias).nonzero().flatten()
    return kept.numpy(), torch.cat([weights[kept], bias[kept, None]], dim=1).float().numpy()


@torch.inference_mode()
def user_vectors(model: Model, histories: Windows) -> Tensor:
    """[B, D+1] float32 vectors of users with these histories."""
    states = next_item_states(model, histories)
    return torch.cat([states, torch.ones_like(states[:, :1])], dim=1)


class _UserVectors:
    """Writes the vectors of a part's users."""

    def __init__(
        self,
        inference: InferenceConfig,
        dataset_path: str,
        fingerprint: str,
        checkpoint: str,
        work: str,
        use_gpu: bool,
        reporter: Reporter,
    ) -> None:
        self.inference, self.work, self.reporter = inference, work, reporter
        self.dataset = PreparedDataset(dataset_path, fingerprint=fingerprint)
        self.model = read_model(checkpoint).to("cuda" if use_gpu else "cpu")

    def __call__(self, part: Part) -> dict[str, list[int]]:
        sequences = read_asked(self.dataset, part, self.model, self.inference)
        windows = Windows.from_sequences(sequences)
        vectors = []
        for users in torch.split(torch.arange(len(windows)), self.inference.batch_size):
            vectors.append(user_vectors(self.model, windows.users(users).to(self.model.device)).cpu().numpy())
            self.reporter.advance(len(users))
        path = storage.join(self.work, _name_of(part))
        _write(path, "user", sequences.users, np.concatenate(vectors))
        return {"num_users": [len(windows)]}


def _write(path: str, name: str, ids: pa.Array, vectors: np.ndarray) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: ids, "vector": column}), sink)
    storage.write_bytes(path, sink.getvalue())


def _name_of(part: Part) -> str:
    return f"part-{part.number:05d}.parquet"
