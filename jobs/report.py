"""Shows a run on one HTML page: `python -m jobs.report [RUN] [--prepared DIR] [--recommendations DIR] [--output
FILE]`."""

import argparse
import os
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from bert4rec import storage
from bert4rec.cli import print_anything
from bert4rec.cluster.errors import first_line
from bert4rec.config import Config, InferenceConfig, load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.inference.ranking import Ranking, load_for
from bert4rec.inference.recommend import PARQUET
from bert4rec.inference.recommender import Recommender
from bert4rec.inference.sort_lists import already_sorted
from bert4rec.report.effects import SAMPLE_USERS, Effects, effects_of, has_rules
from bert4rec.report.page import SHOWN_USERS, Recommendations, render, spread
from bert4rec.runs import EVALUATION, REPORT, RUN, RUN_CONFIG, RUN_IDENTITY, newest_run


def report_run(
    run: str, prepared: str | None = None, recommendations: str | None = None, output: str | None = None
) -> str:
    """Write the page of the run directory `run`, by default as report.html in it. Return the page's path.

    Raises
    ------
    InputError
        If there is no such run, or its prepared dataset is not found.
    """
    run = storage.absolute(run)
    if not storage.exists(storage.join(run, RUN_CONFIG)):
        raise InputError(f"{run}: no run ({RUN_CONFIG} is missing); expected a directory that `jobs.train` made")
    config = load_config(storage.join(run, RUN_CONFIG))
    identity = storage.read_json(storage.join(run, RUN_IDENTITY))["dataset"]
    dataset = _find_dataset(config, run, identity, prepared)
    finished, evaluation = (_read_if_there(storage.join(run, name)) for name in (RUN, EVALUATION))
    path = storage.absolute(recommendations or config.inference.output_path or storage.join(run, "recommendations"))
    found = _find_recommendations(path, identity)
    effects = _find_effects(run, dataset, path) if isinstance(found, Recommendations) else None
    name = os.path.basename(run.rstrip("/"))
    page = render(config, dataset, name, finished, evaluation, found, effects)
    output = storage.absolute(output or storage.join(run, REPORT))
    storage.write_bytes(output, page.encode())
    print(f"report: {output}")
    return output


def _find_dataset(config: Config, run: str, identity: str, prepared: str | None) -> PreparedDataset:
    """Find the run's dataset by its fingerprint. Also search beside the run, which may have been moved with it."""
    if prepared is not None:
        places = [prepared]
    else:
        neighbours = storage.join(os.path.dirname(run.rstrip("/")), "prepared")
        filesystem, inner = storage.open_store(neighbours)
        found = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
        places = [config.prepared_path, *(storage.join(neighbours, info.base_name) for info in found)]
    for place in places:
        if storage.is_complete(place) and (dataset := PreparedDataset(place)).manifest.fingerprint == identity:
            return dataset
    raise InputError(
        f"{run}: its prepared dataset (fingerprint {identity}) is not at {' or '.join(dict.fromkeys(places))}; "
        "run `python -m jobs.prepare` with the run's data options, or name its directory by --prepared"
    )


def _find_recommendations(path: str, identity: str) -> Recommendations | str:
    """Find the recommendations, or say why the page cannot show them."""
    manifest = _read_if_there(storage.join(path, storage.MANIFEST))
    if manifest is None or "identity" not in manifest:
        return "No recommendations yet: python -m jobs.recommend writes them."
    if manifest["identity"].get("dataset") != identity:
        return "The recommendations are for other data or for a few users only; python -m jobs.recommend replaces them."
    settings = manifest["identity"]["settings"]
    if "parquet" not in settings["formats"]:
        return "The recommendations have no Parquet files: inference.formats=[parquet] writes them."
    return Recommendations(storage.join(path, PARQUET), settings, manifest["counts"]["num_short_users"])


def _find_effects(run: str, dataset: PreparedDataset, path: str) -> Effects | str | None:
    """What the rules behind the recommendations at `path` change, or why the page cannot show it; None if there are
    no rules."""
    manifest = storage.read_json(storage.join(path, storage.MANIFEST))
    settings, lists = manifest["identity"]["settings"], manifest.get("lists", {})
    inference = InferenceConfig.model_validate({**settings, **lists})
    try:
        ranking = Ranking.of(inference)
        if changed := [key for key in lists if getattr(ranking, key).digest != settings[key]]:
            return f"What the rules change is not shown: the files of inference.{changed[0]} have changed since."
        if not has_rules(ranking):
            return None
        checkpoint = manifest["checkpoint"]
        if not storage.exists(checkpoint):  # the run was moved
            checkpoint = storage.join(run, os.path.basename(checkpoint.rstrip("/")))
        recommender = Recommender(load_for(dataset, checkpoint, ranking), dataset.items(), checkpoint)
        ranking = recommender.rules(ranking).ranking
        lengths = np.concatenate([dataset.read_part(part).lengths for part in dataset.parts()])
        users = np.union1d(spread(lengths, SAMPLE_USERS), spread(lengths, SHOWN_USERS))
        return effects_of(recommender, dataset, inference, already_sorted(ranking, dataset), users)
    except InputError as error:
        return f"What the rules change is not shown: {error}."


def _read_if_there(path: str) -> dict[str, Any] | None:
    return storage.read_json(path) if storage.exists(path) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.report", description="Write a run's report, one HTML page.")
    parser.add_argument("run", nargs="?", help="directory of the run (default: the run in runs/ that finished last)")
    parser.add_argument("--prepared", help="its prepared dataset (default: found by its fingerprint)")
    parser.add_argument(
        "--recommendations", help="directory that `jobs.recommend` wrote (default: recommendations in the run)"
    )
    parser.add_argument("--output", help=f"the file to write (default: {REPORT} in the run)")
    return parser


def main() -> int:
    """Parse the arguments and write the report. Print an error as one line."""
    print_anything()
    arguments = _parser().parse_args()
    try:
        report_run(arguments.run or newest_run("runs"), arguments.prepared, arguments.recommendations, arguments.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, pa.ArrowException) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
