"""The prepared dataset on disk, read side.

data-VERSION/sequences/*.parquet: one row per user, sorted by user id, with the files in the order of their names.
    user, items list<int32> in time order, last_year int16 or null
    times list<int64>, if the data have times: whole seconds from the manifest's time_origin, one for each item
    before_NAME int32, one column per cut-off of the manifest: how many of the items came before the cut-off
data-VERSION/items.parquet: one row per item, in token order.
    index int32, item, count int64, year int16 or null, title or null,
    and one column per feature (`features.py`): list<int32>, or int32 or null
manifest.json: `Manifest`, written last. It names the files. A new version of a dataset has a folder of its own, so a
    reader never meets files of two versions; the old folder goes once the new manifest is there.

Tokens: 0 is padding, 1..num_items are items, num_items+1 is [MASK]. The indices of a feature point into its vocabulary
in the manifest, from 0. Ids are int64 or strings, as in the input.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    """What identifies a file: one that the dataset was made from, or one of the dataset itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    size: int
    sha256: str


class Manifest(BaseModel):
    """Content and origin of a prepared dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: Literal[3] = 3
    identity: dict[str, Any] = {}
    """`data_identity` of the config that made the dataset."""
    num_users: int
    num_items: int
    num_new_items: int = 0
    """Items without interactions, which have the last tokens (data.include_new_items)."""
    num_outside: int = 0
    """Interactions before data.since, or from data.until on."""
    num_core_items: int = 0
    """Items that the k-core left out."""
    num_core_users: int = 0
    """Users that the k-core left out."""
    num_core_interactions: int = 0
    """Interactions that the k-core left out."""
    num_interactions: int
    """Interactions without exact duplicates, and without those that data.since, data.until or the k-core left out."""
    num_duplicates: int
    dropped: dict[str, int] = {}
    """Number of other rows, values or files that `prepare` dropped or changed, by kind."""
    cutoffs: dict[str, int] = {}
    """Unix times by name. A temporal split has validation and test, and recent_validation and recent_test seven days
    before them. Other data with times have recent_last, seven days before the last interaction."""
    time_origin: int | None
    """Unix time of the first interaction, in whole seconds; None if the data have no times."""
    time_unit: str = ""
    """What the times of the input are: a `config.TimeUnit`, or clock for dates and timestamps; empty without times. An
    order has no years, and its times are not Unix times."""
    catalogue: str
    """`metadata.catalogue_fingerprint`."""
    vocabularies: dict[str, list[str]]
    """Values of each metadata feature (`FEATURES`)."""
    notes: list[str]
    """Lines for the user that say what `prepare` ignored or switched off."""
    inputs: list[InputFile]
    files: dict[str, int]
    """Bytes of each data file, to detect a damaged copy."""
    sha256: dict[str, str]
    """SHA-256 of each data file, to detect an altered one."""

    @property
    def has_time(self) -> bool:
        """Whether the interactions have times."""
        return self.time_origin is not None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the input files, the catalogue and the split, which determine the whole dataset."""
        made_of = [self.format_version, self.catalogue, *(f.model_dump() for f in self.inputs)]
        return storage.fingerprint([*made_of, self.identity, self.cutoffs])


@dataclass(frozen=True)
class Sequences:
    """Histories of N users: one flat array and offsets, like an Arrow list array."""

    users: pa.Array
    """[N] original ids."""
    items: np.ndarray
    """[T] int32 tokens; those of each user are in time order."""
    offsets: np.ndarray
    """[N+1] int64; user n's items are items[offsets[n]:offsets[n+1]]."""
    last_year: np.ndarray
    """[N] int16 year of the last interaction; only valid if has_last_year."""
    has_last_year: np.ndarray
    """[N] bool."""
    before: dict[str, np.ndarray] = field(default_factory=dict)
    """By name of a cut-off in the manifest: [N] int32 interactions before it."""
    times: np.ndarray | None = None
    """[T] int64 Unix seconds of each item; None where the data have none, or nobody asked for them."""
    asked: np.ndarray | None = None
    """[N] int64 Unix seconds at which recommendations are asked for, if that was decided (`asked_at`)."""

    @classmethod
    def of(
        cls,
        users: pa.Array,
        histories: Sequence[np.ndarray],
        last_years: pa.Array | None = None,
        times: Sequence[np.ndarray] | None = None,
    ) -> Self:
        """Make sequences from users [N], their tokens, latest last, int16 years of last interactions, null if unknown,
        and Unix seconds of each token."""
        years = pa.nulls(len(users), pa.int16()) if last_years is None else last_years
        columns = {"user": users, "items": pa.array(histories, pa.list_(pa.int32())), "last_year": years}
        if times is not None:
            columns["times"] = pa.array(times, pa.list_(pa.int64()))
        return cls.from_table(pa.table(columns))

    @classmethod
    def from_table(cls, table: pa.Table, time_origin: int = 0) -> Self:
        """Read rows of sequences/*.parquet, without a copy of the items if the table has one chunk. Times count from
        `time_origin`."""
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
            times=_flat_values(_one_chunk(table["times"])) + time_origin if "times" in table.column_names else None,
        )

    def __len__(self) -> int:
        return len(self.users)

    def without_items(self, users: np.ndarray) -> Self:
        """Who the users at the places [B] are, and their last years, without their items."""
        return type(self)(
            users=self.users.take(pa.array(users)),
            items=self.items[:0],
            offsets=np.zeros(len(users) + 1, np.int64),
            last_year=self.last_year[users],
            has_last_year=self.has_last_year[users],
        )

    def asked_at(self, moment: int | np.ndarray) -> Self:
        """The same histories, whose next items are asked for at `moment`, Unix seconds, one for all or [N] int64;
        `last_year` is then its year.

        Raises
        ------
        InputError
            If that is before the last interaction of a user.
        """
        asked = np.broadcast_to(np.asarray(moment, np.int64), len(self)).copy()
        if self.times is not None:
            some = self.lengths > 0
            last = self.times[self.offsets[1:][some] - 1]
            if (early := np.flatnonzero(asked[some] < last)).size:
                check_is_after(int(asked[some][early[0]]), int(last[early].max()))
        year = (asked.astype("datetime64[s]").astype("datetime64[Y]").astype(np.int64) + 1970).astype(np.int16)
        return replace(self, asked=asked, last_year=year, has_last_year=np.ones(len(self), bool))

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64 interactions of each user."""
        return np.diff(self.offsets)


def check_is_after(moment: int, last: int) -> None:
    """Check that recommendations are not asked for before the last interaction that they are made from.

    Raises
    ------
    InputError
        If they are.
    """
    if moment < last:
        raise InputError(
            f"recommendations are asked for at {moment_text(moment)} (inference.at), before an interaction of "
            f"{moment_text(last)}; expected no earlier time, or data.until={moment} to leave out what came later"
        )


def moment_text(moment: int) -> str:
    """ISO 8601, in UTC, of Unix seconds."""
    return f"{np.datetime64(moment, 's')}Z"


class Ragged(NamedTuple):
    """Lists of indices: row i has values[offsets[i]:offsets[i+1]]."""

    values: np.ndarray
    """[S] int64."""
    offsets: np.ndarray
    """[N+1] int64."""

    @classmethod
    def from_column(cls, column: pa.Array) -> "Ragged":
        """Read a column of lists, or of single indices, where null means that there is none."""
        if pa.types.is_list(column.type):
            offsets = column.offsets.to_numpy().astype(np.int64)
            return cls(column.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.int64), offsets - offsets[0])
        lengths = column.is_valid().to_numpy(zero_copy_only=False)
        return cls(column.drop_null().to_numpy().astype(np.int64), np.append(0, np.cumsum(lengths)))


@dataclass(frozen=True)
class ItemTable:
    """The catalogue. Row i describes token i+1."""

    ids: pa.Array
    """[num_items] original ids."""
    count: np.ndarray
    """[num_items] int64 interactions, in falling order."""
    year: np.ndarray
    """[num_items] int16 year of release; only valid if has_year."""
    has_year: np.ndarray
    """[num_items] bool."""
    title: pa.Array
    """[num_items] strings, null if unknown."""
    listed: dict[str, tuple[int, Ragged]]
    """By feature: the size of its vocabulary, and each item's indices into the vocabulary."""


class Part(NamedTuple):
    """Users low..high-1, in order of ids."""

    number: int
    low: int
    high: int


class PreparedDataset:
    """A complete prepared dataset. It reads only what a method asks for.

    Parameters
    ----------
    path
        Its directory.
    verify
        Read all files once and compare their hashes. The driver of a job does this before any work; its workers need
        not do it again.
    fingerprint
        That of the dataset with which the job began.

    Raises
    ------
    InputError
        If there is no dataset, it has another format or fingerprint, or a file is missing or has another size. With
        `verify`, also if the content of a file has changed.
    """

    def __init__(self, path: str, verify: bool = False, fingerprint: str | None = None) -> None:
        self.path = path
        self.manifest = _read_manifest(path)
        try:
            self._check_files(verify)
        except InputError:
            if (now := _read_manifest(path)) == self.manifest:
                raise
            self.manifest = now  # another job has replaced the dataset since the line before
            self._check_files(verify)
        if fingerprint not in (None, self.manifest.fingerprint):
            raise InputError(
                f"{path}: another job has replaced this dataset (fingerprint {self.manifest.fingerprint}; this job "
                f"began with {fingerprint}); run the same command again"
            )

    @property
    def num_items(self) -> int:
        """Number of items in the catalogue."""
        return self.manifest.num_items

    @property
    def sequence_files(self) -> list[str]:
        """Paths of sequences/*.parquet, in order of user ids."""
        names = sorted(name for name in self.manifest.files if os.path.basename(name) != ITEMS)
        return [storage.join(self.path, name) for name in names]

    @property
    def items_file(self) -> str:
        """Path of items.parquet."""
        (name,) = (name for name in self.manifest.files if os.path.basename(name) == ITEMS)
        return storage.join(self.path, name)

    def sequences(self, memory_mb: int | None = None, with_times: bool = False) -> Sequences:
        """Read every user, sorted by id.

        If the items (and their times, with `with_times`) take more than `memory_mb` MiB, they go into temporary files
        on the local disk, which are mapped into memory. The system then keeps only the pages in use in memory; readers
        see no difference.
        """
        count = self.manifest.num_interactions
        fits = memory_mb is None or (12 if with_times else 4) * count <= memory_mb * 2**20
        items = storage.empty((count,), np.int32, fits)
        times = storage.empty((count,), np.int64, fits) if with_times else None
        parts, filled = [], 0
        for part in self.parts():
            read = self.read_part(part, with_times)
            items[filled : filled + len(read.items)] = read.items
            if times is not None:
                times[filled : filled + len(read.items)] = read.times
            filled += len(read.items)
            parts.append(replace(read, items=items[:0], times=None))
        lengths = np.concatenate([part.lengths for part in parts])
        return Sequences(
            users=pa.concat_arrays([part.users for part in parts]),
            items=items,
            offsets=np.append(0, np.cumsum(lengths)),
            last_year=np.concatenate([part.last_year for part in parts]),
            has_last_year=np.concatenate([part.has_last_year for part in parts]),
            before={name: np.concatenate([part.before[name] for part in parts]) for name in self.manifest.cutoffs},
            times=times,
        )

    def parts(self) -> list["Part"]:
        """Consecutive parts of the users, the same in every call. Parallel scoring runs, and resumes, part by part."""
        size = min(max(-(-self.manifest.num_users // 64), 512), 65_536)
        return [
            Part(number, low, min(low + size, self.manifest.num_users))
            for number, low in enumerate(range(0, self.manifest.num_users, size))
        ]

    @storage.patient
    def read_part(self, part: "Part", with_times: bool = False) -> Sequences:
        """Read the histories of one part, and the times of their items only if asked to."""
        tables = []
        for file, group, first, rows in self._row_groups:
            low, high = max(part.low - first, 0), min(part.high - first, rows)
            if low < high:
                filesystem, inner = storage.open_store(file)
                with self._still_there(), pq.ParquetFile(inner, filesystem=filesystem) as parquet:
                    columns = [name for name in parquet.schema_arrow.names if with_times or name != "times"]
                    tables.append(parquet.read_row_group(group, columns).slice(low, high - low))
        return Sequences.from_table(pa.concat_tables(tables), self.manifest.time_origin or 0)

    @storage.patient
    def time_span(self) -> tuple[int, int]:
        """Unix times, in whole seconds, of the first and the last interaction.

        Raises
        ------
        InputError
            If the data have no times.
        """
        if self.manifest.time_origin is None:
            raise InputError(f"{self.path}: the interactions have no column time, which model.time_encoding needs")
        last = 0
        for file in self.sequence_files:
            filesystem, inner = storage.open_store(file)
            with self._still_there():
                metadata = pq.read_metadata(inner, filesystem=filesystem)
            for group in range(metadata.num_row_groups):
                chunks = (metadata.row_group(group).column(i) for i in range(metadata.num_columns))
                last = max([last, *(c.statistics.max for c in chunks if c.path_in_schema.startswith("times."))])
        return self.manifest.time_origin, self.manifest.time_origin + last

    @cached_property
    @storage.patient
    def _row_groups(self) -> list[tuple[str, int, int, int]]:
        """For each row group of the sequences: its file, its number there, its first user and its number of users."""
        found, first = [], 0
        for file in self.sequence_files:
            filesystem, inner = storage.open_store(file)
            with self._still_there(), pq.ParquetFile(inner, filesystem=filesystem) as parquet:
                for group in range(parquet.num_row_groups):
                    rows = parquet.metadata.row_group(group).num_rows
                    found.append((file, group, first, rows))
                    first += rows
        return found

    def items(self) -> ItemTable:
        """Read the catalogue."""
        sizes = {name: len(values) for name, values in self.manifest.vocabularies.items()}
        with self._still_there():
            return read_items(self.items_file, sizes)

    @contextmanager
    def _still_there(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise InputError(
                f"{self.path}: a file is gone since this job began ({error}); another job has replaced or deleted the "
                "dataset; run the same command again"
            ) from None

    def descriptions(self) -> list[str]:
        """[num_items] what people know an item by: its title, or else its genres in brackets; empty without both."""
        items, names = self.items(), self.manifest.vocabularies["genre"]
        _, genres = items.listed["genre"]
        return [
            title or (f"({', '.join(names[genre] for genre in own)})" if len(own) else "")
            for title, own in zip(
                items.title.to_pylist(), np.split(genres.values, genres.offsets[1:-1].tolist()), strict=True
            )
        ]

    def names(self) -> list[str]:
        """[num_items] title of each item; the id, and genres in brackets, of one without a title."""
        items = self.items()
        known = zip(items.ids.to_pylist(), items.title.to_pylist(), self.descriptions(), strict=True)
        return [title or f"{item} {description}".strip() for item, title, description in known]

    @storage.patient
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


def _read_manifest(path: str) -> Manifest:
    if not storage.is_complete(path):
        raise InputError(
            f"{path}: no prepared dataset ({storage.MANIFEST} is missing); "
            "run `python -m jobs.prepare` with the same data options first"
        )
    content = storage.read_sealed(storage.join(path, storage.MANIFEST))
    if (version := content.get("format_version")) in (1, 2):
        raise InputError(
            f"{path}: prepared by an earlier version (format {version}); `python -m jobs.prepare` makes it again"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: prepared by another version ({error}); run `python -m jobs.prepare` again") from None


@storage.patient
def read_items(path: str, sizes: dict[str, int] | None = None) -> ItemTable:
    """Read the catalogue in an items.parquet. Without the `sizes` of vocabularies, they follow from the indices."""
    filesystem, inner = storage.open_store(path)
    table = pq.read_table(inner, filesystem=filesystem).combine_chunks()
    year = _one_chunk(table["year"])
    listed = {
        name: Ragged.from_column(_one_chunk(table[feature.column]))
        for name, feature in FEATURES.items()
        if (feature.column in table.column_names if sizes is None else name in sizes)
    }
    return ItemTable(
        ids=_one_chunk(table["item"]),
        count=table["count"].to_numpy(),
        year=year.fill_null(0).to_numpy(),
        has_year=year.is_valid().to_numpy(zero_copy_only=False),
        title=_one_chunk(table["title"]),
        listed={
            name: (int(ragged.values.max(initial=-1)) + 1 if sizes is None else sizes[name], ragged)
            for name, ragged in listed.items()
        },
    )


def _flat_values(lists: pa.Array) -> np.ndarray:
    """The values of all lists of a column, end to end."""
    offsets = lists.offsets.to_numpy()
    values: np.ndarray = lists.values.to_numpy()[offsets[0] : offsets[-1]]
    return values


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
