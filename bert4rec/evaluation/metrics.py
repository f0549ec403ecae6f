"""Metrics of counts of ranks and of recommended items: whole numbers, so that sums over workers are exact."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bert4rec.config import METRIC_CUTOFFS


@dataclass
class RankCounts:
    """How often each rank of the target occurred, among `num_items` items."""

    counts: Tensor
    """[num_items+1] int64; counts[r-1] users had their target at rank r, the last cell those who missed it for good."""

    @classmethod
    def empty(cls, num_items: int) -> "RankCounts":
        """No user yet."""
        return cls(torch.zeros(num_items + 1, dtype=torch.int64))

    def add(self, ranks: Tensor) -> None:
        """Count ranks [B], from 1; num_items+1 is a target that was excluded."""
        self.counts += torch.bincount(ranks.cpu() - 1, minlength=len(self.counts))

    @property
    def num_users(self) -> int:
        """Users counted."""
        return int(self.counts.sum())

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """`hr@K`, `ndcg@K` and `mrr`, each the mean over users, or nothing where no user was counted."""
        if self.num_users == 0:
            return {}
        result = {f"{prefix}hr@{k}": hit_rate(self, k) for k in METRIC_CUTOFFS}
        result |= {f"{prefix}ndcg@{k}": ndcg(self, k) for k in METRIC_CUTOFFS}
        return result | {f"{prefix}mrr": mrr(self)}


def hit_rate(ranks: RankCounts, k: int) -> float:
    """HR@K: the share of users whose target is among the first `k`."""
    return int(ranks.counts[:-1][:k].sum()) / ranks.num_users


def ndcg(ranks: RankCounts, k: int) -> float:
    """NDCG@K with one relevant item: the mean of 1 / log2(1 + rank), 0 for ranks behind `k`."""
    counts = ranks.counts[:-1][:k].double()
    return float((counts / torch.log2(torch.arange(2, len(counts) + 2, dtype=torch.float64))).sum()) / ranks.num_users


def mrr(ranks: RankCounts) -> float:
    """MRR: the mean of 1 / rank, without a cut-off."""
    counts = ranks.counts[:-1].double()
    return float((counts / torch.arange(1, len(counts) + 1, dtype=torch.float64)).sum()) / ranks.num_users


def coverage(recommended: Tensor) -> float:
    """The share of the catalogue that is recommended to anyone; `recommended` [V] counts each item's appearances."""
    return int((recommended > 0).sum()) / len(recommended)


def gini(recommended: Tensor) -> float:
    """Gini coefficient of the items' appearances [V]: 0 where all have as many, near 1 where one item has all."""
    ascending = recommended.double().sort().values
    place = torch.arange(1, len(ascending) + 1, dtype=torch.float64)
    return float(((2 * place - len(ascending) - 1) * ascending).sum() / (len(ascending) * ascending.sum()))


def mean_popularity_rank(recommended: Tensor, popularity: Tensor) -> float:
    """Mean over all appearances [V] of the item's place by falling training count [V], from 1; ties share a mean."""
    _, group, size = torch.unique(-popularity, return_inverse=True, return_counts=True)
    place = (torch.cumsum(size, 0) - (size - 1) / 2)[group].double()
    return float((recommended * place).sum() / recommended.sum())


def novelty(recommended: Tensor, popularity: Tensor) -> float:
    """Mean over all appearances [V] of the item's self-information, -log2 of its share of training interactions [V].

    An item without any counts as one with one.
    """
    information = -torch.log2(popularity.clamp(min=1).double() / popularity.sum())
    return float((recommended * information).sum() / recommended.sum())


def popularity_lift(recommended: Tensor, popularity: Tensor) -> float:
    """How much larger the mean popularity [V] of what is recommended [V] is than that of what users interact with."""
    popularity = popularity.double()
    usual = (popularity * popularity).sum() / popularity.sum()
    return float((recommended * popularity).sum() / recommended.sum() / usual) - 1


def intra_list_distance(vectors: Tensor, listed: Tensor) -> Tensor:
    """Mean of 1 - cosine over all pairs of items of a list (Ziegler et al. 2005), for lists of at least two items.

    Parameters
    ----------
    vectors : Tensor
        [B, K, D], of length 1.
    listed : Tensor
        [B, K] bool: which places of a list hold an item.

    Returns
    -------
    Tensor
        [B'] float64, of the lists that have two items or more.
    """
    count = listed.sum(1)
    vectors = (vectors.double() * listed[:, :, None])[count > 1]
    count = count[count > 1]
    # The sum over pairs follows from the length of the sum of all vectors.
    own = vectors.square().sum((1, 2))
    cosines = (vectors.sum(1).square().sum(1) - own) / (count * (count - 1))
    return 1 - cosines


def mean_of_steps(counts: Tensor, steps: int) -> float:
    """The mean of values of which counts[v] are v / steps; 0 of none."""
    total = int(counts.sum())
    return float((counts * torch.arange(len(counts))).sum()) / steps / total if total else 0.0


def popularity_thirds(popularity: Tensor) -> Tensor:
    """[V] int64: 0 (head) for the most popular items with a third of all training interactions [V], 2 (tail) for the
    least popular ones with a third, 1 for those between; an item belongs where its middle interaction lies."""
    order = torch.argsort(-popularity, stable=True)
    ends = torch.cumsum(popularity[order].double(), 0)
    middle = ends - popularity[order].double() / 2
    third = torch.empty(len(popularity), dtype=torch.int64)
    third[order] = torch.clamp((3 * middle / ends[-1]).long(), max=2)
    return third
