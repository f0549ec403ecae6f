"""Ranks the held-out item of every user: the model beside the baselines, on Ray Data actors.

All that leaves a worker are counts of ranks and of recommended items, so that any order of the parts sums up to the
same. docs/evaluation.md defines the protocols, the splits and the metrics.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, assert_never

import numpy as np
import ray
import torch
from torch import Tensor

from bert4rec.cluster.resources import begin, for_scoring
from bert4rec.cluster.users import map_parts
from bert4rec.config import Baseline, Config, Protocol, QueryTime
from bert4rec.data.dataset import Part, PreparedDataset
from bert4rec.data.windows import Windows, held_out, held_out_users, training_windows
from bert4rec.errors import InputError
from bert4rec.evaluation import baselines, metrics
from bert4rec.evaluation.metrics import RankCounts
from bert4rec.evaluation.negatives import draw_negatives
from bert4rec.evaluation.protocols import BLENDED, MODEL, OTHER_QUERY, PROTOCOLS, Blended, Drawn, OtherQuery
from bert4rec.inference import fit_blend
from bert4rec.inference.item_item import FITTED
from bert4rec.inference.ranking import (
    Exclusions,
    Ranking,
    Scorer,
    load_for,
    masked,
    rank_among,
    rank_of_target,
    score_next,
    top_k,
)
from bert4rec.inference.rules import Offer, Rules, UserLists
from bert4rec.inference.selection import best_list, item_vectors_of
from bert4rec.inference.sort_lists import sort_lists
from bert4rec.model.average import Model, read_model
from bert4rec.progress import Progress, Reporter

RERANKED: Literal["re-ranked"] = "re-ranked"
"""The model's lists by `inference.max_per`, `diversity` and `min_score`."""
System = Literal["BERT4Rec"] | OtherQuery | Blended | Baseline
Lister = System | Literal["re-ranked"]
DISTANCE_STEPS = 10_000
"""Steps of a distance of 1 in which intra-list distances are counted, so that their sum is exact."""
RECOMMENDED = 10
"""Items a user that coverage, Gini, novelty and popularity are counted on."""
HISTORY_LENGTHS = {"1-9": 10, "10-49": 50, "50-199": 200, "200+": None}
"""Groups of users by the items before their target: name, and the first length beyond."""
THIRDS = ("head", "mid", "tail")
"""Groups of users by their target: `metrics.popularity_thirds`."""
FEW_USERS = 100
"""A smaller group says nothing about who ranks better."""

Metrics = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of each system, the model and the baselines, by protocol."""

    checkpoint: str
    dataset: str
    """Path of the prepared dataset."""
    fingerprint: str
    """Of the prepared dataset: rows of another one are not to be compared with these."""
    num_items: int
    num_users: int
    """Users who have a target."""
    data: dict[str, Any]
    """The settings that say what is held out, and the cut-offs of a temporal split."""
    split: str
    popularity_discount: float
    """Of the model's scores: `inference.popularity_discount`."""
    query_time: QueryTime | None
    """When `MODEL` was asked for the target: `evaluation.query_time`; None for a model that reads no times."""
    rules: dict[str, Any]
    """What the ranking has besides: `Ranking.identity`."""
    is_among_candidates: bool
    """Whether targets are ranked among what the rules allow: `evaluation.candidates`."""
    num_excluded_targets: int
    """Users whose target the rules exclude, which counts as missed."""
    seed: int
    """Of the drawn negatives."""
    protocols: dict[Protocol, dict[str, Metrics]]
    """By protocol, then system: hr@K, ndcg@K, mrr."""
    by_history_length: dict[str, dict[str, dict[str, Metrics]]]
    """By protocol, group of `HISTORY_LENGTHS`, then system: num_users, hr@10, ndcg@10."""
    by_target_popularity: dict[str, dict[str, dict[str, Metrics]]]
    """The same for `THIRDS`."""
    beyond_accuracy: dict[str, Metrics]
    """By system, of each user's first ten items under protocol all; also of `RERANKED`, where a rule changes lists."""
    notes: list[str]
    """What was left out, a line each."""


def evaluate(config: Config, dataset_path: str, checkpoint: str) -> Evaluation:
    """Rank the held-out items (`evaluation.split`) by the model and by `evaluation.baselines`.

    Users with fewer than data.min_interactions items are left out, as in training.

    Raises
    ------
    InputError
        If the model belongs to another catalogue, has been trained on what it would be judged by, or there is no user
        to evaluate.
    """
    dataset = PreparedDataset(dataset_path, verify=True)
    ranking = Ranking.of(config.inference)
    model = load_for(dataset, checkpoint, ranking)  # a wrong model is found here, not in an actor
    split = evaluated_split(config)
    _check_is_held_out(config, dataset, model, checkpoint)
    ranking, blend_notes = fit_blend.settled(ranking, config, dataset, checkpoint, model)
    rules = Rules(ranking, dataset.items()) if ranking.looks_at_items else None
    names, notes = _usable_baselines(config, dataset)
    notes += blend_notes
    begin(config, meanwhile=("ray.data",))
    if config.evaluation.candidates:
        ranking, more = sort_lists(ranking, dataset)
        notes += [*(rules.notes if rules else []), *more]
    ranking = fit_blend.fit(ranking, config, dataset, checkpoint)
    use_gpu, num_workers = for_scoring(config)
    popularity, recent = _item_counts(dataset, config, num_workers)
    beside = None if ranking.blend is None else ranking.blend.model  # its weights are there already
    fit, opened = ray.remote(fit_blend.fit_to_training), (dataset.path, dataset.manifest.fingerprint)
    fitted: dict[str, ray.ObjectRef] = {
        name: fit.remote(name, config, *opened) for name in names if name in FITTED and name != beside
    }
    if fitted:
        print(f"fitting {', '.join(fitted)} on {dataset.num_items:,} items", flush=True)
        ray.wait(list(fitted.values()), num_returns=len(fitted))  # before the actors take all cores
    query_time = config.evaluation.query_time if model.reads_times else None
    systems = _systems(names, query_time, ranking)
    protocols = evaluated_protocols(config)
    keys, listers = _keys(systems, protocols), _listers(systems, ranking)
    num_groups = len(HISTORY_LENGTHS) * len(THIRDS)
    of_list = [dataset.num_items, RECOMMENDED + 1, 2 * DISTANCE_STEPS + 1]
    sizes = [num_groups * (dataset.num_items + 1)] * len(keys) + of_list * len(listers) + [len(protocols), 1, 2]
    totals = [np.zeros(size, np.int64) for size in sizes]
    with Progress("evaluating", dataset.manifest.num_users, "users") as reporter:
        counts = (popularity, recent)
        arguments = (config, *opened, checkpoint, ranking, systems, counts, fitted, use_gpu, reporter)
        for counted in map_parts(dataset.parts(), _Evaluator, arguments, num_workers, use_gpu):
            for key, total in enumerate(totals):
                of_key = counted["key"] == key
                np.add.at(total, counted["value"][of_key], counted["count"][of_key])
    *totals, short, excluded, repeated = totals
    shape = (len(HISTORY_LENGTHS), len(THIRDS), dataset.num_items + 1)
    ranks = {key: torch.from_numpy(total).view(shape) for key, total in zip(keys, totals, strict=False)}
    of_lists = [torch.from_numpy(total) for total in totals[len(keys) :]]
    lists = dict(zip(listers, zip(of_lists[::3], of_lists[1::3], of_lists[2::3], strict=True), strict=True))
    num_users = int(ranks[protocols[0], MODEL].sum())
    if num_users == 0:
        raise InputError(
            f"{dataset_path}: no user has data.min_interactions={config.data.min_interactions} items"
            + (f" before, and one after, the {split} cut-off" if config.data.split == "temporal" else "")
        )
    notes += [
        f"{protocol}: {count:,} users have fewer than {drawn.num_items} items left to draw; all of those are ranked"
        for protocol, count in zip(protocols, short.tolist(), strict=True)
        if count and (drawn := PROTOCOLS[protocol].drawn)
    ]

    notes += _note_on_repeats(int(repeated[1]), num_users, protocols)

    def by(
        groups: tuple[str, ...], counts_of: Callable[[Tensor, int], Tensor]
    ) -> dict[str, dict[str, dict[str, Metrics]]]:
        return {
            protocol: {
                group: {system: _group_metrics(counts_of(ranks[protocol, system], place)) for system in systems}
                for place, group in enumerate(groups)
            }
            for protocol in protocols
        }

    if ranking.blend is not None and ranking.blend.wanted == "auto" and split == "validation":
        notes.append("the weight of inference.blend was chosen on the very items that are ranked here")
    by_history_length = by(tuple(HISTORY_LENGTHS), lambda counts, place: counts[place].sum(0))
    notes += _notes_on_groups(by_history_length[protocols[0]], ranking)
    return Evaluation(
        checkpoint=checkpoint,
        dataset=dataset_path,
        fingerprint=dataset.manifest.fingerprint,
        num_items=dataset.num_items,
        num_users=num_users,
        data={
            **config.data.model_dump(include={"split", "holdout", "min_interactions", "min_item_interactions"}),
            "cutoffs": dataset.manifest.cutoffs if config.data.split == "temporal" else {},
        },
        split=split,
        popularity_discount=ranking.popularity_discount,
        query_time=query_time,
        rules={
            **{name: value for name, value in ranking.identity().items() if name not in _TOLD_ELSEWHERE},
            **({} if ranking.blend is None else {"blend": ranking.blend.described()}),
        },
        is_among_candidates=config.evaluation.candidates,
        num_excluded_targets=int(excluded[0]),
        seed=config.evaluation.seed,
        protocols={
            protocol: {system: RankCounts(ranks[protocol, system].sum((0, 1))).metrics() for system in systems}
            for protocol in protocols
        },
        by_history_length=by_history_length,
        by_target_popularity=by(THIRDS, lambda counts, place: counts[:, place].sum(0)),
        beyond_accuracy={
            lister: _beyond_accuracy(*lists[lister], popularity, RERANKED in listers) for lister in listers
        },
        notes=notes,
    )


def evaluated_split(config: Config) -> str:
    """The split that `evaluation.split` stands for."""
    if config.evaluation.split != "auto":
        return config.evaluation.split
    return "test" if config.data.holdout == 2 or config.data.split == "temporal" else "validation"


def evaluated_protocols(config: Config) -> list[Protocol]:
    """The protocols, each once; with seen items where `evaluation.exclude_seen` is off."""
    wanted = config.evaluation.protocols
    if not config.evaluation.exclude_seen:
        wanted = tuple(PROTOCOLS[protocol].with_seen or protocol for protocol in wanted)
    return list(dict.fromkeys(wanted))


def _check_is_held_out(config: Config, dataset: PreparedDataset, model: Model, checkpoint: str) -> None:
    split, data = evaluated_split(config), config.data
    if data.split == "leave-one-out" and split == "test" and data.holdout == 1 and config.monitor != "train_loss":
        raise InputError(
            f"evaluation.split=test: with data.holdout=1 {config.monitor} is of the test item, and has chosen the "
            "checkpoint; train with data.holdout=2, or a set number of epochs with training.monitor_metric=train_loss"
        )
    model.check_is_held_out(split, data, dataset.manifest.cutoffs, checkpoint)
    if (
        data.split == "leave-one-out"
        and split == "test"
        and data.holdout == 1
        and "auto" in config.inference.blend.values()
    ):
        raise InputError(
            "inference.blend with auto: with data.holdout=1 the weight would be chosen on the test item; train with "
            "data.holdout=2, or give the weight that was chosen there"
        )


def _note_on_repeats(num_repeats: int, num_users: int, protocols: list[Protocol]) -> list[str]:
    """A line where a protocol can not rank most targets, because the user has had them before."""
    blind = [protocol for protocol in protocols if not PROTOCOLS[protocol].drawn and not PROTOCOLS[protocol].ranks_seen]
    if not blind or num_repeats <= num_users / 2:
        return []
    return [
        f"WARNING {num_repeats:,} of {num_users:,} targets ({num_repeats / num_users:.0%}) repeat an item that the "
        f"user has had before. Protocol {blind[0]} leaves them out, so that they count as missed. "
        "evaluation.exclude_seen=false ranks them, and inference.exclude_seen=false recommends them"
    ]


def _systems(names: list[Baseline], query_time: QueryTime | None, ranking: Ranking) -> list[System]:
    """What is ranked: the model, as it is and with a blend, and the baselines, with the blend's item-item model."""
    blend = ranking.blend
    return [
        MODEL,
        *([] if query_time is None else [OTHER_QUERY[query_time][0]]),
        *([] if blend is None else [BLENDED[blend.model]]),
        *names,
        *([] if blend is None or blend.model in names else [blend.model]),
    ]


def _notes_on_groups(groups: dict[str, dict[str, Metrics]], ranking: Ranking) -> list[str]:
    """A line for each item-item model that ranks better than ours for users of some length of history."""
    ours = MODEL if ranking.blend is None else BLENDED[ranking.blend.model]
    notes = []
    for name in FITTED:
        ahead = [
            f"{group} items ({rows[name]['num_users']:,} users, {rows[name]['ndcg@10']:.4f} against "
            f"{rows[ours]['ndcg@10']:.4f})"
            for group, rows in groups.items()
            if name in rows and rows[name]["num_users"] >= FEW_USERS and rows[name]["ndcg@10"] > rows[ours]["ndcg@10"]
        ]
        if ahead:
            hint = f"; inference.blend={{{name}: auto}} adds its scores" if ranking.blend is None else ""
            notes.append(f"WARNING {name} has a higher NDCG@10 than {ours} for users with {', '.join(ahead)}{hint}")
    return notes


def _usable_baselines(config: Config, dataset: PreparedDataset) -> tuple[list[Baseline], list[str]]:
    """The baselines that can be had on this dataset, and a line for each of the others."""
    evaluation = config.evaluation
    reasons = {}
    if not dataset.manifest.cutoffs:
        reasons["popularity-7-days"] = (
            "the data has no column time" if not dataset.manifest.has_time else "run `python -m jobs.prepare` again"
        )
    if dataset.num_items > evaluation.max_baseline_items:
        reasons["ease"] = (
            f"{dataset.num_items:,} items are more than evaluation.max_baseline_items={evaluation.max_baseline_items:,}"
        )
    wanted = list(dict.fromkeys(evaluation.baselines))
    notes = [f"baseline {name} left out: {reasons[name]}" for name in wanted if name in reasons]
    return [name for name in wanted if name not in reasons], notes


_TOLD_ELSEWHERE = {"exclude_seen", "exclude_future", "popularity_discount"}


def _keys(systems: list[System], protocols: list[Protocol]) -> list[tuple[Protocol, System]]:
    """The ranks that a worker counts. Behind them it counts, for each of `_listers`, the items in its lists, the
    targets' places there and the intra-list distances."""
    return [(protocol, system) for protocol in protocols for system in systems]


def _listers(systems: list[System], ranking: Ranking) -> list[Lister]:
    """Who makes lists: the systems and, where a rule changes the model's lists, the model with these rules."""
    return [systems[0], *([RERANKED] if ranking.changes_lists else []), *systems[1:]]


def _group_metrics(counts: Tensor) -> Metrics:
    ranks = RankCounts(counts)
    if not ranks.num_users:
        return {"num_users": 0}
    return {"num_users": ranks.num_users, "hr@10": metrics.hit_rate(ranks, 10), "ndcg@10": metrics.ndcg(ranks, 10)}


def _beyond_accuracy(
    recommended: Tensor, places: Tensor, distances: Tensor, popularity: Tensor, with_accuracy: bool
) -> Metrics:
    """Metrics of lists, given counts of their items [V], of the targets' places and of distances. With accuracy: also
    hr@10 and ndcg@10 of the target in the list."""
    accuracy = RankCounts(places)
    found = {"hr@10": metrics.hit_rate(accuracy, RECOMMENDED), "ndcg@10": metrics.ndcg(accuracy, RECOMMENDED)}
    if not recommended.any():  # no user may get anything
        return found if with_accuracy else {}
    return (found if with_accuracy else {}) | {
        "coverage": metrics.coverage(recommended),
        "gini": metrics.gini(recommended),
        "novelty": metrics.novelty(recommended, popularity),
        "popularity rank": metrics.mean_popularity_rank(recommended, popularity),
        "popularity lift": metrics.popularity_lift(recommended, popularity),
        "intra-list distance": metrics.mean_of_steps(distances, DISTANCE_STEPS),
    }


class _Evaluator:
    """Ranks the users of a part."""

    def __init__(
        self,
        config: Config,
        dataset_path: str,
        fingerprint: str,
        checkpoint: str,
        ranking: Ranking,
        systems: list[System],
        item_counts: tuple[Tensor, Tensor],
        fitted: dict[str, ray.ObjectRef],
        use_gpu: bool,
        reporter: Reporter,
    ) -> None:
        self.config, self.checkpoint, self.ranking, self.reporter = config, checkpoint, ranking, reporter
        self.systems, self.plain = systems, replace(ranking, blend=None)
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.dataset = PreparedDataset(dataset_path, fingerprint=fingerprint)
        self.model = read_model(checkpoint).to(self.device)
        self.popularity, self.recent = item_counts
        self.thirds = metrics.popularity_thirds(self.popularity)
        self.fitted = {name: ray.get(reference) for name, reference in fitted.items()}
        if ranking.blend is not None:
            self.fitted[ranking.blend.model] = ranking.blend.item_weights()
        self.protocols = evaluated_protocols(config)
        self.listers = _listers(systems, ranking)
        self.rules: Rules | None = None
        if config.evaluation.candidates or RERANKED in self.listers:
            # Protocols say themselves what becomes of seen items.
            self.rules = Rules(replace(ranking, exclude_seen=False), self.dataset.items(), self.device)

    def __call__(self, part: Part) -> dict[str, np.ndarray]:
        sequences = self.dataset.read_part(part, with_times=self.model.reads_times)
        everyone, split = Windows.from_sequences(sequences), evaluated_split(self.config)
        data, query_time = self.config.data, self.config.evaluation.query_time
        gap = self.model.usual_gap
        histories, targets = held_out(everyone, data, split, sequences.before, query_time, gap)
        otherwise, _ = held_out(everyone, data, split, sequences.before, OTHER_QUERY[query_time][1], gap)
        index = held_out_users(everyone, self.config.data, split, sequences.before)
        keys = _keys(self.systems, self.protocols)
        ranks: list[list[Tensor]] = [[] for _ in keys]
        of_lists: list[list[Tensor]] = [[] for _ in range(3 * len(self.listers))]
        short, excluded, repeated = [], [], []
        rules = self.rules if self.config.evaluation.candidates else None
        lists = UserLists() if rules is None else rules.lists_of(sequences)
        for users in torch.split(torch.arange(len(histories)), self.config.inference.batch_size):
            history, target = histories.users(users), targets[users]
            length = torch.bucketize(history.lengths, torch.tensor([*HISTORY_LENGTHS.values()][:-1]), right=True)
            group = length * len(THIRDS) + self.thirds[target - 1]
            negatives = self._negatives(everyone.users(index[users]), target, part.low + index[users].numpy())
            repeated.append(_is_in(history, target[:, None] - 1, self.model.num_items).flatten().long())
            short += [
                torch.full((int((drawn < 0).any(1).sum()),), self.protocols.index(protocol))
                for protocol, drawn in negatives.items()
            ]
            asked: dict[System, Windows] = {MODEL: history, OTHER_QUERY[query_time][0]: otherwise.users(users)}
            scorers = {system: _remembered(self._scorer(system, asked.get(system, history))) for system in self.systems}
            if rules is not None:
                offer = rules.offer(history.to(self.device), sequences, index[users], lists, only_some=False)
                scorers = {system: masked(scores, offer.exclusions) for system, scores in scorers.items()}
                missed = offer.exclusions.has((target - 1).to(self.device))
                excluded.append(torch.zeros(int(missed.sum()), dtype=torch.int64))
            else:
                offer = Offer(None, self.model.num_items, Exclusions.of(None, device=self.device))
            for key, (protocol, system) in enumerate(keys):
                rank = self._rank(protocol, scorers[system], history, target, negatives)
                ranks[key].append(group * (self.model.num_items + 1) + rank - 1)
            for number, lister in enumerate(self.listers):
                best, items = self._listed(lister, scorers, history, offer)
                for place, counted in enumerate(self._of_lists(best, items, target)):
                    of_lists[3 * number + place].append(counted)
        self.reporter.advance(part.high - part.low)
        values = [*ranks, *of_lists, short, excluded, repeated]
        return _counted([torch.cat([torch.empty(0, dtype=torch.int64), *each]).numpy() for each in values])

    def _scorer(self, system: System, history: Windows) -> Scorer:
        match system:
            case "BERT4Rec" | "BERT4Rec/last" | "BERT4Rec/target":
                return score_next(self.model, history.to(self.device), self.plain)
            case "BERT4Rec+ease" | "BERT4Rec+item-knn":
                return score_next(self.model, history.to(self.device), self.ranking)
            case "item-knn" | "ease":
                scores = baselines.from_history(self.fitted[system], history)
            case "popularity":
                scores = baselines.same_for_all(self.popularity.double(), len(history))
            case "popularity-7-days":
                scores = baselines.same_for_all(self.recent.double(), len(history))
            case _:
                assert_never(system)
        return lambda low, high: scores(low, high).to(self.device)

    def _negatives(self, own: Windows, target: Tensor, user_index: np.ndarray) -> dict[Protocol, Tensor]:
        """[B, C] items, counted from 0, that each protocol draws; -1 for none."""
        return {
            protocol: self._draw(drawn, own, target, user_index)
            for protocol in self.protocols
            if (drawn := PROTOCOLS[protocol].drawn)
        }

    def _draw(self, drawn: Drawn, own: Windows, target: Tensor, user_index: np.ndarray) -> Tensor:
        match drawn.by:
            case "popularity":
                weights = self.popularity
            case "uniform":
                weights = torch.ones_like(self.popularity)
            case _:
                assert_never(drawn.by)
        match drawn.never:
            case "own":
                never = own
            case "target":
                number = torch.arange(len(target))
                never = Windows(target.int(), number, number + 1)
            case _:
                assert_never(drawn.never)
        return draw_negatives(weights, never, user_index, self.config.evaluation.seed, drawn.num_items)

    def _rank(
        self, protocol: Protocol, scores: Scorer, history: Windows, target: Tensor, negatives: dict[Protocol, Tensor]
    ) -> Tensor:
        target, num_items, among = target.to(self.device), self.model.num_items, PROTOCOLS[protocol]
        if among.drawn is None:
            seen = None if among.ranks_seen else _on(history, self.device)
            rank = rank_of_target(scores, Exclusions.of(seen, device=self.device), target, num_items)
        else:
            candidates = negatives[protocol]
            if among.drawn.never != "own" and not among.ranks_seen:
                candidates = candidates.masked_fill(_is_in(history, candidates, num_items), -1)
            rank = rank_among(scores, candidates.to(self.device), target, num_items)
        if (rank < 1).any():  # such a score is above nothing, not even itself
            raise InputError(f"{self.checkpoint}: scores of this model are no numbers")
        return rank.cpu()

    def _listed(
        self, lister: Lister, scorers: dict[System, Scorer], history: Windows, offer: Offer
    ) -> tuple[Tensor, Tensor]:
        """[B, K] scores, -inf behind the end of a list, and [B, K] items, counted from 0, of all users' first ten."""
        count = min(RECOMMENDED, self.model.num_items)
        seen = Exclusions.of(
            _on(history, self.device) if self.config.evaluation.exclude_seen else None, device=self.device
        )
        if lister != RERANKED:
            return top_k(scorers[lister], seen, len(history), self.model.num_items, count)
        assert self.rules is not None
        offer = replace(offer, exclusions=offer.exclusions.and_pairs(seen.seen_row, seen.seen_item))
        scores = score_next(self.model, history.to(self.device), self.ranking)
        return best_list(scores, offer, count, self.rules.selection, item_vectors_of(self.model))

    def _of_lists(self, best: Tensor, items: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is counted of lists [B, K]: their items; each target's place, from 0, or RECOMMENDED where it is not in
        the list; and the intra-list distance, in steps, of each list of two items or more."""
        listed = torch.isfinite(best)
        is_target = listed & (items == (target - 1).to(self.device)[:, None])
        place = torch.where(is_target.any(1), is_target.int().argmax(1), RECOMMENDED)
        distance = metrics.intra_list_distance(item_vectors_of(self.model)(items), listed)
        steps = (distance * DISTANCE_STEPS).round().long().clamp(0, 2 * DISTANCE_STEPS)
        return items[listed].cpu(), place.cpu(), steps.cpu()


def _on(windows: Windows | None, device: torch.device) -> Windows | None:
    return None if windows is None else windows.to(device)


def _is_in(histories: Windows, items: Tensor, num_items: int) -> Tensor:
    """[B, C] bool: whether each item [B, C], counted from 0, is in the history of its row."""
    row, tokens = histories.flat()
    shift = (num_items + 1) * torch.arange(len(items))
    return torch.isin(items + 1 + shift[:, None], tokens + shift[row])


def _remembered(scores: Scorer) -> Scorer:
    """The same scores; those of the last block are not computed again, of which a small catalogue has only one."""
    last: dict[tuple[int, int], Tensor] = {}

    def remembered(low: int, high: int) -> Tensor:
        if (low, high) not in last:
            last.clear()
            last[low, high] = scores(low, high)
        return last[low, high].clone()  # who ranks changes it

    return remembered


def _counted(values: list[np.ndarray]) -> dict[str, np.ndarray]:
    """How often each value occurs under each key, its place in the list."""
    counted = [np.unique(each, return_counts=True) for each in values]
    return {
        "key": np.repeat(np.arange(len(values)), [len(value) for value, _ in counted]),
        "value": np.concatenate([value for value, _ in counted]),
        "count": np.concatenate([count for _, count in counted]),
    }


class _Counter:
    """Counts the items of a part's training windows, and of the recent ones."""

    def __init__(self, config: Config, dataset_path: str, fingerprint: str) -> None:
        self.config, self.dataset = config, PreparedDataset(dataset_path, fingerprint=fingerprint)

    def __call__(self, part: Part) -> dict[str, np.ndarray]:
        sequences, data = self.dataset.read_part(part), self.config.data
        everyone = Windows.from_sequences(sequences)
        windows = [training_windows(everyone, data, sequences.before)]
        if sequences.before:
            windows.append(baselines.recent_windows(everyone, data, evaluated_split(self.config), sequences.before))
        return _counted([each.flat()[1].numpy() for each in windows])


def _item_counts(dataset: PreparedDataset, config: Config, num_workers: int) -> tuple[Tensor, Tensor]:
    """[V] int64 interactions of each item in the training data, and of the last seven days before the cut-off."""
    total = np.zeros((2, dataset.num_items), dtype=np.int64)
    arguments = (config, dataset.path, dataset.manifest.fingerprint)
    for counted in map_parts(dataset.parts(), _Counter, arguments, num_workers, use_gpu=False):
        np.add.at(total, (counted["key"], counted["value"] - 1), counted["count"])
    return torch.from_numpy(total[0]), torch.from_numpy(total[1])
