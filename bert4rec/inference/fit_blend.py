"""Fits what `inference.blend` needs, on Ray, unless it lies beside the model already.

The model directory gets the weights of the item-item model (`blend-HASH.safetensors`) and `blend.json`, written last:
what both were made of, and the weight that ranks best on the validation. What was made of other data, or for another
model, is made again.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import safetensors.torch
import torch

from bert4rec import lease, storage
from bert4rec.cluster.resources import begin, for_scoring
from bert4rec.cluster.users import map_parts
from bert4rec.config import Config, ItemModel
from bert4rec.data.dataset import Part, PreparedDataset
from bert4rec.data.windows import Windows, held_out, held_out_users, training_windows
from bert4rec.errors import InputError
from bert4rec.inference.blend import BLEND, Blend, stored
from bert4rec.inference.item_item import FITTED, PARAMETERS, ItemWeights
from bert4rec.inference.ranking import Exclusions, Ranking, rank_of_target, score_next
from bert4rec.model.average import Model, read_model
from bert4rec.model.network import weights_of
from bert4rec.progress import Progress, Reporter

GRID = (0.0, 0.03, 0.06, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Weights among which validation chooses; of equally good ones it takes the first."""
MOST_USERS = 50_000
"""Of more users with a validation target, an even sample chooses."""
CUTOFF = 10
"""The weight is chosen by NDCG@10."""
LEASE = f"blend.{lease.HOLDER}"


def settled(
    ranking: Ranking, config: Config, dataset: PreparedDataset, checkpoint: str, model: Model
) -> tuple[Ranking, list[str]]:
    """The ranking with what its blend depends on, found without any work, and lines for the user. `model` is that of
    the checkpoint.

    Raises
    ------
    InputError
        If auto has no validation items that the model has not seen.
    """
    blend = ranking.blend
    if blend is None:
        return ranking, []
    notes = []
    most = config.evaluation.max_baseline_items
    if blend.model == "ease" and dataset.num_items > most:
        blend = replace(blend, model="item-knn")
        notes.append(
            f"inference.blend takes item-knn instead of ease: {dataset.num_items:,} items are more than "
            f"evaluation.max_baseline_items={most:,}"
        )
    if blend.wanted == "auto":
        if config.data.use_full_data:
            raise InputError(
                f"inference.blend={{{blend.model}: auto}} chooses the weight on the validation, which "
                "data.use_full_data does not have; give a number, such as the one that was chosen without it"
            )
        try:
            model.check_is_held_out("validation", config.data, dataset.manifest.cutoffs, checkpoint)
        except InputError as error:
            raise InputError(
                f"inference.blend={{{blend.model}: auto}} chooses the weight on the validation, which this model has "
                f"seen; give a number, such as the one that was chosen for a model that had not. {error}"
            ) from None
    made_of = [_matrix_identity(blend.model, config, dataset)]
    made_of += [_weight_identity(config, checkpoint, ranking)] if blend.wanted == "auto" else []
    return replace(ranking, blend=replace(blend, fitted_to=storage.fingerprint(made_of))), notes


def fit(ranking: Ranking, config: Config, dataset: PreparedDataset, checkpoint: str) -> Ranking:
    """The `settled` ranking, ready to rank. Starts Ray only if something has to be made.

    Raises
    ------
    InputError
        If the model directory cannot be written, or nobody has a validation item.
    """
    blend = ranking.blend
    if blend is None:
        return ranking
    if (found := _up_to_date(ranking, blend, config, dataset, checkpoint, stored(checkpoint))) is not None:
        return found
    with lease.held(checkpoint, LEASE):
        return _made(ranking, blend, config, dataset, checkpoint)


def _made(ranking: Ranking, blend: Blend, config: Config, dataset: PreparedDataset, checkpoint: str) -> Ranking:
    content = stored(checkpoint)  # another job may have been here
    if (found := _up_to_date(ranking, blend, config, dataset, checkpoint, content)) is not None:
        return found
    begin(config, meanwhile=("ray.data",))
    opened = (dataset.path, dataset.manifest.fingerprint)
    if content is None or not _has_matrix(content, blend, config, dataset, checkpoint):
        why = "" if content is None else "; what lies beside the model is another, of other data, or damaged"
        print(f"fitting {blend.model} on {dataset.num_items:,} items for inference.blend{why}", flush=True)
        identity = _matrix_identity(blend.model, config, dataset)
        content = {"matrix": identity, **on_ray(_fit_and_write, blend.model, config, *opened, checkpoint)}
        _store(content, checkpoint)
    blend = replace(blend, path=storage.join(checkpoint, content["file"]))
    if blend.wanted != "auto":
        return replace(ranking, blend=blend)
    trial = replace(ranking, blend=replace(blend, weight=1.0))
    values, num_users = _ndcg_by_weight(trial, config, dataset, checkpoint)
    best = max(GRID, key=lambda weight: values[weight])  # of equal ones the first
    print(
        f"inference.blend: weight {best:g} of {blend.model} ranks best on the validation of {num_users:,} users, "
        f"NDCG@{CUTOFF} {values[best]:.4f} (without {values[0.0]:.4f})",
        flush=True,
    )
    chosen = {
        "value": best,
        "for": _weight_identity(config, checkpoint, ranking),
        f"ndcg@{CUTOFF}": {f"{weight:g}": value for weight, value in values.items()},
        "num_users": num_users,
    }
    _store(content | {"weight": chosen}, checkpoint)
    return replace(ranking, blend=replace(blend, weight=best))


def _up_to_date(
    ranking: Ranking,
    blend: Blend,
    config: Config,
    dataset: PreparedDataset,
    checkpoint: str,
    content: dict[str, Any] | None,
) -> Ranking | None:
    """The ranking with what is stored, if that is all that it needs."""
    if content is None or not _has_matrix(content, blend, config, dataset, checkpoint):
        return None
    weight = blend.weight
    if blend.wanted == "auto":
        chosen = content.get("weight")
        if chosen is None or chosen["for"] != _weight_identity(config, checkpoint, ranking):
            return None
        weight = chosen["value"]
        print(f"inference.blend: weight {weight:g} of {blend.model}, which was chosen on the validation before")
    return replace(ranking, blend=replace(blend, weight=weight, path=storage.join(checkpoint, content["file"])))


def _has_matrix(
    content: dict[str, Any], blend: Blend, config: Config, dataset: PreparedDataset, checkpoint: str
) -> bool:
    path = storage.join(checkpoint, content["file"])
    return bool(
        content["matrix"] == _matrix_identity(blend.model, config, dataset)
        and storage.exists(path)
        and storage.sha256(path) == content["sha256"]
    )


def _matrix_identity(model: ItemModel, config: Config, dataset: PreparedDataset) -> dict[str, Any]:
    """All that the item-item model's weights depend on."""
    return {
        "model": model,
        **PARAMETERS[model],
        "catalogue": dataset.manifest.catalogue,
        "dataset": dataset.manifest.fingerprint,
        **config.data.model_dump(include={"split", "holdout", "min_interactions", "use_full_data"}),
    }


def _weight_identity(config: Config, checkpoint: str, ranking: Ranking) -> dict[str, Any]:
    """All that the chosen weight depends on besides."""
    return {
        "model": weights_of(checkpoint),
        "popularity_discount": ranking.popularity_discount,
        **config.evaluation.model_dump(include={"exclude_seen", "query_time"}),
        "grid": list(GRID),
        "most_users": MOST_USERS,
    }


def _store(content: dict[str, Any], checkpoint: str) -> None:
    """Write blend.json, and remove files that it does not name."""
    storage.write_sealed(storage.join(checkpoint, BLEND), content)
    filesystem, inner = storage.open_store(checkpoint)
    for info in filesystem.get_file_info(pafs.FileSelector(inner)):
        if info.base_name.startswith("blend-") and info.base_name != content["file"]:
            storage.remove(storage.join(checkpoint, info.base_name))


def on_ray(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:  # noqa: ANN401
    """The result of a task."""
    import ray

    found: dict[str, Any] = ray.get(ray.remote(work).remote(*arguments))
    return found


def fit_to_training(model: ItemModel, config: Config, dataset_path: str, fingerprint: str) -> ItemWeights:
    """The weights of an item-item model, fitted to what training sees."""
    dataset = PreparedDataset(dataset_path, fingerprint=fingerprint)
    sequences = dataset.sequences(config.data.memory_mb)
    training = training_windows(Windows.from_sequences(sequences), config.data, sequences.before)
    return FITTED[model](training, dataset.num_items)


def stored_arrays(weights: ItemWeights) -> dict[str, torch.Tensor]:
    """The weights as `Blend.tensors` reads them."""
    if isinstance(weights, np.ndarray):
        return {"weights": torch.from_numpy(weights)}
    rows = weights.tocsr()
    arrays = {"offsets": rows.indptr, "items": rows.indices, "values": rows.data}
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def _fit_and_write(
    model: ItemModel, config: Config, dataset_path: str, fingerprint: str, checkpoint: str
) -> dict[str, Any]:
    content = safetensors.torch.save(stored_arrays(fit_to_training(model, config, dataset_path, fingerprint)))
    sha256 = hashlib.sha256(content).hexdigest()
    name = f"blend-{sha256[:16]}.safetensors"
    storage.write_bytes(storage.join(checkpoint, name), content)
    return {"file": name, "sha256": sha256}


def _ndcg_by_weight(
    ranking: Ranking, config: Config, dataset: PreparedDataset, checkpoint: str
) -> tuple[dict[float, float], int]:
    """NDCG@10 of the validation by weight, and the users that it is the mean of.

    Raises
    ------
    InputError
        If nobody has a validation item.
    """
    use_gpu, num_workers = for_scoring(config)
    counts = np.zeros((len(GRID), CUTOFF + 2), np.int64)
    step = math.ceil(dataset.manifest.num_users / MOST_USERS)
    with Progress("choosing the weight", dataset.manifest.num_users, "users") as reporter:
        arguments = (config, dataset.path, dataset.manifest.fingerprint, checkpoint, ranking, step, use_gpu, reporter)
        for counted in map_parts(dataset.parts(), _Weigher, arguments, num_workers, use_gpu):
            np.add.at(counts, (counted["weight"], counted["rank"]), counted["count"])
    num_users = int(counts[0].sum())
    if not num_users:
        raise InputError(
            f"{dataset.path}: no user has a validation item on which inference.blend={{...: auto}} could be chosen; "
            "give a number"
        )
    gains = 1 / np.log2(np.arange(1, CUTOFF + 1) + 1)
    values = {weight: float(row[1 : CUTOFF + 1] @ gains / num_users) for weight, row in zip(GRID, counts, strict=True)}
    return values, num_users


class _Weigher:
    """Ranks the validation items of a part's users under each weight."""

    def __init__(
        self,
        config: Config,
        dataset_path: str,
        fingerprint: str,
        checkpoint: str,
        ranking: Ranking,
        step: int,
        use_gpu: bool,
        reporter: Reporter,
    ) -> None:
        self.config, self.ranking, self.step, self.reporter = config, ranking, step, reporter
        self.dataset = PreparedDataset(dataset_path, fingerprint=fingerprint)
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.model = read_model(checkpoint).to(self.device)

    def __call__(self, part: Part) -> dict[str, np.ndarray]:
        """Counts of weights, by their place in the grid, and ranks, of which all beyond the cut-off are one."""
        sequences, config = self.dataset.read_part(part, self.model.reads_times), self.config
        everyone, before = Windows.from_sequences(sequences), sequences.before
        asked = config.evaluation.query_time, self.model.usual_gap
        histories, targets = held_out(everyone, config.data, "validation", before, *asked)
        index = held_out_users(everyone, config.data, "validation", before)
        sample = ((part.low + index) % self.step == 0).nonzero().flatten()
        counts = torch.zeros(len(GRID), CUTOFF + 2, dtype=torch.int64)
        for users in torch.split(sample, config.inference.batch_size):
            batch, target = histories.users(users).to(self.device), targets[users].to(self.device)
            exclusions = Exclusions.of(batch if config.evaluation.exclude_seen else None, device=self.device)
            scores = score_next(self.model, batch, self.ranking)
            for place, weight in enumerate(GRID):
                rank = rank_of_target(scores.with_weight(weight), exclusions, target, self.model.num_items)
                counts[place] += torch.bincount(rank.cpu().clamp(max=CUTOFF + 1), minlength=CUTOFF + 2)
        self.reporter.advance(part.high - part.low)
        kept = counts.numpy().nonzero()
        return {"weight": kept[0], "rank": kept[1], "count": counts.numpy()[kept]}
