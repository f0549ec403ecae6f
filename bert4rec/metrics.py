"""Ranking metrics as counts of ranks: whole numbers, so that sums over workers and batches are exact."""

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
