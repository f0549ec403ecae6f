"""Ranks held-out items by model and baselines: `python -m jobs.evaluate [--config FILE] [group.key=value ...]`."""

import os
from dataclasses import asdict

from bert4rec import storage
from bert4rec.cli import run_job
from bert4rec.config import Config
from bert4rec.evaluation.evaluate import RECOMMENDED, Evaluation, evaluate
from bert4rec.evaluation.protocols import ASKED, BLENDED, MODEL, OTHER_QUERY, PROTOCOLS
from bert4rec.model.average import checkpoint_and_output
from bert4rec.runs import EVALUATION


def evaluate_model(config: Config, checkpoint: str | None = None) -> Evaluation:
    """Print metrics of `checkpoint` (default: the config's) and of the baselines, and write them beside it."""
    checkpoint = checkpoint or checkpoint_and_output(config)[0]
    result = evaluate(config, config.prepared_path, checkpoint)
    path = storage.join(os.path.dirname(checkpoint.rstrip("/")), EVALUATION)
    storage.write_json(path, asdict(result))
    for note in result.notes:
        print(f"note: {note}")
    print(f"{_held_out(result)}; {result.num_users:,} users, {result.num_items:,} items, {checkpoint}")
    if result.popularity_discount:
        print(f"{MODEL} with inference.popularity_discount={result.popularity_discount:g}")
    if blend := result.rules.get("blend"):
        how = "chosen on the validation" if blend["is_chosen"] else "as given"
        print(
            f"{BLENDED[blend['model']]}: inference.blend adds {blend['model']} with weight {blend['weight']:g}, {how}"
        )
    if result.query_time:
        other, other_time = OTHER_QUERY[result.query_time]
        asked = ", ".join(f"{name} {ASKED[when]}" for name, when in ((MODEL, result.query_time), (other, other_time)))
        print(f"asked for the held-out item: {asked} (evaluation.query_time={result.query_time})")
    if result.is_among_candidates:
        share = result.num_excluded_targets / result.num_users
        print(
            "ranked among what the rules of inference allow (evaluation.candidates): "
            f"{result.num_excluded_targets:,} targets ({share:.1%}) are excluded and count as missed"
        )
    print(f"dataset {result.dataset}, fingerprint {result.fingerprint}")
    for protocol, rows in result.protocols.items():
        print(f"\nprotocol {protocol}: {PROTOCOLS[protocol].description}\n{table_of_metrics(rows)}")
    print(f"\nthe first {RECOMMENDED} of each user\n{table_of_metrics(result.beyond_accuracy)}")
    first = next(iter(result.protocols))
    for groups, name in ((result.by_history_length, "items before it"), (result.by_target_popularity, "popularity")):
        print(f"\nndcg@10 by the target's {name}, protocol {first}\n{_table_of_groups(groups[first])}")
    print(f"\nevaluation: {path}")
    return result


def _held_out(result: Evaluation) -> str:
    data = result.data
    if data["split"] == "temporal":
        what = f"first interaction from {data['cutoffs'][result.split]} (Unix time) on"
    else:
        what = "last item but one" if result.split == "validation" and data["holdout"] == 2 else "last item"
    core = f" of the {data['min_item_interactions']}-core" if data["min_item_interactions"] else ""
    return f"{result.split} split: each user's {what}{core}"


def _table_of_groups(groups: dict[str, dict[str, dict[str, float]]]) -> str:
    """One line per group that has users: their number, and the NDCG@10 of each system."""
    systems = list(next(iter(groups.values())))
    filled = [(group, rows) for group, rows in groups.items() if rows[systems[0]]["num_users"]]
    lines = [f"{'':<10}{'users':>13}" + "".join(f"  {system:>11}" for system in systems)]
    for group, rows in filled:
        cells = "".join(f"  {rows[system]['ndcg@10']:>{max(11, len(system))}.4f}" for system in systems)
        lines.append(f"{group:<10}{rows[systems[0]]['num_users']:>13,}{cells}")
    return "\n".join(lines)


def table_of_metrics(rows: dict[str, dict[str, float]]) -> str:
    """A table with one line per metric and one column per system in `rows`."""
    names = list(next(iter(rows.values())))
    first = max(10, *(len(name) for name in names))
    lines = [" " * first + "".join(f"  {system:>11}" for system in rows)]
    for name in names:
        cells = (f"  {metrics[name]:>{max(11, len(system))}.4f}" for system, metrics in rows.items())
        lines.append(f"{name:<{first}}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    run_job("Rank each user's held-out item by the model and by baselines.", evaluate_model)
