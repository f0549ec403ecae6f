"""Top-k for every user, on Ray Data actors, in the original ids.

Each part of the users is written by the worker that scored it, in a directory of unfinished parts, so that a rerun of
a killed job keeps what was done. The results appear in `output_path` when all parts are there, its manifest.json last.
"""

import os
import time
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from bert4rec import lease, storage
from bert4rec.cluster.resources import begin, for_scoring
from bert4rec.cluster.users import map_parts
from bert4rec.config import Config, InferenceConfig
from bert4rec.data.dataset import Part, PreparedDataset
from bert4rec.errors import InputError
from bert4rec.inference import fit_blend
from bert4rec.inference.moment import read_asked, settled
from bert4rec.inference.ranking import Ranking, load_for
from bert4rec.inference.recommender import Ranked, Recommender
from bert4rec.inference.rules import Rules
from bert4rec.inference.sort_lists import sort_lists
from bert4rec.model.average import read_model
from bert4rec.model.network import weights_of
from bert4rec.progress import Progress, Reporter

UNFINISHED = "_unfinished"
IDENTITY = "identity.json"
PARQUET = "recommendations.parquet"
CSV = "recommendations.csv"


@dataclass(frozen=True)
class RecommendResult:
    """What was written."""

    output_path: str
    num_users: int
    num_rows: int
    num_short_users: int
    """Users for whom fewer than topk items remained."""
    num_empty_users: int
    """Users for whom no item remained."""
    seconds: float


def recommend(config: Config, dataset_path: str, checkpoint: str, output_path: str) -> RecommendResult:
    """Write `recommendations.parquet/` (user, item, rank from 1, score) and `recommendations.csv` (user,item).

    Rows are sorted by user, then rank. Finished results of the same model, data and settings are left as they are.

    Raises
    ------
    InputError
        If the model belongs to another catalogue, topk is larger than it, or `output_path` cannot be written or is
        being written by another job.
    """
    began = time.monotonic()
    inference, ranking = config.inference, Ranking.of(config.inference)
    dataset = PreparedDataset(dataset_path, verify=True)
    model = load_for(dataset, checkpoint, ranking)  # a wrong model is found here, not in an actor
    inference = settled(inference, model, dataset)
    config = config.model_copy(update={"inference": inference})
    ranking, more = fit_blend.settled(ranking, config, dataset, checkpoint, model)
    notes = more + check_request(inference, dataset, output_path, ranking)
    identity = {"dataset": dataset.manifest.fingerprint, **_identity(checkpoint, inference, ranking)}
    counted = _finished(output_path, identity)
    if counted is not None:
        print(f"{output_path} is up to date")
    else:
        with lease.held(output_path):
            counted = _finished(output_path, identity)  # by another job since the line before
            counted = counted or _score(config, ranking, notes, dataset, checkpoint, output_path, identity)
    return RecommendResult(output_path=output_path, seconds=time.monotonic() - began, **counted)


def _score(
    config: Config,
    ranking: Ranking,
    notes: list[str],
    dataset: PreparedDataset,
    checkpoint: str,
    output_path: str,
    identity: dict[str, Any],
) -> dict[str, int]:
    """Score the parts that are missing, and publish all; totals of their counts."""
    begin(config, meanwhile=("ray.data",))
    ranking = fit_blend.fit(ranking, config, dataset, checkpoint)
    ranking, more = sort_lists(ranking, dataset)
    for note in [*notes, *more]:
        print(f"note: {note}")
    inference, work = config.inference, _open_work(output_path, identity)
    use_gpu, num_workers = for_scoring(config)
    parts = dataset.parts()
    missing = [part for part in parts if not _is_done(work, part, inference)]
    with Progress("scoring", dataset.manifest.num_users, "users") as reporter:
        reporter.skip(dataset.manifest.num_users - sum(part.high - part.low for part in missing))
        opened = (dataset.path, dataset.manifest.fingerprint)
        arguments = (inference, ranking, *opened, checkpoint, work, use_gpu, reporter)
        for _ in map_parts(missing, _Recommender, arguments, num_workers, use_gpu) if missing else ():
            pass
    counted = _publish(work, output_path, parts, inference)
    _commit(output_path, identity, checkpoint, counted, ranking)
    return counted


def write_few(
    ranked: list[Ranked], inference: InferenceConfig, ranking: Ranking, checkpoint: str, output_path: str
) -> RecommendResult:
    """Write what a few users got in the same form, in their order; what `output_path` holds is replaced."""
    began = time.monotonic()
    users = [batch.table["user"].to_pylist() for batch in ranked]
    identity = {"users": users, **_identity(checkpoint, inference, ranking)}
    part = Part(0, 0, sum(batch.num_users for batch in ranked))
    with lease.held(output_path):
        work = _open_work(output_path, identity)
        _write_part(work, part, ranked, inference)
        counted = _publish(work, output_path, [part], inference)
        _commit(output_path, identity, checkpoint, counted, ranking)
    return RecommendResult(output_path=output_path, seconds=time.monotonic() - began, **counted)


def _commit(
    output_path: str, identity: dict[str, Any], checkpoint: str, counts: dict[str, int], ranking: Ranking
) -> None:
    content = {"identity": identity, "checkpoint": checkpoint, "counts": counts, "files": _sizes(output_path)}
    if ranking.item_lists:  # for the report, which needs more than their contents' fingerprints
        content["lists"] = {given.key.removeprefix("inference."): list(given.paths) for given in ranking.item_lists}
    storage.commit(output_path, content)


def _finished(output_path: str, identity: dict[str, Any]) -> dict[str, int] | None:
    """Counts of the finished results of `identity`, if their files are all there as they were written."""
    path = storage.join(output_path, storage.MANIFEST)
    manifest = storage.read_json(path) if storage.exists(path) else {}
    if manifest.get("identity") != identity or manifest.get("files") != _sizes(output_path):
        return None
    counts: dict[str, int] = manifest["counts"]
    return counts


@storage.patient
def _sizes(output_path: str) -> dict[str, int]:
    """Bytes of each file of the results, by name."""
    filesystem, inner = storage.open_store(output_path)
    parts = filesystem.get_file_info(pafs.FileSelector(storage.join(inner, PARQUET), allow_not_found=True))
    found = [filesystem.get_file_info(storage.join(inner, CSV)), *parts]
    return {info.base_name: info.size for info in found if info.is_file}


def _identity(checkpoint: str, inference: InferenceConfig, ranking: Ranking) -> dict[str, Any]:
    """The model and the settings that results depend on; of a rule that is read from a file, what the file says."""
    elsewhere = {"checkpoint_path", "output_path", "num_workers", "users", "users_file", "similar_to"}
    if inference.at is None:  # results of before there was the key are still up to date
        elsewhere.add("at")
    rules, names = ranking.identity(), {rule.name for rule in fields(ranking)}
    settings = {
        key: rules.get(key, value)
        for key, value in inference.model_dump(mode="json", exclude=elsewhere).items()
        if key in rules or key not in names
    }
    identity = {"model": weights_of(checkpoint), "settings": settings}
    return identity if ranking.blend is None else identity | {"blend": ranking.blend.fitted_to}


def check_request(
    inference: InferenceConfig, dataset: PreparedDataset, output_path: str, ranking: Ranking | None = None
) -> list[str]:
    """Find out before any work what would make `recommend` fail after it. Return lines for the user about the rules.

    Raises
    ------
    InputError
        If topk is larger than the catalogue, a rule cannot be made, or `output_path` cannot be written or holds
        something else: a few users' recommendations do not replace those of all.
    """
    ranking = Ranking.of(inference) if ranking is None else ranking
    if inference.topk > dataset.num_items:
        raise InputError(
            f"inference.topk={inference.topk} is larger than the catalogue, which has {dataset.num_items} items"
        )
    manifest = storage.join(output_path, storage.MANIFEST)
    if storage.exists(manifest):
        identity = storage.read_json(manifest).get("identity")
        if identity is None or "settings" not in identity:
            raise InputError(f"{output_path}: holds something else than recommendations; choose another output_path")
        if inference.is_for_few and "dataset" in identity:
            raise InputError(
                f"{output_path}: holds the recommendations of all users, which those of a few would replace; choose "
                "another inference.output_path"
            )
    notes = Rules(ranking, dataset.items()).notes if ranking.looks_at_items else []
    storage.check_writable(output_path)
    return notes


class _Recommender:
    """Scores and writes the users of a part."""

    def __init__(
        self,
        inference: InferenceConfig,
        ranking: Ranking,
        dataset_path: str,
        fingerprint: str,
        checkpoint: str,
        work: str,
        use_gpu: bool,
        reporter: Reporter,
    ) -> None:
        self.inference, self.ranking, self.work, self.reporter = inference, ranking, work, reporter
        self.dataset = PreparedDataset(dataset_path, fingerprint=fingerprint)
        model = read_model(checkpoint).to("cuda" if use_gpu else "cpu")
        self.recommender = Recommender(model, self.dataset.items())

    def __call__(self, part: Part) -> dict[str, list[int]]:
        """Score a part and write its files; their counts."""
        ranked = []
        sequences = read_asked(self.dataset, part, self.recommender.model, self.inference)
        for batch in self.recommender.rank(sequences, self.inference, self.ranking):
            ranked.append(batch)
            self.reporter.advance(batch.num_users)
        return {name: [count] for name, count in _write_part(self.work, part, ranked, self.inference).items()}


@storage.patient
def _write_part(work: str, part: Part, ranked: list[Ranked], inference: InferenceConfig) -> dict[str, int]:
    """Write a part's files; its counts come last and mark it as whole."""
    table = pa.concat_tables([batch.table for batch in ranked])
    filesystem, inner = storage.open_store(work)
    if "parquet" in inference.formats:
        pq.write_table(table, _part_path(inner, part, "parquet"), filesystem=filesystem)
    if "csv" in inference.formats:
        with filesystem.open_output_stream(_part_path(inner, part, "csv"), compression=None) as stream:
            _write_csv(table.select(["user", "item"]), stream)
    counts = {
        "num_users": sum(batch.num_users for batch in ranked),
        "num_rows": len(table),
        "num_short_users": sum(batch.num_short_users for batch in ranked),
        "num_empty_users": sum(batch.num_empty_users for batch in ranked),
    }
    storage.write_json(_part_path(work, part, "json"), counts)
    return counts


def _part_path(work: str, part: Part, suffix: str) -> str:
    name = f"part-{part.number:05d}.{suffix}"
    return storage.join(work, PARQUET, name) if suffix == "parquet" else storage.join(work, name)


def _is_done(work: str, part: Part, inference: InferenceConfig) -> bool:
    return all(storage.exists(_part_path(work, part, suffix)) for suffix in ("json", *inference.formats))


def _open_work(output_path: str, identity: dict[str, Any]) -> str:
    """The directory of unfinished parts, emptied if they were made with anything else than `identity`."""
    work = storage.join(output_path, UNFINISHED)
    marker = storage.join(work, IDENTITY)
    if not storage.exists(marker) or storage.read_json(marker) != identity:
        storage.remove(work)
        storage.write_json(marker, identity)
    filesystem, inner = storage.open_store(storage.join(work, PARQUET))
    filesystem.create_dir(inner, recursive=True)
    return work


def _publish(work: str, output_path: str, parts: list[Part], inference: InferenceConfig) -> dict[str, int]:
    """Put the finished parts in their place; totals of their counts."""
    storage.remove(storage.join(output_path, storage.MANIFEST))  # what is there of an earlier job is no longer whole
    filesystem, inner = storage.open_store(output_path)
    inner_work = storage.join(inner, UNFINISHED)
    counts = [storage.read_json(_part_path(work, part, "json")) for part in parts]
    storage.remove(storage.join(work, IDENTITY))  # from here on a killed job begins anew
    for name in (PARQUET, CSV):
        storage.remove(storage.join(output_path, name))
    if "csv" in inference.formats:
        joined = storage.join(inner_work, CSV)
        with filesystem.open_output_stream(joined, compression=None) as stream:
            stream.write(b"user,item\n")
            for part in parts:
                with filesystem.open_input_stream(_part_path(inner_work, part, "csv"), compression=None) as source:
                    while chunk := source.read(2**24):
                        stream.write(chunk)
        filesystem.move(joined, storage.join(inner, CSV))
    if "parquet" in inference.formats:
        names = [os.path.basename(_part_path(work, part, "parquet")) for part in parts]
        storage.move(storage.join(work, PARQUET), storage.join(output_path, PARQUET), names)
        storage.wait_until_listed(storage.join(output_path, PARQUET), names)
    storage.remove(work)
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def _write_csv(table: pa.Table, stream: pa.NativeFile) -> None:
    """Rows without a header; quotes only where a value needs them (pyarrow's "needed" quotes every string)."""
    special = any(
        pa.types.is_string(column.type) and pc.any(pc.match_substring_regex(column, '[",\r\n]')).as_py()
        for column in table.columns
    )
    options = pa.csv.WriteOptions(include_header=False, quoting_style="needed" if special else "none")
    pa.csv.write_csv(table, stream, options)
