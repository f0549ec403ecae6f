"""Our metrics beside those of another library on the same rankings: `python -m benchmarks.foreign CHECKPOINT --config
FILE [group.key=value ...]`.

Ranks all items for an even sample of users, through the code that evaluation uses, and gives the scores to ranx, which
sorts them itself and knows nothing of our metrics. Fails if a figure differs in a digit that is printed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import add_record, environment, publish
from bert4rec.config import Config, load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.windows import Windows, held_out
from bert4rec.evaluation.evaluate import evaluated_split
from bert4rec.evaluation.metrics import RankCounts
from bert4rec.inference.blend import read
from bert4rec.inference.ranking import Exclusions, Ranking, load_for, rank_of_target, score_next

RANX = "ranx==0.3.21"
BATCH = 256


def rankings(config: Config, checkpoint: str, num_users: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Our metrics, and all scores that they are of: user [S], item [S], score [S], target [N]."""
    dataset, ranking = PreparedDataset(config.prepared_path), Ranking.of(config.inference)
    model = load_for(dataset, checkpoint, ranking)
    if ranking.blend is not None:
        ranking = Ranking(blend=read(ranking.blend, checkpoint, model, ranking.popularity_discount))
    sequences = dataset.sequences(with_times=model.reads_times)
    asked = config.evaluation.query_time, model.usual_gap
    windows = Windows.from_sequences(sequences)
    histories, targets = held_out(windows, config.data, evaluated_split(config), sequences.before, *asked)
    sample = torch.linspace(0, len(targets) - 1, min(num_users, len(targets))).long()
    counts, found = RankCounts.empty(model.num_items), []
    for place, users in enumerate(torch.split(sample, BATCH)):
        own, target = histories.users(users), targets[users]
        exclusions, scores = Exclusions.of(own), score_next(model, own, ranking)
        counts.add(rank_of_target(scores, exclusions, target, model.num_items))
        block = exclusions.apply(scores(0, model.num_items).clone())
        row, item = torch.isfinite(block).nonzero(as_tuple=True)
        found.append((row + BATCH * place, item + 1, block[row, item]))
    names = ("user", "item", "score")
    given = {name: torch.cat([each[place] for each in found]).numpy() for place, name in enumerate(names)}
    return counts.metrics(), given | {"target": targets[sample].numpy()}


def of_ranx(given: dict[str, np.ndarray], python: str) -> dict[str, float]:
    """The same metrics by ranx."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rankings.npz"
        np.savez(path, allow_pickle=True, **given)
        peer = str(Path(__file__).parent / "ranx_peer.py")
        done = subprocess.run([python, peer, str(path)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ranx failed:\n{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Our metrics beside those of ranx.")
    parser.add_argument("checkpoint", help="a model directory")
    parser.add_argument("--config", help="YAML file that it was trained with")
    parser.add_argument("--users", type=int, default=1000, help="an even sample of so many")
    parser.add_argument("--python", help=f"a Python that has {RANX} (default: one is made)")
    parser.add_argument("overrides", nargs="*", metavar="group.key=value")
    add_record(parser)
    args = parser.parse_intermixed_args()
    ours, given = rankings(load_config(args.config, args.overrides), args.checkpoint, args.users)
    theirs = of_ranx(given, args.python or environment("ranx-0.3.21", [RANX]))
    rows = [{"metric": name, "ours": f"{value:.6f}", "ranx": f"{theirs[name]:.6f}"} for name, value in ours.items()]
    notes = [f"{len(given['target']):,} users, {len(given['item']):,} scores, all items without the seen ones; {RANX}."]
    publish("foreign", notes, rows, args.record)
    if differing := [row for row in rows if row["ours"] != row["ranx"]]:
        sys.exit(f"differs: {differing}")


if __name__ == "__main__":
    main()
