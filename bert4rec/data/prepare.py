"""Ratings and item metadata -> the prepared dataset of `dataset.py`; the only builder of vocabularies.

The steps: `interactions.py` cuts the files into chunks, and tasks check all of them. Tasks then read each chunk again
and split it by ranges of user ids. For each range, one task joins the rows of all chunks and sorts them by user and
time. Once all items are counted, a task writes each range as a file of sequences in final tokens. The files are
therefore in the order of users, and their content depends neither on the chunks nor on the cluster. The driver holds
only summaries (item counts, sampled users) and references to the ranges.

The module uses plain Ray tasks, because Ray Data's own shuffle takes 2.5 times as long on 20M ratings and 8 times as
long on 1M.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.exceptions import RayTaskError

from bert4rec import lease, storage
from bert4rec.config import DataConfig, data_identity
from bert4rec.data import files, interactions
from bert4rec.data.dataset import ITEMS, InputFile, Manifest, PreparedDataset
from bert4rec.data.ids import ascending
from bert4rec.data.interactions import Chunk, Settled
from bert4rec.data.metadata import catalogue_fingerprint, check_items, item_table, new_items, read_all_metadata
from bert4rec.errors import InputError
from bert4rec.progress import track

CHUNK_BYTES = 32 << 20
"""Smallest chunk of a file. For very large inputs, chunks and ranges of users grow with the square root of the size."""
RANGE_ROWS = 1_000_000
"""Smallest number of ratings in a range of users."""
RECENT_SECONDS = 7 * 24 * 3600
"""How long an interaction counts as recent, for the evaluation baseline popularity-7-days."""
_SEARCHED_TIMES = 257  # candidate times per pass over the data; four passes locate one second within a year
_SHARD_ROWS = 8192  # rows that a chunk has of a range; Ray would keep smaller objects in the driver's memory
_ROW_BYTES = 24
_ROW_GROUP_USERS = 4096  # scoring reads parts of about this size


@dataclass(frozen=True)
class _Summary:
    """The summaries of all chunks, added up."""

    num_rows: int
    item_ids: pa.Array
    """Distinct items, ascending: int64 by number, strings by their bytes. An item's provisional code is its place
    here."""
    int_users: bool
    boundaries: pa.Array
    """First user id of each range except the first range."""


@dataclass(frozen=True)
class _Ranges:
    """Sequences of provisional codes."""

    tables: list[ray.ObjectRef]
    """One table per range of users: user, items and, if the data have them, times (float64), sorted by user and
    time."""
    counts: np.ndarray
    """[V] int64 interactions of each code."""
    num_users: int


def prepare(data: DataConfig, path: str, report: Callable[[str], None] = lambda line: None) -> Manifest:
    """Write the prepared dataset of `data` to `path`, unless a complete one of the same input files is there.

    Parameters
    ----------
    data
        Names the input files.
    path
        Directory of the dataset. What it holds stays usable until the new files are all there.
    report
        Called with a line at each stage.

    Raises
    ------
    InputError
        If an input file is missing or unusable, `path` is not writable, or another job is writing it.
    """
    data_dir = storage.absolute(data.data_dir)
    names = files.find_interactions(data_dir, data.data_file)
    metadata_names = files.find_metadata(data_dir)
    scans = _scan(data_dir, names, data)
    metadata_files = {key: files.hash_file(data_dir, name) for key, name in metadata_names.items()}
    identities = [*(identity for identity, _ in scans), *metadata_files.values()]
    if (present := _up_to_date(path, identities, data)) is not None:
        report("up to date: the input files have not changed")
        return present
    with lease.held(path):
        return _write(data, path, scans, metadata_files, report)


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
    summary, settled = _check(source, [chunks for _, chunks in scans])
    dropped |= settled.dropped
    if settled.times:
        report(f"times: {settled.times}")
    few = check_items(data_dir, metadata_names, metadata, summary.item_ids)

    report(f"sorting {summary.num_rows:,} interactions with {len(summary.item_ids):,} items")
    all_users = _shuffle(settled.chunks, summary)
    core = _k_core(all_users, data.min_item_interactions)
    counts = core.counts
    num_interactions = int(counts.sum())
    if not num_interactions:
        raise InputError(f"{source}: data.min_item_interactions={data.min_item_interactions} leaves no interaction")
    first, last = _times_of(core) if has_time else (math.inf, -math.inf)
    cutoffs = _cutoffs(core, data, source, first, last) if has_time else {}
    time_origin = math.floor(first) if has_time else None
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]  # falling count, then ascending id
    token_of_code = np.zeros(len(counts), np.int32)
    token_of_code[order] = np.arange(1, len(order) + 1)
    ids, item_counts = summary.item_ids.take(pa.array(order)), counts[order]
    if data.include_new_items:
        new = new_items(summary.item_ids, metadata)
        ids, item_counts = pa.concat_arrays([ids, new]), np.append(item_counts, np.zeros(len(new), np.int64))
    items, vocabularies, notes = item_table(ids, item_counts, metadata, metadata_names, dropped)
    notes = [*settled.notes, *few, *files.unread_metadata(data_dir), *notes]
    if not has_time:
        notes.append("no column time: the order of rows is the order of interactions, and no interaction has a year")
    if num_duplicates := summary.num_rows - int(all_users.counts.sum()):
        notes.append(f"exact duplicates of an interaction dropped: {num_duplicates:,}")
    left_out = {
        "num_core_items": len(counts) - len(order),
        "num_core_users": all_users.num_users - core.num_users,
        "num_core_interactions": int(all_users.counts.sum()) - num_interactions,
    }
    if data.min_item_interactions:
        notes.append(
            "left out by data.min_item_interactions={}: {:,} items, {:,} users, {:,} interactions".format(
                data.min_item_interactions, *left_out.values()
            )
        )

    report(f"writing {core.num_users:,} users")
    version = f"data-{storage.fingerprint([[file.model_dump() for file in identities], data_identity(data)])[:8]}"
    fixed = (token_of_code, cutoffs, time_origin, settled.time_unit != "order")
    ranges = [(path, version, number, table, *fixed) for number, table in enumerate(core.tables)]
    written = [*_results_of(_write_range, ranges, "writing"), _write_parquet(path, f"{version}/{ITEMS}", items)]
    manifest = Manifest(
        num_users=core.num_users,
        num_items=len(items),
        num_new_items=len(items) - len(order),
        identity=data_identity(data),
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


def _results_of(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], stage: str) -> Iterator[Any]:
    """Yield the results of Ray tasks in order. Raise an InputError of a task as itself, not as a RayTaskError."""
    task = ray.remote(function)
    for reference in track([task.remote(*each) for each in arguments], stage, "tasks"):
        try:
            yield ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise


def _chunk_size_for(total: float, smallest: int, shard: int) -> int:
    """Size of each chunk (or range) such that a chunk has at least `shard` of each range."""
    return max(smallest, int((total * shard) ** 0.5))


def _scan(data_dir: str, names: list[str], data: DataConfig) -> list[tuple[InputFile, list[Chunk]]]:
    sizes = [files.size_of(data_dir, name) for name in names]
    chunk_bytes = _chunk_size_for(sum(sizes), CHUNK_BYTES, _SHARD_ROWS * _ROW_BYTES)
    return list(
        _results_of(interactions.scan_interactions, [(data_dir, name, chunk_bytes, data) for name in names], "scanning")
    )


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


def _check(path: str, chunks_of_files: list[list[Chunk]]) -> tuple[_Summary, Settled]:
    """Read and check every chunk.

    Raises
    ------
    InputError
        If a row is unusable: the error of the first such row.
    """
    num_rows, int_users, int_items = 0, True, True
    items, users, light = pa.array([], pa.string()), [], []
    arguments = [(chunk,) for chunks in chunks_of_files for chunk in chunks]
    for summary in _results_of(interactions.check_chunk, arguments, "checking"):
        num_rows += summary.num_rows
        int_users, int_items = int_users and summary.int_users, int_items and summary.int_items
        items = pa.concat_arrays([items, summary.items]).unique()
        users.append(summary.user_sample)
        light.append(replace(summary, items=items[:0], user_sample=items[:0]))
    settled = interactions.settle(path, chunks_of_files, light)
    item_ids = items.cast(pa.int64()) if int_items else items
    sample = pa.concat_arrays(users).cast(pa.int64() if int_users else pa.string())
    return _Summary(num_rows, ascending(item_ids), int_users, _boundaries(ascending(sample), num_rows)), settled


def _boundaries(sample: pa.Array, num_rows: int) -> pa.Array:
    """Users that divide the ratings into ranges of about equal size. The smallest user starts only the first range."""
    num_ranges = -(-num_rows // _chunk_size_for(num_rows, RANGE_ROWS, _SHARD_ROWS))
    cuts = sample.take(pa.array(np.arange(1, num_ranges) * len(sample) // num_ranges)).unique()
    return cuts.filter(pc.greater(cuts, sample[0]))


def _shuffle(chunks: list[Chunk], summary: _Summary) -> _Ranges:
    """Shuffle the rows of all chunks into sequences by ranges of users."""
    known = ray.put(summary)
    split = ray.remote(_split).options(num_returns="streaming")
    merge = ray.remote(_merge).options(num_returns=2)
    num_ranges = len(summary.boundaries) + 1
    shards: list[list[ray.ObjectRef]] = [[] for _ in range(num_ranges)]
    for stream in track([split.remote(chunk, known) for chunk in chunks], "splitting", "chunks"):
        for number, shard in enumerate(stream):  # in file order, which interactions at equal times keep
            shards[number % num_ranges].append(shard)
    ranges, totals = [], []
    for of_range in shards:
        table, total = merge.remote(len(summary.item_ids), *of_range)
        ranges.append(table)
        totals.append(total)
    del shards, of_range  # so that Ray frees each shard once it is merged
    return _add_up(ranges, totals)


def _add_up(tables: list[ray.ObjectRef], totals: list[ray.ObjectRef]) -> _Ranges:
    counts, num_users = zip(*map(ray.get, track(totals, "sorting", "ranges")), strict=True)
    return _Ranges(tables, np.sum(counts, axis=0), sum(num_users))


def _k_core(ranges: _Ranges, k: int) -> _Ranges:
    """Remove items, then users, with fewer than `k` interactions, and repeat until nothing changes."""
    core = ray.remote(_leave_out).options(num_returns=2)
    while k:
        common = ray.put(ranges.counts >= k)
        pairs = [core.remote(table, common, k) for table in ranges.tables]
        smaller = _add_up([table for table, _ in pairs], [total for _, total in pairs])
        if np.array_equal(smaller.counts, ranges.counts):
            break
        ranges = smaller
    return ranges


def _leave_out(sequences: pa.Table, common: np.ndarray, k: int) -> tuple[pa.Table, tuple[np.ndarray, int]]:
    """Keep only the `common` [V] codes of a range, and only users with `k` of them. Return counts like `_merge`."""
    codes = sequences["items"].combine_chunks()
    offsets, code = codes.offsets.to_numpy(), codes.values.to_numpy()
    kept = common[code]
    ends = np.append(0, np.cumsum(kept))[offsets]
    enough = np.diff(ends) >= k
    kept &= np.repeat(enough, np.diff(offsets))
    lengths = np.diff(ends)[enough]
    columns = {"user": sequences["user"].filter(pa.array(enough)), "items": _lists(lengths, code[kept])}
    if "times" in sequences.column_names:
        columns["times"] = _lists(lengths, sequences["times"].combine_chunks().values.to_numpy()[kept])
    return pa.table(columns), (np.bincount(code[kept], minlength=len(common)), len(lengths))


def _times_of(ranges: _Ranges) -> tuple[float, float]:
    """First and last time of all interactions."""
    spans = list(_results_of(_time_span, [(table,) for table in ranges.tables], "reading times"))
    return min(low for low, _ in spans), max(high for _, high in spans)


def _cutoffs(ranges: _Ranges, data: DataConfig, source: str, first: float, last: float) -> dict[str, int]:
    """The manifest's cut-offs, in whole seconds, of interactions from `first` to `last`.

    The validation cut-off divides the interactions before the test cut-off in the same proportion as the test cut-off
    divides all of them.

    Raises
    ------
    InputError
        If a temporal split leaves one of its three parts empty.
    """
    num_interactions = int(ranges.counts.sum())
    if data.split == "leave-one-out":
        return {"recent_last": math.floor(last) - RECENT_SECONDS}
    is_share = data.split_time < 1
    test = _time_of(ranges, int(data.split_time * num_interactions), first, last) if is_share else int(data.split_time)
    (before_test,) = _count_before(ranges, np.array([test]))
    validation = _time_of(ranges, int(before_test**2) // num_interactions, first, last)
    (before_validation,) = _count_before(ranges, np.array([validation]))
    if not 0 < before_validation < before_test < num_interactions:
        raise InputError(
            f"{source}: data.split_time={data.split_time:g} gives {before_validation:,} interactions for training, "
            f"{before_test - before_validation:,} for validation and {num_interactions - before_test:,} for test, none "
            f"of which may be 0; the times run from {math.floor(first)} to {math.floor(last)}"
        )
    cutoffs = {"validation": validation, "test": test}
    return cutoffs | {f"recent_{name}": time - RECENT_SECONDS for name, time in cutoffs.items()}


def _time_of(ranges: _Ranges, rank: int, first: float, last: float) -> int:
    """The largest whole second with at most `rank` interactions before it."""
    low, high = math.floor(first), math.floor(last) + 1  # none before low, all before high
    while high - low > 1:
        times = np.unique(np.linspace(low, high, _SEARCHED_TIMES).astype(np.int64))
        place = int((_count_before(ranges, times) <= rank).sum())
        if place == len(times):
            return high
        low, high = int(times[place - 1]), int(times[place])
    return low


def _count_before(ranges: _Ranges, times: np.ndarray) -> np.ndarray:
    """[C] interactions before each of the ascending `times` [C]."""
    tasks = [(table, times) for table in ranges.tables]
    total: np.ndarray = np.sum(list(_results_of(_count_range_before, tasks, "counting times")), axis=0)
    return total


def _count_range_before(sequences: pa.Table, times: np.ndarray) -> np.ndarray:
    own = sequences["times"].combine_chunks().values.to_numpy()
    not_above = np.bincount(np.searchsorted(times, own, side="right"), minlength=len(times) + 1)
    return np.cumsum(not_above)[:-1]


def _time_span(sequences: pa.Table) -> tuple[float, float]:
    """First and last time of a range of users; infinities if the k-core has none of its users."""
    times = sequences["times"].combine_chunks().values.to_numpy()
    return float(times.min(initial=np.inf)), float(times.max(initial=-np.inf))


def _split(chunk: Chunk, summary: _Summary) -> Iterator[pa.Table]:
    """Yield, for each piece of a chunk, the rows of each range in turn: user, code and, if the data have it, time."""
    num_ranges = len(summary.boundaries) + 1
    for table in interactions.read_chunk(chunk, summary.int_users, pa.types.is_integer(summary.item_ids.type)):
        users, items = (_encode(table[name]) for name in ("user", "item"))
        code = pc.index_in(items.dictionary, summary.item_ids).take(items.indices)
        columns = {"user": users.dictionary_decode(), "code": code}
        columns |= {name: table[name] for name in table.column_names if name == "time"}
        in_range = _range_of(users.dictionary, summary.boundaries)[users.indices.to_numpy()]
        by_range = pa.table(columns).take(pa.array(np.argsort(in_range, kind="stable")))
        ends = np.cumsum(np.bincount(in_range, minlength=num_ranges)).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            yield by_range.slice(start, end - start)


def _range_of(users: pa.Array, boundaries: pa.Array) -> np.ndarray:
    """[N] range of each user: the number of boundaries that are not above the user."""
    order = pc.sort_indices(pa.concat_arrays([boundaries, users])).to_numpy()  # stable: boundaries before equal users
    is_boundary = order < len(boundaries)
    result = np.empty(len(users), np.min_scalar_type(len(boundaries)))  # 16 bits sort faster
    result[order[~is_boundary] - len(boundaries)] = np.cumsum(is_boundary)[~is_boundary]
    return result


def _merge(num_items: int, *shards: pa.Table) -> tuple[pa.Table, tuple[np.ndarray, int]]:
    """Return the sequences of one range of users, the interactions of each code, and the number of users."""
    table = pa.concat_tables(shards)
    users = _encode(table["user"])
    ascending = pc.sort_indices(users.dictionary).to_numpy()
    rank = np.empty(len(ascending), np.min_scalar_type(len(ascending)))
    rank[ascending] = np.arange(len(ascending))
    user, code = rank[users.indices.to_numpy()], table["code"].to_numpy()
    if "time" in table.column_names:
        time = table["time"].to_numpy()
        order = np.argsort(time, kind="stable")
        order = order[np.argsort(user[order], kind="stable")]
        user, code, time = user[order], code[order], time[order]
        kept = ~_is_duplicate(user, time, code)
        user, code, time = user[kept], code[kept], time[kept]
    else:
        time = None
        code = code[np.argsort(user, kind="stable")]
    lengths = np.bincount(user, minlength=len(ascending))
    columns = {"user": users.dictionary.take(pa.array(ascending)), "items": _lists(lengths, code)}
    if time is not None:
        columns["times"] = _lists(lengths, time)
    return pa.table(columns), (np.bincount(code, minlength=num_items), len(lengths))


def _lists(lengths: np.ndarray, values: np.ndarray) -> pa.ListArray:
    """[N] lists: consecutive pieces of `values` with the given lengths."""
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)), pa.int32()), pa.array(values))


def _is_duplicate(user: np.ndarray, time: np.ndarray, code: np.ndarray) -> np.ndarray:
    """[N] bool: whether an earlier row has the same user, time and item. Rows are sorted by user and time."""
    duplicate = np.zeros(len(user), bool)
    same_moment = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    tied = np.flatnonzero(np.append(False, same_moment) | np.append(same_moment, False))  # few rows, as a rule
    moment = np.cumsum(np.append(True, ~same_moment))[tied]
    order = np.lexsort((code[tied], moment))
    tied, moment = tied[order], moment[order]
    duplicate[tied[1:]] = (moment[1:] == moment[:-1]) & (code[tied[1:]] == code[tied[:-1]])
    return duplicate


def _write_range(
    path: str,
    version: str,
    number: int,
    sequences: pa.Table,
    token_of_code: np.ndarray,
    cutoffs: dict[str, int],
    time_origin: int | None,
    has_year: bool,
) -> InputFile:
    """Write a range of users as a file of sequences in final tokens."""
    codes = sequences["items"].combine_chunks()
    offsets = codes.offsets.to_numpy()
    columns = {
        "user": sequences["user"],
        "items": pa.ListArray.from_arrays(codes.offsets, pa.array(token_of_code[codes.values.to_numpy()])),
        "last_year": pa.nulls(len(sequences), pa.int16()),
    }
    if time_origin is not None:
        times = sequences["times"].combine_chunks().values.to_numpy()
        since_origin = np.floor(times).astype(np.int64) - time_origin
        columns["times"] = pa.ListArray.from_arrays(codes.offsets, pa.array(since_origin))
        if has_year:
            columns["last_year"] = pa.array(interactions.year_of(times[offsets[1:] - 1]))
        for name, cutoff in cutoffs.items():
            count = np.diff(np.append(0, np.cumsum(times < cutoff))[offsets])
            columns[f"before_{name}"] = pa.array(count, pa.int32())
    return _write_parquet(path, f"{version}/sequences/part-{number:05d}.parquet", pa.table(columns))


def _write_parquet(path: str, name: str, table: pa.Table) -> InputFile:
    """Write a file of the dataset. Size and hash describe the content in memory, so a later check finds a bad disk."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=_ROW_GROUP_USERS)
    content = sink.getvalue()
    storage.write_bytes(storage.join(path, name), content)
    return InputFile(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _encode(column: pa.ChunkedArray) -> pa.DictionaryArray:
    column = column.combine_chunks()
    return column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
