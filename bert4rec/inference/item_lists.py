"""Reads the files of `inference.candidates` and `inference.exclude`: a list for all users, or a list for each user.

A list for all is read whole. Lists of users may be large: `sort_lists.py` sorts them by user once, and a worker then
reads those of its own users. Without Ray, the files themselves are searched for a few users.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from bert4rec import storage
from bert4rec.data.dataset import InputFile, ItemTable
from bert4rec.data.files import find_interactions, read_header, readable, require_columns
from bert4rec.data.ids import find_ids, some_of
from bert4rec.data.interactions import Chunk, ChunkSummary, check_chunk, explain, read_chunk, scan_interactions
from bert4rec.errors import InputError

CHUNK_BYTES = 32 << 20
USER, ITEM = "user", "item"


class UserItems(NamedTuple):
    """Lists of N users. Shapes: S items of all lists together."""

    row: np.ndarray
    """[S] int64 user of each item, ascending."""
    item: np.ndarray
    """[S] int64 place in the catalogue."""
    has_list: np.ndarray
    """[N] bool: whether the user has a list. A list may be empty: none of its items is in the catalogue."""

    @classmethod
    def of(cls, row: np.ndarray, item: np.ndarray, num_users: int) -> Self:
        """From pairs in any order; an item of -1 is not in the catalogue, and only says that the user has a list."""
        has_list = np.zeros(num_users, bool)
        has_list[row] = True
        order = np.argsort(row, kind="stable")
        order = order[item[order] >= 0]
        return cls(row[order].astype(np.int64), item[order].astype(np.int64), has_list)

    def take(self, users: np.ndarray) -> "UserItems":
        """The lists of `users` [B], in their order."""
        begin, end = (np.searchsorted(self.row, users, side) for side in ("left", "right"))
        length = end - begin
        start = np.repeat(begin - np.append(0, np.cumsum(length))[:-1], length)
        return UserItems(
            np.repeat(np.arange(len(users)), length),
            self.item[start + np.arange(length.sum())],
            self.has_list[users],
        )


@dataclass(frozen=True)
class ItemList:
    """The list of one key, `inference.candidates` or `inference.exclude`."""

    key: str
    digest: str
    """Of the content of its files. Lists of the same content are equal, whatever the files are called."""
    paths: tuple[str, ...] = field(compare=False)
    ids: pa.Array | None = field(default=None, compare=False, repr=False)
    """[A] distinct item ids, as strings: the list is for all users. None: each user has a list."""
    chunks: tuple[Chunk, ...] = field(default=(), compare=False, repr=False)
    """Of the files of users' lists."""
    sorted_path: str | None = field(default=None, compare=False)
    """Where `sort_lists` has written users' lists."""

    @property
    def is_for_all(self) -> bool:
        """Whether the list is for all users."""
        return self.ids is not None

    @property
    def source(self) -> str:
        """What messages call the list."""
        names = ", ".join(self.paths[:3]) + (" …" if len(self.paths) > 3 else "")
        return f"{self.key}: {names}" if names else self.key

    def places(self, items: ItemTable) -> tuple[np.ndarray, str | None]:
        """Ascending places in the catalogue of a list for all users, and a line for the user if some are unknown.

        Raises
        ------
        InputError
            If no item of the list is in the catalogue.
        """
        assert self.ids is not None
        place = find_ids(self.ids, items.ids)
        return np.sort(place[place >= 0]), self.unknown_items(self.ids.filter(pa.array(place < 0)), len(place), items)

    def unknown_items(self, unknown: pa.Array, num_items: int, items: ItemTable) -> str | None:
        """A line for the user on distinct items of the list, `num_items` in all, that are not in the catalogue.

        Raises
        ------
        InputError
            If that are all items.
        """
        if len(unknown) == num_items:
            raise InputError(
                f"{self.source}: none of its {num_items:,} items is in the catalogue, which has {len(items.ids):,} "
                f"items, such as {some_of(items.ids)}; found {some_of(unknown)}"
            )
        if not len(unknown):
            return None
        return (
            f"{self.source}: {len(unknown):,} of {num_items:,} items are not in the catalogue, such as "
            f"{some_of(unknown)}"
        )

    def of_users(self, users: pa.Array, items: ItemTable) -> UserItems:
        """Read the lists of `users` [N], which are distinct, and of no others.

        Raises
        ------
        InputError
            If a row of the files is unusable, or a user has an item twice.
        """
        if self.sorted_path is not None:
            return self._of_sorted(users, self.sorted_path)
        self.check(check_chunk(chunk) for chunk in self.chunks)
        rows, ids = [np.empty(0, np.int64)], [pa.array([], pa.string())]
        for chunk in self.chunks:
            for table in read_chunk(chunk):
                user, item = (table[name].combine_chunks() for name in (USER, ITEM))
                row = find_ids(user.dictionary, users)[user.indices.to_numpy()]
                wanted = pa.array(row >= 0)
                rows.append(row[row >= 0])
                ids.append(item.filter(wanted).dictionary_decode())
        row, spelled = np.concatenate(rows), pa.concat_arrays(ids)
        place = find_ids(spelled, items.ids)
        self.check_twice(users, row, place, items)
        return UserItems.of(row, place, len(users))

    def _of_sorted(self, users: pa.Array, path: str) -> UserItems:
        wanted = pc.min_max(users)
        low, high = (wanted[name] for name in ("min", "max"))
        rows, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for name, first, last in storage.read_sealed(storage.join(path, storage.MANIFEST))["files"]:
            if last < low.as_py() or first > high.as_py():
                continue
            filesystem, inner = storage.open_store(storage.join(path, name))
            # Statistics of row groups make this read the groups of these users only.
            inside = (pc.field(USER) >= low) & (pc.field(USER) <= high)
            table = pq.read_table(inner, filesystem=filesystem, filters=inside, use_threads=False)
            row = pc.index_in(table[USER].combine_chunks(), users).fill_null(-1).to_numpy()
            rows.append(row[row >= 0])
            places.append(table[ITEM].to_numpy()[row >= 0])
        return UserItems.of(np.concatenate(rows), np.concatenate(places), len(users))

    def check(self, summaries: Iterable[ChunkSummary]) -> tuple[int, pa.Array]:
        """Check users' lists, given `check_chunk` of their chunks. Return the number of rows and the distinct items.

        Raises
        ------
        InputError
            If a row is unusable: the error of the first such row.
        """
        num_rows, distinct, bad, first = 0, pa.array([], pa.string()), Counter[str](), None
        for chunk, summary in zip(self.chunks, summaries, strict=True):
            if first is None and (summary.error or summary.bad):
                first = chunk, summary
            bad += summary.bad
            num_rows += summary.num_rows
            distinct = pa.concat_arrays([distinct, summary.items]).unique()
        if first is not None:
            raise explain(*first, bad)
        return num_rows, distinct

    def check_twice(self, users: pa.Array, row: np.ndarray, place: np.ndarray, items: ItemTable) -> None:
        """Check pairs of a user [S], a place in `users`, and an item [S] of the catalogue, or -1.

        Raises
        ------
        InputError
            If a pair of a known item occurs twice.
        """
        pairs, count = np.unique(row[place >= 0] * len(items.ids) + place[place >= 0], return_counts=True)
        twice = pairs[count > 1]
        if len(twice):
            user, item = divmod(int(twice[0]), len(items.ids))
            raise InputError(twice_message(self, users[user].as_py(), items.ids[item].as_py(), len(twice)))


def twice_message(given: ItemList, user: int | str, item: int | str, count: int) -> str:
    """Message for an item that a user's list has twice; `count` such items are in the lists."""
    more = f" ({count:,} such rows in all)" if count > 1 else ""
    return f"{given.source}: user {user!r} has item {item!r} twice{more}; expected each item of a user once"


def read_list(key: str, paths: tuple[str, ...]) -> ItemList:
    """Read the list of `key`: its items, if it is for all users, or what its files are, if each user has a list.

    Parameters
    ----------
    paths
        CSV or Parquet files, or glob patterns of them.

    Raises
    ------
    InputError
        If a file does not exist, is empty or unusable, has no column `item`, or only some of the files have `user`.
    """
    names = [file for path in paths for file in _matching(storage.absolute(path))]
    columns = {file: _columns(file) for file in names}
    for_users = [file for file in names if USER in columns[file]]
    if for_users and len(for_users) < len(names):
        other = next(file for file in names if file not in for_users)
        raise InputError(f"{other}: no column user, which {for_users[0]} has; expected the same columns in all files")
    if for_users:
        scans = [_scan(file) for file in names]
        for file, (_, chunks) in zip(names, scans, strict=True):
            if not chunks:
                raise InputError(f"{file}: no data rows; expected a user and an item in each row below the header")
        digest = storage.fingerprint(["user,item", *sorted(identity.sha256 for identity, _ in scans)])
        found = tuple(chunk for _, chunks in scans for chunk in chunks)
        return ItemList(key, digest, tuple(names), chunks=found)
    digest = storage.fingerprint(["item", *sorted(storage.sha256(file) for file in names)])
    return ItemList(key, digest, tuple(names), pa.concat_arrays([_read_items(file) for file in names]).unique())


def list_of_items(key: str, ids: list[int | str]) -> ItemList:
    """Make a list for all users of item ids that the caller gives."""
    spelled = pa.array([str(item) for item in ids], pa.string()).unique()
    return ItemList(key, storage.fingerprint(["item", *spelled.to_pylist()]), (), spelled)


def _matching(path: str) -> list[str]:
    directory, _, pattern = path.rpartition("/")
    filesystem, inner = storage.open_store(directory)
    if filesystem.get_file_info(inner).type != pafs.FileType.Directory:
        raise InputError(f"{path}: no such file; {directory} is no directory")
    return [storage.join(directory, name) for name in find_interactions(directory, pattern)]


def _scan(path: str) -> tuple[InputFile, list[Chunk]]:
    directory, _, name = path.rpartition("/")
    return scan_interactions(directory, name, CHUNK_BYTES)


def _columns(path: str) -> tuple[str, ...]:
    with readable(path):
        if not path.endswith((".parquet", ".pq")):
            return read_header(path, ",", (ITEM,))[0]
        filesystem, inner = storage.open_store(path)
        try:
            columns = tuple(pq.read_schema(inner, filesystem=filesystem).names)
        except pa.ArrowInvalid as error:
            raise InputError(f"{path}: not a Parquet file, or a damaged one ({error})") from None
    require_columns(path, columns, (ITEM,))
    return columns


def _read_items(path: str) -> pa.Array:
    """The column item of a file, as strings."""
    filesystem, inner = storage.open_store(path)
    with readable(path):
        if path.endswith((".parquet", ".pq")):
            column = pq.read_table(inner, filesystem=filesystem, columns=[ITEM])[ITEM].combine_chunks()
            kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
            if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(f"{path}: column item is {kind}; expected integers or strings")
            items = column.cast(pa.string()).fill_null("")
        else:
            items = _read_csv_items(path)
    if not len(items):
        raise InputError(f"{path}: no data rows; expected an item in each row below the header")
    missing = pc.equal(items, "").to_numpy(zero_copy_only=False)
    if missing.any():
        count = f" ({missing.sum():,} such rows in all)" if missing.sum() > 1 else ""
        raise InputError(f"{path}, data row {int(missing.argmax()) + 1}: item is missing{count}")
    return items


def _read_csv_items(path: str) -> pa.Array:
    columns, _, has_rows = read_header(path, ",", (ITEM,))
    if not has_rows:
        return pa.array([], pa.string())
    names = [name if name == ITEM else f"column {place}" for place, name in enumerate(columns)]
    filesystem, inner = storage.open_store(path)
    with filesystem.open_input_stream(inner, compression="detect") as stream:
        try:
            table = pacsv.read_csv(
                stream,
                pacsv.ReadOptions(use_threads=False, skip_rows=1, column_names=names),
                pacsv.ParseOptions(newlines_in_values=True),
                pacsv.ConvertOptions(column_types={ITEM: pa.string()}, include_columns=[ITEM], null_values=[]),
            )
        except pa.ArrowInvalid as error:
            raise InputError(f"{path}: not readable as CSV ({' '.join(str(error).split())})") from None
    return table[ITEM].combine_chunks()


def with_sorted(given: ItemList, path: str) -> ItemList:
    """The list, to be read from where `sort_lists` has written it."""
    return replace(given, sorted_path=path, chunks=())
