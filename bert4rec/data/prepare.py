"""Ratings and item metadata -> the prepared dataset of `dataset.py`; the only builder of vocabularies.

The steps run on Ray Data (`ray_data.py`). `interactions.py` cuts the files into chunks, and tasks check all of them.
Tasks then read each chunk again and encode its rows. A shuffle brings the rows of each range of user ids together,
and builds their sequences (`ranges.py`). Aggregations over the sequences count the items, find the k-core and the
cut-offs of a temporal split. At last each range is written as a file. The files are therefore in the order of users,
and their content depends neither on chunks and blocks nor on the cluster. The driver holds only summaries: item
counts and sampled users.
"""

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert4rec import lease, storage
from bert4rec.config import DataConfig, data_identity
from bert4rec.data import files, interactions
from bert4rec.data.dataset import ITEMS, InputFile, Manifest, PreparedDataset, moment_text
from bert4rec.data.ids import ascending
from bert4rec.data.interactions import Chunk, Settled
from bert4rec.data.metadata import catalogue_fingerprint, check_items, item_table, new_items, read_all_metadata
from bert4rec.data.ranges import Ranges, Vocabulary, build, count_before, encode, keep, total, write, write_parquet
from bert4rec.errors import InputError
from bert4rec.progress import track

CHUNK_BYTES = 32 << 20
"""Smallest chunk of a file. For very large inputs, chunks and ranges of users grow with the square root of the size."""
RANGE_ROWS = 1_000_000
"""Smallest number of ratings in a range of users, about."""
RECENT_SECONDS = 7 * 24 * 3600
"""How long an interaction counts as recent, for the evaluation baseline popularity-7-days."""
_SEARCHED_TIMES = 4097  # candidate times per pass over the data; three passes locate one second within a century
_SHARD_ROWS = 8192  # rows that a chunk has of a range; Ray would keep smaller objects in the driver's memory
_ROW_BYTES = 24


@dataclass(frozen=True)
class _Checked:
    """The summaries of all chunks, added up."""

    vocabulary: Vocabulary
    int_users: bool
    int_items: bool
    rows: list[int]
    """Rows of each chunk."""


@dataclass(frozen=True)
class _Totals:
    """Counts over all sequences."""

    counts: np.ndarray
    """[V] int64 interactions of each code."""
    num_users: int
    first: float
    """Time of the first interaction; infinity if the data have no times."""
    last: float
    """Time of the last interaction; minus infinity if the data have no times."""


def prepare(
    data: DataConfig,
    path: str,
    report: Callable[[str], None] = lambda line: None,
    start_ray: Callable[[], None] = lambda: None,
) -> Manifest:
    """Write the prepared dataset of `data` to `path`, unless a complete one of the same input files is there.

    Parameters
    ----------
    data
        Names the input files.
    path
        Directory of the dataset. What it holds stays usable until the new files are all there.
    report
        Called with a line at each stage.
    start_ray
        Called when the work needs Ray, which small input does not need to be found up to date.

    Raises
    ------
    InputError
        If an input file is missing or unusable, `path` is not writable, or another job is writing it.
    """
    data_dir = storage.absolute(data.data_dir)
    names = files.find_interactions(data_dir, data.data_file)
    metadata_names = files.find_metadata(data_dir)
    scans = _scan(data_dir, names, data, start_ray)
    metadata_files = {key: files.hash_file(data_dir, name) for key, name in metadata_names.items()}
    identities = [*(identity for identity, _ in scans), *metadata_files.values()]
    if (present := _up_to_date(path, identities, data)) is not None:
        report("up to date: the input files have not changed")
        return present
    start_ray()
    with lease.held(path):
        if (present := _up_to_date(path, identities, data)) is not None:  # another job has written it since
            return present
        work = partial(_write, data, path, scans, metadata_files, report)
        with _ray_data().settings():
            manifest: Manifest = _ray_data().repeated(work, report)
            return manifest


def _write(
    data: DataConfig,
    path: str,
    scans: list[tuple[InputFile, list[Chunk]]],
    metadata_files: dict[str, InputFile],
    report: Callable[[str], None],
) -> Manifest:
    data_dir = storage.absolute(data.data_dir)
    identities = [*(identity for identity, _ in scans), *metadata_files.values()]
    megabytes = sum(identity.size for identity in identities) / 1e6
    report(f"reading {len(identities)} file{'s' * (len(identities) > 1)}, {megabytes:,.1f} MB")
    metadata_names = {key: file.name for key, file in metadata_files.items()}
    metadata, dropped = read_all_metadata(data_dir, metadata_names, data.list_separator)
    has_time = _has_time([chunk for _, chunks in scans for chunk in chunks])
    source = storage.join(data_dir, data.data_file)
    if data.split == "temporal" and not has_time:
        raise InputError(f"{source}: no column time, which data.split=temporal needs")
    has_limits = data.since is not None or data.until is not None
    if has_limits and not has_time:
        raise InputError(f"{source}: no column time, which data.since and data.until need")
    checked, settled = _check(source, [chunks for _, chunks in scans])
    item_ids = checked.vocabulary.item_ids
    dropped |= settled.dropped
    if settled.times:
        report(f"times: {settled.times}")
    few = check_items(data_dir, metadata_names, metadata, item_ids)

    report(f"sorting {sum(checked.rows):,} interactions with {len(item_ids):,} items")
    sequences = _shuffle(settled.chunks, checked)
    everything = _totals(sequences, len(item_ids))
    num_unique = int(everything.counts.sum())
    if has_limits:
        sequences, everything = _between(sequences, everything, data, source)
    sequences, core = _k_core(sequences, everything, data.min_item_interactions)
    counts = core.counts
    num_interactions = int(counts.sum())
    if not num_interactions:
        raise InputError(f"{source}: data.min_item_interactions={data.min_item_interactions} leaves no interaction")
    cutoffs = _cutoffs(sequences, core, data, source) if has_time else {}
    time_origin = math.floor(core.first) if has_time else None
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]  # falling count, then ascending id
    token_of_code = np.zeros(len(counts), np.int32)
    token_of_code[order] = np.arange(1, len(order) + 1)
    ids, item_counts = item_ids.take(pa.array(order)), counts[order]
    if data.include_new_items:
        new = new_items(item_ids, metadata)
        ids, item_counts = pa.concat_arrays([ids, new]), np.append(item_counts, np.zeros(len(new), np.int64))
    items, vocabularies, notes = item_table(ids, item_counts, metadata, metadata_names, dropped)
    notes = [*settled.notes, *few, *files.unread_metadata(data_dir), *notes]
    if not has_time:
        notes.append("no column time: the order of rows is the order of interactions, and no interaction has a year")
    if num_duplicates := sum(checked.rows) - num_unique:
        notes.append(f"exact duplicates of an interaction dropped: {num_duplicates:,}")
    if num_outside := num_unique - int(everything.counts.sum()):
        notes.append(f"interactions before data.since or from data.until on left out: {num_outside:,}")
    left_out = {
        "num_core_items": np.count_nonzero(everything.counts) - len(order),
        "num_core_users": everything.num_users - core.num_users,
        "num_core_interactions": int(everything.counts.sum()) - num_interactions,
    }
    if data.min_item_interactions:
        notes.append(
            "left out by data.min_item_interactions={}: {:,} items, {:,} users, {:,} interactions".format(
                data.min_item_interactions, *left_out.values()
            )
        )

    report(f"writing {core.num_users:,} users")
    made_of = [Manifest.model_fields["format_version"].default, *(file.model_dump() for file in identities)]
    version = f"data-{storage.fingerprint([*made_of, data_identity(data)])[:8]}"
    fixed = {"token_of_code": token_of_code, "cutoffs": cutoffs, "time_origin": time_origin}
    fixed["has_year"] = settled.time_unit != "order"
    writing = _map(sequences, write, path=path, version=version, **fixed)
    tables = list(_tables_of(writing, sequences.num_blocks(), "writing"))
    written = sorted((InputFile(**row) for table in tables for row in table.to_pylist()), key=lambda file: file.name)
    written.append(write_parquet(path, f"{version}/{ITEMS}", items))
    manifest = Manifest(
        num_users=core.num_users,
        num_items=len(items),
        num_new_items=len(items) - len(order),
        identity=data_identity(data),
        num_outside=num_outside,
        **left_out,
        cutoffs=cutoffs,
        num_interactions=num_interactions,
        num_duplicates=num_duplicates,
        time_origin=time_origin,
        time_unit=settled.time_unit,
        dropped=dropped,
        catalogue=catalogue_fingerprint(items, vocabularies),
        vocabularies=vocabularies,
        notes=notes,
        inputs=identities,
        files={file.name: file.size for file in written},
        sha256={file.name: file.sha256 for file in written},
    )
    storage.commit(path, manifest.model_dump())
    storage.remove_all_but(path, {storage.MANIFEST, lease.HOLDER, version})
    return manifest


def _ray_data() -> Any:  # noqa: ANN401 - the module
    """`ray_data.py`, which imports Ray Data: a second that a job spends while Ray starts."""
    from bert4rec.data import ray_data

    return ray_data


def _map(dataset: Any, function: Callable[..., pa.Table], **arguments: Any) -> Any:  # noqa: ANN401
    """Apply `function` to each block of a dataset."""
    return dataset.map_batches(function, batch_size=None, batch_format="pyarrow", fn_kwargs=arguments)


def _tables_of(dataset: Any, num_tables: int, stage: str) -> Iterator[pa.Table]:  # noqa: ANN401
    """Execute a dataset, and yield its blocks as they come, in any order."""
    yield from track(dataset.iter_batches(batch_size=None, batch_format="pyarrow"), stage, "tasks", num_tables)


def _results_of(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], stage: str) -> Iterator[Any]:
    """Yield the results of `function` in the order of `arguments`. Each call is a task. Raise its InputError as is."""
    calls = [partial(_call, number, function, each) for number, each in enumerate(arguments)]
    results: dict[int, Any] = {}
    wanted = 0
    for table in _tables_of(_ray_data().dataset_of(calls), len(calls), stage):
        results |= {row["number"]: pickle.loads(row["result"]) for row in table.to_pylist()}
        while wanted in results:
            result = results.pop(wanted)
            if isinstance(result, InputError):
                raise result
            yield result
            wanted += 1


def _call(number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[pa.Table]:
    try:
        result = function(*arguments)
    except InputError as error:  # as a result, because Ray Data logs what a task raises as a fault of its own
        result = error
    yield pa.table({"number": [number], "result": [pickle.dumps(result)]})


def _chunk_size_for(total: float, smallest: int, shard: int) -> int:
    """Size of each chunk (or range) such that a chunk has at least `shard` of each range."""
    return max(smallest, int((total * shard) ** 0.5))


def _scan(
    data_dir: str, names: list[str], data: DataConfig, start_ray: Callable[[], None]
) -> list[tuple[InputFile, list[Chunk]]]:
    sizes = [files.size_of(data_dir, name) for name in names]
    chunk_bytes = _chunk_size_for(sum(sizes), CHUNK_BYTES, _SHARD_ROWS * _ROW_BYTES)
    arguments = [(data_dir, name, chunk_bytes, data) for name in names]
    if sum(sizes) <= CHUNK_BYTES:  # sooner done than a task of Ray Data begins
        return [interactions.scan_interactions(*each) for each in arguments]
    start_ray()
    return list(_results_of(interactions.scan_interactions, arguments, "scanning"))


def _up_to_date(path: str, identities: list[InputFile], data: DataConfig) -> Manifest | None:
    try:
        manifest = PreparedDataset(path).manifest
        if manifest.inputs == identities and manifest.identity == data_identity(data):
            return PreparedDataset(path, verify=True).manifest
    except InputError:
        return None
    return None


def _has_time(chunks: list[Chunk]) -> bool:
    without = next((chunk.path for chunk in chunks if "time" not in chunk.columns), None)
    with_time = next((chunk.path for chunk in chunks if "time" in chunk.columns), None)
    if without and with_time:
        raise InputError(f"{without}: no column time, which {with_time} has; expected the same columns in all files")
    return with_time is not None


def _check(path: str, chunks_of_files: list[list[Chunk]]) -> tuple[_Checked, Settled]:
    """Read and check every chunk.

    Raises
    ------
    InputError
        If a row is unusable: the error of the first such row.
    """
    int_users, int_items = True, True
    items, users, light = pa.array([], pa.string()), [], []
    arguments = [(chunk, interactions.SAMPLE_EVERY) for chunks in chunks_of_files for chunk in chunks]
    for summary in _results_of(interactions.check_chunk, arguments, "checking"):
        int_users, int_items = int_users and summary.int_users, int_items and summary.int_items
        items = pa.concat_arrays([items, summary.items]).unique()
        users.append(summary.user_sample)
        light.append(replace(summary, items=items[:0], user_sample=items[:0]))
    settled = interactions.settle(path, chunks_of_files, light)
    rows = [summary.num_rows for summary in light]
    item_ids = ascending(items.cast(pa.int64()) if int_items else items)
    sample = ascending(pa.concat_arrays(users).cast(pa.int64() if int_users else pa.string()))
    return _Checked(Vocabulary(item_ids, _boundaries(sample, sum(rows))), int_users, int_items, rows), settled


def _boundaries(sample: pa.Array, num_rows: int) -> pa.Array:
    """Users that divide the ratings into ranges of about equal size. The smallest user starts only the first range."""
    num_ranges = max(1, round(num_rows / _chunk_size_for(num_rows, RANGE_ROWS, _SHARD_ROWS)))
    if not len(sample):  # few rows, and blank lines before them
        return sample
    cuts = sample.take(pa.array(np.arange(1, num_ranges) * len(sample) // num_ranges)).unique()
    return cuts.filter(pc.greater(cuts, sample[0]))


def _shuffle(chunks: list[Chunk], checked: _Checked) -> Any:  # noqa: ANN401 - a dataset of ranges
    """Read all chunks again, bring the rows of each range of users together, and build their sequences."""
    num_ranges, num_rows = len(checked.vocabulary.boundaries) + 1, sum(checked.rows)
    starts = np.append(0, np.cumsum(checked.rows)).astype(np.min_scalar_type(num_rows))
    calls = [partial(_read_rows, *each, checked.int_users, checked.int_items) for each in zip(chunks, starts)]  # noqa: B905
    rows = _map(_ray_data().dataset_of(calls), encode, vocabulary=checked.vocabulary)
    if num_ranges == 1:  # one task takes all rows
        ranges = rows.map_batches(build, batch_size=num_rows, batch_format="pyarrow")
    else:
        # By hash, so that some partitions have several ranges, and others none. `sort` gives each range its own, but
        # sorts each block before the shuffle and after it, and cuts the rows of a very large range in two.
        ranges = _map(rows.repartition(num_ranges, keys=["range"]), build)
    return _ray_data().run_shuffle(ranges, "sorting", 2 * len(chunks) + num_ranges)


def _read_rows(chunk: Chunk, start: np.unsignedinteger[Any], int_users: bool, int_items: bool) -> Iterator[pa.Table]:
    """Yield the rows of a chunk with their places in the input, the first of which is `start`."""
    for table in interactions.read_chunk(chunk, int_users, int_items):
        row = np.arange(len(table), dtype=start.dtype) + start
        start += len(table)
        yield table.append_column("row", pa.array(row))


def _totals(sequences: Any, num_items: int) -> _Totals:  # noqa: ANN401
    counts, num_users, first, last = np.zeros(num_items, np.int64), 0, math.inf, -math.inf
    for table in _tables_of(_map(sequences, total), sequences.num_blocks(), "counting"):
        for code, count in zip(table["code"], table["count"], strict=True):
            counts[code.values.to_numpy()] += count.values.to_numpy()
        num_users += pc.sum(table["num_users"]).as_py()
        first, last = min(first, pc.min(table["first"]).as_py()), max(last, pc.max(table["last"]).as_py())
    return _Totals(counts, num_users, first, last)


def _between(sequences: Any, totals: _Totals, data: DataConfig, source: str) -> tuple[Any, _Totals]:  # noqa: ANN401
    """Leave out interactions before data.since or from data.until on, and users who then have none.

    Raises
    ------
    InputError
        If no interaction is left.
    """
    since, until = -math.inf if data.since is None else data.since, math.inf if data.until is None else data.until
    kept = _map(sequences, keep, which=partial(_is_between, since, until), least=1).materialize()
    left = _totals(kept, len(totals.counts))
    if not left.num_users:
        first, last = (moment_text(math.floor(time)) for time in (totals.first, totals.last))
        raise InputError(
            f"{source}: data.since={data.since} and data.until={data.until} (Unix times) leave no interaction; the "
            f"times run from {first} to {last}"
        )
    return kept, left


def _is_between(since: float, until: float, ranges: Ranges) -> np.ndarray:
    assert ranges.time is not None
    return (since <= ranges.time) & (ranges.time < until)


def _k_core(sequences: Any, totals: _Totals, k: int) -> tuple[Any, _Totals]:  # noqa: ANN401
    """Remove items, then users, with fewer than `k` interactions, and repeat until nothing changes."""
    while k:
        smaller = _map(sequences, keep, which=partial(_is_common, totals.counts >= k), least=k).materialize()
        left = _totals(smaller, len(totals.counts))
        if np.array_equal(left.counts, totals.counts):
            break
        sequences, totals = smaller, left
    return sequences, totals


def _is_common(common: np.ndarray, ranges: Ranges) -> np.ndarray:
    """Whether an interaction is with one of the `common` [V] items."""
    found: np.ndarray = common[ranges.code]
    return found


def _cutoffs(sequences: Any, totals: _Totals, data: DataConfig, source: str) -> dict[str, int]:  # noqa: ANN401
    """The manifest's cut-offs, in whole seconds.

    The validation cut-off divides the interactions before the test cut-off in the same proportion as the test cut-off
    divides all of them.

    Raises
    ------
    InputError
        If a temporal split leaves one of its three parts empty.
    """
    num_interactions = int(totals.counts.sum())
    if data.split == "leave-one-out":
        return {"recent_last": math.floor(totals.last) - RECENT_SECONDS}
    is_share = data.split_time < 1
    test = _time_of(sequences, int(data.split_time * num_interactions), totals) if is_share else int(data.split_time)
    (before_test,) = _count_before(sequences, np.array([test]))
    validation = _time_of(sequences, int(before_test**2) // num_interactions, totals)
    (before_validation,) = _count_before(sequences, np.array([validation]))
    if not 0 < before_validation < before_test < num_interactions:
        raise InputError(
            f"{source}: data.split_time={data.split_time:g} gives {before_validation:,} interactions for training, "
            f"{before_test - before_validation:,} for validation and {num_interactions - before_test:,} for test, none "
            f"of which may be 0; the times run from {math.floor(totals.first)} to {math.floor(totals.last)}"
        )
    cutoffs = {"validation": validation, "test": test}
    return cutoffs | {f"recent_{name}": time - RECENT_SECONDS for name, time in cutoffs.items()}


def _time_of(sequences: Any, rank: int, totals: _Totals) -> int:  # noqa: ANN401
    """The largest whole second with at most `rank` interactions before it."""
    low, high = math.floor(totals.first), math.floor(totals.last) + 1  # none before low, all before high
    while high - low > 1:
        times = np.unique(np.linspace(low, high, _SEARCHED_TIMES).astype(np.int64))
        place = int((_count_before(sequences, times) <= rank).sum())
        if place == len(times):
            return high
        low, high = int(times[place - 1]), int(times[place])
    return low


def _count_before(sequences: Any, times: np.ndarray) -> np.ndarray:  # noqa: ANN401
    """[C] interactions before each of the ascending `times` [C]."""
    counted = _tables_of(_map(sequences, count_before, times=times), sequences.num_blocks(), "counting times")
    rows = [table["count"].combine_chunks().values.to_numpy().reshape(-1, len(times)) for table in counted]
    total: np.ndarray = np.concatenate(rows).sum(axis=0)
    return total
