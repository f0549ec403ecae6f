"""Metrics of rankings by ranx: `python benchmarks/ranx_peer.py RANKINGS.npz`, in an environment that has ranx.

RANKINGS.npz: user [S], item [S] and score [S] of all ranked pairs, and target [N] of user n. Prints JSON.
"""

import itertools
import json
import sys

import numpy as np
from ranx import Qrels, Run, evaluate  # type: ignore[import-not-found]


def main() -> None:
    with np.load(sys.argv[1]) as arrays:
        user, item, score, target = (arrays[name] for name in ("user", "item", "score", "target"))
    begins = np.searchsorted(user, np.arange(len(target) + 1))
    ranked = {
        str(number): dict(zip(map(str, item[begin:end].tolist()), score[begin:end].tolist(), strict=True))
        for number, (begin, end) in enumerate(itertools.pairwise(begins.tolist()))
    }
    qrels = Qrels({str(number): {str(own): 1} for number, own in enumerate(target.tolist())})
    names = [f"{name}@{cutoff}" for name in ("hit_rate", "ndcg") for cutoff in (1, 5, 10, 20)]
    found = evaluate(qrels, Run(ranked), [*names, "mrr"])
    print(json.dumps({name.replace("hit_rate", "hr"): float(value) for name, value in found.items()}))


if __name__ == "__main__":
    main()
