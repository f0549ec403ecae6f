"""Ranks the held-out item of every user: the model beside the popularity baseline, on Ray Data actors."""

import numpy as np
import ray
import torch
from torch import Tensor

from bert4rec.batches import Windows, held_out, training_windows
from bert4rec.config import Config
from bert4rec.dataset import Part, PreparedDataset
from bert4rec.metrics import RankCounts
from bert4rec.model import BERT4Rec
from bert4rec.progress import Progress, Reporter
from bert4rec.scoring import Exclusions, Scorer, load_for, rank_of_target, score_next
from bert4rec.storage import InputError
from bert4rec.workers import for_scoring, map_parts

SYSTEMS = ("BERT4Rec", "popularity")


def evaluate(config: Config, dataset_path: str, checkpoint: str) -> dict[str, dict[str, float]]:
    """Metrics of the model and of the popularity baseline on the held-out item (`evaluation.split`).

    Users with fewer than data.min_interactions items are left out, as in training.

    Returns
    -------
    dict
        A row for each of `SYSTEMS`: hr@K, ndcg@K, mrr.

    Raises
    ------
    InputError
        If the model belongs to another catalogue, or there is no user to evaluate.
    """
    dataset = PreparedDataset(dataset_path, verify=True)
    model = load_for(dataset, checkpoint)  # a wrong model is found here, not in an actor
    depth = config.data.holdout if evaluated_split(config) == "validation" else 1
    if depth > model.held_out:
        raise InputError(
            f"{checkpoint}: was trained with the last {model.held_out} items of each user held out, so it has seen the "
            f"{evaluated_split(config)} item of data.holdout={config.data.holdout}; train with that holdout"
        )
    use_gpu, num_workers = for_scoring(config)
    popularity = ray.put(_training_counts(dataset, config, num_workers))
    counts = {system: RankCounts.empty(dataset.num_items) for system in SYSTEMS}
    with Progress("evaluating", dataset.manifest.num_users, "users") as reporter:
        arguments = (config, dataset_path, checkpoint, popularity, use_gpu, reporter)
        for ranks in map_parts(dataset.parts(), _Evaluator, arguments, num_workers, use_gpu):
            for system in SYSTEMS:
                counts[system].add(torch.tensor(ranks[system]))
    if counts["BERT4Rec"].num_users == 0:
        raise InputError(f"{dataset_path}: no user has data.min_interactions={config.data.min_interactions} items")
    return {system: counts[system].metrics() for system in SYSTEMS}


def evaluated_split(config: Config) -> str:
    """The split that `evaluation.split` stands for."""
    if config.evaluation.split != "auto":
        return config.evaluation.split
    return "test" if config.data.holdout == 2 else "validation"


def popularity_scores(popularity: Tensor, num_users: int) -> Scorer:
    """Every user's scores are the items' counts [V] in the training data."""
    return lambda low, high: popularity[low:high].repeat(num_users, 1)


class _Evaluator:
    """Ranks the users of a part."""

    def __init__(
        self,
        config: Config,
        dataset_path: str,
        checkpoint: str,
        popularity: ray.ObjectRef,
        use_gpu: bool,
        reporter: Reporter,
    ) -> None:
        self.config, self.reporter = config, reporter
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.dataset = PreparedDataset(dataset_path)
        self.model = BERT4Rec.from_pretrained(checkpoint).to(self.device)
        self.popularity: Tensor = ray.get(popularity).to(self.device)

    def __call__(self, part: Part) -> dict[str, np.ndarray]:
        everyone = Windows.from_sequences(self.dataset.read_part(part))
        histories, targets = held_out(everyone, self.config.data, evaluated_split(self.config))
        ranks: dict[str, list[Tensor]] = {system: [] for system in SYSTEMS}
        for users in torch.split(torch.arange(len(histories)), self.config.inference.batch_size):
            history, target = histories.users(users).to(self.device), targets[users].to(self.device)
            exclusions = Exclusions.of(history if self.config.evaluation.exclude_seen else None, device=self.device)
            scorers = (score_next(self.model, history), popularity_scores(self.popularity, len(users)))
            for system, scorer in zip(SYSTEMS, scorers, strict=True):
                ranks[system].append(rank_of_target(scorer, exclusions, target, self.model.num_items).cpu())
        self.reporter.advance(part.high - part.low)
        return {system: torch.cat([*rank, torch.empty(0, dtype=torch.int64)]).numpy() for system, rank in ranks.items()}


class _Counter:
    """Counts the items of a part's training windows."""

    def __init__(self, config: Config, dataset_path: str) -> None:
        self.config, self.dataset = config, PreparedDataset(dataset_path)

    def __call__(self, part: Part) -> dict[str, np.ndarray]:
        windows = training_windows(Windows.from_sequences(self.dataset.read_part(part)), self.config.data)
        tokens, counts = np.unique(windows.flat()[1].numpy(), return_counts=True)
        return {"token": tokens, "count": counts}


def _training_counts(dataset: PreparedDataset, config: Config, num_workers: int) -> Tensor:
    """[V] float32 interactions of each item in the training data alone."""
    total = np.zeros(dataset.num_items, dtype=np.int64)
    for counted in map_parts(dataset.parts(), _Counter, (config, dataset.path), num_workers, use_gpu=False):
        np.add.at(total, counted["token"] - 1, counted["count"])
    return torch.from_numpy(total).float()
