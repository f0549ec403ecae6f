"""Sequences of users, built, thinned, counted and written a table at a time. Nothing here knows of Ray.

`prepare` runs these functions over two kinds of tables:

    rows: one per interaction, in any order. range, user, code, row (its place in the input, which decides between
        equal times) and, if the data have times, time (float64)
    ranges: one row per range of users, so that nothing cuts a range in two. range, user list, length list<int32>
        (interactions of each user), code list<int32> and, if the data have times, time list<float64>; users are in
        ascending order, and the interactions of each user in order of time

A range is a number, from 0, in the order of users. A code is an item's place in `Vocabulary.item_ids`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bert4rec import storage
from bert4rec.data import interactions
from bert4rec.data.dataset import InputFile

_ROW_GROUP_USERS = 4096  # scoring reads parts of about this size
_WRITTEN = pa.schema([("name", pa.string()), ("size", pa.int64()), ("sha256", pa.string())])


@dataclass(frozen=True)
class Vocabulary:
    """The items, and the users that divide all users into ranges."""

    item_ids: pa.Array
    """Distinct items, ascending: int64 by number, strings by their bytes."""
    boundaries: pa.Array
    """First user id of each range except the first range."""


@dataclass(frozen=True)
class Ranges:
    """A table of ranges, flat: R ranges with N users and T interactions together."""

    number: np.ndarray
    """[R] the ranges."""
    num_users: np.ndarray
    """[R] users of each range."""
    user: pa.Array
    """[N] ids."""
    length: np.ndarray
    """[N] interactions of each user."""
    code: np.ndarray
    """[T] items."""
    time: np.ndarray | None
    """[T] times, if the data have them."""

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """Read a table of ranges, without a copy if it has one chunk."""
        num_users, user = _unlist(table["user"])
        _, length = _unlist(table["length"])
        _, code = _unlist(table["code"])
        time = _unlist(table["time"])[1].to_numpy() if "time" in table.column_names else None
        return cls(table["range"].to_numpy(), num_users, user, length.to_numpy(), code.to_numpy(), time)

    def table(self) -> pa.Table:
        """Make the table of ranges."""
        ends = np.append(0, np.cumsum(self.length))[np.append(0, np.cumsum(self.num_users))]
        columns = {
            "range": pa.array(self.number, pa.int32()),
            "user": _lists(self.num_users, self.user),
            "length": _lists(self.num_users, pa.array(self.length, pa.int32())),
            "code": _lists(np.diff(ends), pa.array(self.code, pa.int32())),
        }
        if self.time is not None:
            columns["time"] = _lists(np.diff(ends), pa.array(self.time))
        return pa.table(columns)


def encode(table: pa.Table, vocabulary: Vocabulary) -> pa.Table:
    """Make rows of the columns user, item, row and, if the data have it, time."""
    users, items = (_encode(table[name]) for name in ("user", "item"))
    in_range = _range_of(users.dictionary, vocabulary.boundaries)[users.indices.to_numpy()]
    code = pc.index_in(items.dictionary, vocabulary.item_ids).take(items.indices)
    columns = {"range": pa.array(in_range), "user": users.dictionary_decode(), "code": code}
    return pa.table(columns | {name: table[name] for name in ("row", "time") if name in table.column_names})


def _range_of(users: pa.Array, boundaries: pa.Array) -> np.ndarray:
    """[N] range of each user: the number of boundaries that are not above the user."""
    order = pc.sort_indices(pa.concat_arrays([boundaries, users])).to_numpy()  # stable: boundaries before equal users
    is_boundary = order < len(boundaries)
    result = np.empty(len(users), np.min_scalar_type(len(boundaries)))
    result[order[~is_boundary] - len(boundaries)] = np.cumsum(is_boundary)[~is_boundary]
    return result


def build(rows: pa.Table) -> pa.Table:
    """Make the ranges of all users in `rows`, which have all their rows there. Exact duplicates are left out."""
    users = _encode(rows["user"])
    ascending = pc.sort_indices(users.dictionary).to_numpy()
    rank = np.empty(len(ascending), np.min_scalar_type(len(ascending)))  # 16 bits sort faster
    rank[ascending] = np.arange(len(ascending))
    user, code = rank[users.indices.to_numpy()], rows["code"].to_numpy()
    range_of_user = np.empty(len(ascending), np.int32)
    range_of_user[user] = rows["range"].to_numpy()
    time = None
    order = np.argsort(rows["row"].to_numpy(), kind="stable")  # quick, because the rows of a chunk are in order
    if "time" in rows.column_names:
        time = rows["time"].to_numpy()
        order = order[_order_of(time[order])]
    order = order[np.argsort(user[order], kind="stable")]
    user, code = user[order], code[order]
    if time is not None:
        time = time[order]
        kept = ~_is_duplicate(user, time, code)
        user, code, time = user[kept], code[kept], time[kept]
    number, num_users = np.unique(range_of_user, return_counts=True)
    lengths = np.bincount(user, minlength=len(ascending))
    return Ranges(number, num_users, users.dictionary.take(pa.array(ascending)), lengths, code, time).table()


def _order_of(times: np.ndarray) -> np.ndarray:
    """[N] stable order of times. Whole seconds take a third of the time, as numpy sorts 16 bits by radix."""
    since = times - times.min(initial=0)
    # A tiny fraction is lost in the difference, so the times themselves have to be whole.
    if not len(times) or since.max() >= 2**32 or not np.array_equal(times, np.floor(times)):
        return np.argsort(times, kind="stable")
    whole = since.astype(np.uint32)
    order = np.argsort(whole.astype(np.uint16), kind="stable")
    return order[np.argsort((whole >> 16).astype(np.uint16)[order], kind="stable")]


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


def keep(ranges: pa.Table, which: Callable[[Ranges], np.ndarray], least: int) -> pa.Table:
    """Keep only the interactions that `which` names, [T] bool, and only users with at least `least` of them."""
    whole = Ranges.of(ranges)
    kept = which(whole)
    lengths = _sums(kept, whole.length)
    enough = lengths >= least
    kept = kept & np.repeat(enough, whole.length)
    time = None if whole.time is None else whole.time[kept]
    user, num_users = whole.user.filter(pa.array(enough)), _sums(enough, whole.num_users)
    return Ranges(whole.number, num_users, user, lengths[enough], whole.code[kept], time).table()


def total(ranges: pa.Table) -> pa.Table:
    """Count users, and interactions of each code, and find the first and last time (infinities without any): a row."""
    whole = Ranges.of(ranges)
    counts = np.bincount(whole.code)
    code = np.flatnonzero(counts)
    time = np.empty(0) if whole.time is None else whole.time
    columns = {
        name: _lists([len(code)], pa.array(values)) for name, values in (("code", code), ("count", counts[code]))
    }
    columns |= {"num_users": [len(whole.user)]}
    return pa.table(columns | {"first": [time.min(initial=np.inf)], "last": [time.max(initial=-np.inf)]})


def count_before(ranges: pa.Table, times: np.ndarray) -> pa.Table:
    """Count the interactions before each of the ascending `times` [C]: a row, a list of C."""
    own = Ranges.of(ranges).time
    assert own is not None
    not_above = np.bincount(np.searchsorted(times, own, side="right"), minlength=len(times) + 1)
    return pa.table({"count": _lists([len(times)], pa.array(np.cumsum(not_above)[:-1]))})


def write(
    ranges: pa.Table,
    path: str,
    version: str,
    token_of_code: np.ndarray,
    cutoffs: dict[str, int],
    time_origin: int | None,
    has_year: bool,
) -> pa.Table:
    """Write each range as a file in the folder `version` of the dataset. Return name, size and sha256 of each."""
    written = []
    for row in range(len(ranges)):
        whole = Ranges.of(ranges.slice(row, 1))
        name = f"{version}/sequences/part-{whole.number[0]:05d}.parquet"
        written.append(write_parquet(path, name, _final(whole, token_of_code, cutoffs, time_origin, has_year)))
    return pa.Table.from_pylist([file.model_dump() for file in written], _WRITTEN)


def _final(
    ranges: Ranges, token_of_code: np.ndarray, cutoffs: dict[str, int], time_origin: int | None, has_year: bool
) -> pa.Table:
    """Make the rows of sequences/*.parquet, with final tokens."""
    columns = {
        "user": ranges.user,
        "items": _lists(ranges.length, pa.array(token_of_code[ranges.code])),
        "last_year": pa.nulls(len(ranges.user), pa.int16()),
    }
    if ranges.time is not None and time_origin is not None:
        since_origin = np.floor(ranges.time).astype(np.int64) - time_origin
        columns["times"] = _lists(ranges.length, pa.array(since_origin))
        if has_year:
            columns["last_year"] = pa.array(interactions.year_of(ranges.time[np.cumsum(ranges.length) - 1]))
        for name, cutoff in cutoffs.items():
            columns[f"before_{name}"] = pa.array(_sums(ranges.time < cutoff, ranges.length), pa.int32())
    return pa.table(columns)


def write_parquet(path: str, name: str, table: pa.Table) -> InputFile:
    """Write a file of the dataset, all or nothing. Size and hash describe the content in memory, so a later check finds
    a bad disk."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=_ROW_GROUP_USERS)
    content = sink.getvalue()
    storage.write_bytes(storage.join(path, name), content)
    return InputFile(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _encode(column: pa.ChunkedArray) -> pa.DictionaryArray:
    column = column.combine_chunks()
    return column if pa.types.is_dictionary(column.type) else column.dictionary_encode()


def _sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[N] sum of each of N consecutive pieces of `values`, which may be empty."""
    return np.diff(np.append(0, np.cumsum(values))[np.append(0, np.cumsum(lengths))])


def _lists(lengths: np.ndarray | list[int], values: pa.Array) -> pa.ListArray:
    """[N] lists: consecutive pieces of `values` with the given lengths."""
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)), pa.int32()), values)


def _unlist(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """[N] length of each list, and the values of all lists."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    return np.diff(offsets), lists.values[offsets[0] : offsets[-1]]
