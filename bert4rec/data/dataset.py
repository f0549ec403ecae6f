"""The prepared dataset on disk, read side.

sequences/*.parquet: a row a user, sorted by user id over the files in name order.
    user, items list<int32> in time order, last_year int16 or null
    before_NAME int32, a column for each of the manifest's cut-offs: how many of the items came before it
items.parquet: a row an item, in token order.
    index int32, item, count int64, year int16 or null, title or null,
    and of each feature (`features.py`) list<int32>, or int32 or null
manifest.json: `Manifest`, written last.

Tokens: 0 is padding, 1..num_items are items, num_items+1 is [MASK]. Features' indices count from 0 into the
manifest's vocabularies. Ids are int64 or strings, as they came.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from bert4rec import storage
from bert4rec.data.features import FEATURES
from bert4rec.errors import InputError

PADDING = 0
ITEMS = "items.parquet"


class InputFile(BaseModel):
    """What identifies one file that the dataset was made from, or of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    size: int
    sha256: str


class Manifest(BaseModel):
    """What the prepared dataset holds and what it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: Literal[2] = 2
    identity: dict[str, Any] = {}
    """`data_identity` of the config that it was made with."""
    num_users: int
    num_items: int
    num_new_items: int = 0
    """Items without interactions, the last tokens (data.include_new_items)."""
    num_core_items: int = 0
    """Items that are not in the k-core."""
    num_core_users: int = 0
    """Users that are not."""
    num_core_interactions: int = 0
    """Interactions that are not."""
    num_interactions: int
    """After the exact duplicates, and what is not in the k-core, were dropped."""
    num_duplicates: int
    cutoffs: dict[str, int] = {}
    """Unix times; of a temporal split validation and test, and with the prefix recent_ seven days before each; else
    recent_last, seven days before the last interaction."""
    has_time: bool
    catalogue: str
    """`metadata.catalogue_fingerprint`."""
    vocabularies: dict[str, list[str]]
    """Values of each metadata feature (`FEATURES`)."""
    notes: list[str]
    """What was ignored or switched off, a line each, for the user."""
    inputs: list[InputFile]
    files: dict[str, int]
    """Bytes of each data file, to detect a damaged copy."""
    sha256: dict[str, str]
    """Of each data file, to detect an altered one."""

    @property
    def fingerprint(self) -> str:
        """Of the input files, the catalogue made of them and the split, hence of the whole dataset."""
        made_of = [self.format_version, self.catalogue, *(f.model_dump() for f in self.inputs)]
        return storage.fingerprint([*made_of, self.identity, self.cutoffs])


@dataclass(frozen=True)
class Sequences:
    """Histories of N users: one flat array and offsets, Arrow's own layout."""

    users: pa.Array
    """[N] original ids."""
    items: np.ndarray
    """[T] int32 tokens, each user's in time order."""
    offsets: np.ndarray
    """[N+1] int64; user n's items are items[offsets[n]:offsets[n+1]]."""
    last_year: np.ndarray
    """[N] int16 year of the last interaction, meaningful where has_last_year."""
    has_last_year: np.ndarray
    """[N] bool."""
    before: dict[str, np.ndarray] = field(default_factory=dict)
    """[N] int32 interactions before each of the manifest's cut-offs."""

    @classmethod
    def of(cls, users: pa.Array, histories: Sequence[np.ndarray], last_years: pa.Array | None = None) -> Self:
        """Of users [N], their tokens, the latest last, and int16 years of their last interactions, null if unknown."""
        years = pa.nulls(len(users), pa.int16()) if last_years is None else last_years
        items = pa.array(histories, pa.list_(pa.int32()))
        return cls.from_table(pa.table({"user": users, "items": items, "last_year": years}))

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """From rows of sequences/*.parquet, without a copy where the table is one chunk."""
        table = table.combine_chunks()
        items = _one_chunk(table["items"])
        year = _one_chunk(table["last_year"])
        offsets = items.offsets.to_numpy().astype(np.int64)
        return cls(
            users=_one_chunk(table["user"]),
            items=items.values.to_numpy()[offsets[0] : offsets[-1]],
            offsets=offsets - offsets[0],
            last_year=year.fill_null(0).to_numpy(),
            has_last_year=year.is_valid().to_numpy(zero_copy_only=False),
            before={
                name.removeprefix("before_"): table[name].to_numpy()
                for name in table.column_names
                if name.startswith("before_")
            },
        )

    def __len__(self) -> int:
        return len(self.users)

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64, interactions a user."""
        return np.diff(self.offsets)


class Ragged(NamedTuple):
    """Lists of indices: row i has values[offsets[i]:offsets[i+1]]."""

    values: np.ndarray
    """[S] int64."""
    offsets: np.ndarray
    """[N+1] int64."""

    @classmethod
    def from_column(cls, column: pa.Array) -> "Ragged":
        """From a column of lists, or of single indices, of which null means none."""
        if pa.types.is_list(column.type):
            offsets = column.offsets.to_numpy().astype(np.int64)
            return cls(column.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.int64), offsets - offsets[0])
        lengths = column.is_valid().to_numpy(zero_copy_only=False)
        return cls(column.drop_null().to_numpy().astype(np.int64), np.append(0, np.cumsum(lengths)))


@dataclass(frozen=True)
class ItemTable:
    """The catalogue; row i is token i+1."""

    ids: pa.Array
    """[num_items] original ids."""
    count: np.ndarray
    """[num_items] int64 interactions, falling."""
    year: np.ndarray
    """[num_items] int16 release year, meaningful where has_year."""
    has_year: np.ndarray
    """[num_items] bool."""
    title: pa.Array
    """[num_items] strings, null where unknown."""
    listed: dict[str, tuple[int, Ragged]]
    """Of each feature: size of the vocabulary, and each item's indices into it."""


class Part(NamedTuple):
    """Users low..high-1, in order of ids."""

    number: int
    low: int
    high: int


class PreparedDataset:
    """A whole prepared dataset; reads what is asked for.

    Parameters
    ----------
    path
        Its directory.
    verify
        Read all files once and compare their hashes, which a job's driver does before any work and its workers need
        not do again.

    Raises
    ------
    InputError
        Where there is none, it is of another format, or a file is missing, of another size or, with `verify`, of
        another content than was written.
    """

    def __init__(self, path: str, verify: bool = False) -> None:
        self.path = path
        if not storage.is_complete(path):
            raise InputError(
                f"{path}: no prepared dataset ({storage.MANIFEST} is missing); "
                "run `python -m jobs.prepare` with the same data options first"
            )
        content = storage.read_sealed(storage.join(path, storage.MANIFEST))
        if (version := content.get("format_version")) == 1:
            raise InputError(
                f"{path}: prepared by an earlier version (format {version}); `python -m jobs.prepare` makes it anew"
            )
        try:
            self.manifest = Manifest.model_validate(content)
        except ValidationError as error:
            raise InputError(
                f"{path}: prepared by another version ({error}); run `python -m jobs.prepare` again"
            ) from None
        self._check_files(verify)

    @property
    def num_items(self) -> int:
        """Items of the catalogue."""
        return self.manifest.num_items

    @property
    def sequence_files(self) -> list[str]:
        """Paths of sequences/*.parquet, in order of user ids."""
        return [storage.join(self.path, name) for name in sorted(self.manifest.files) if name.startswith("sequences/")]

    def sequences(self, memory_mb: int | None = None) -> Sequences:
        """Every user, sorted by id.

        Where the items take more than `memory_mb` MiB, they lie in a temporary file on the local disk, mapped into
        memory: the system keeps the pages in use, and whoever reads them sees no difference.
        """
        count = self.manifest.num_interactions
        if memory_mb is None or 4 * count <= memory_mb * 2**20:
            items = np.empty(count, np.int32)
        else:
            with tempfile.TemporaryFile() as file:  # the mapping keeps it alive
                items = np.memmap(file, np.int32, "w+", shape=(count,))
        parts, filled = [], 0
        for part in self.parts():
            read = self.read_part(part)
            items[filled : filled + len(read.items)] = read.items
            filled += len(read.items)
            parts.append(replace(read, items=items[:0]))
        lengths = np.concatenate([part.lengths for part in parts])
        return Sequences(
            users=pa.concat_arrays([part.users for part in parts]),
            items=items,
            offsets=np.append(0, np.cumsum(lengths)),
            last_year=np.concatenate([part.last_year for part in parts]),
            has_last_year=np.concatenate([part.has_last_year for part in parts]),
            before={name: np.concatenate([part.before[name] for part in parts]) for name in self.manifest.cutoffs},
        )

    def parts(self) -> list["Part"]:
        """The users in consecutive parts, the same for every call: the units of parallel scoring and of its resume."""
        size = min(max(-(-self.manifest.num_users // 64), 512), 65_536)
        return [
            Part(number, low, min(low + size, self.manifest.num_users))
            for number, low in enumerate(range(0, self.manifest.num_users, size))
        ]

    def read_part(self, part: "Part") -> Sequences:
        """The histories of one part."""
        tables = []
        for file, group, first, rows in self._row_groups:
            low, high = max(part.low - first, 0), min(part.high - first, rows)
            if low < high:
                filesystem, inner = storage.open_store(file)
                with pq.ParquetFile(inner, filesystem=filesystem) as parquet:
                    tables.append(parquet.read_row_group(group).slice(low, high - low))
        return Sequences.from_table(pa.concat_tables(tables))

    @cached_property
    def _row_groups(self) -> list[tuple[str, int, int, int]]:
        """Of each row group of the sequences: its file, its number there, its first user and how many; read once."""
        found, first = [], 0
        for file in self.sequence_files:
            filesystem, inner = storage.open_store(file)
            with pq.ParquetFile(inner, filesystem=filesystem) as parquet:
                for group in range(parquet.num_row_groups):
                    rows = parquet.metadata.row_group(group).num_rows
                    found.append((file, group, first, rows))
                    first += rows
        return found

    def items(self) -> ItemTable:
        """The catalogue."""
        sizes = {name: len(values) for name, values in self.manifest.vocabularies.items()}
        return read_items(storage.join(self.path, ITEMS), sizes)

    def _check_files(self, verify: bool) -> None:
        for name, size in self.manifest.files.items():
            filesystem, inner = storage.open_store(storage.inside(self.path, name))
            info = filesystem.get_file_info(inner)
            if info.type == pafs.FileType.NotFound or info.size != size:
                found = "is missing" if info.type == pafs.FileType.NotFound else f"has {info.size} bytes"
                raise InputError(
                    f"{storage.join(self.path, name)}: {found}, expected {size} bytes; the prepared dataset is "
                    "damaged, delete it and run `python -m jobs.prepare` again"
                )
            if verify and storage.sha256(storage.join(self.path, name)) != self.manifest.sha256.get(name):
                raise InputError(
                    f"{storage.join(self.path, name)}: its content is not what was written (SHA-256); the prepared "
                    "dataset is damaged or was altered, delete it and run `python -m jobs.prepare` again"
                )


def read_items(path: str, sizes: dict[str, int] | None = None) -> ItemTable:
    """The catalogue of an items.parquet; without the `sizes` of the vocabularies it has no lists of their values."""
    filesystem, inner = storage.open_store(path)
    table = pq.read_table(inner, filesystem=filesystem).combine_chunks()
    year = _one_chunk(table["year"])
    return ItemTable(
        ids=_one_chunk(table["item"]),
        count=table["count"].to_numpy(),
        year=year.fill_null(0).to_numpy(),
        has_year=year.is_valid().to_numpy(zero_copy_only=False),
        title=_one_chunk(table["title"]),
        listed={
            name: (size, Ragged.from_column(_one_chunk(table[FEATURES[name].column])))
            for name, size in (sizes or {}).items()
        },
    )


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
