"""Reads histories of a few users from a prepared dataset, or of new users from a file. Does not use Ray."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bert4rec import storage
from bert4rec.config import DataConfig
from bert4rec.data.dataset import ItemTable, PreparedDataset, Sequences
from bert4rec.data.files import find_interactions
from bert4rec.data.ids import find_ids, some_of
from bert4rec.data.interactions import Settled, check_chunk, read_chunk, scan_interactions, settle, year_of
from bert4rec.errors import InputError

_CHUNK_BYTES = 32 << 20


class NewUsers(NamedTuple):
    """Histories read from a file."""

    sequences: Sequences
    """Sorted by user id."""
    notes: list[str]
    """Lines for the user that say what was left out."""


def choose_users(sequences: Sequences, users: Sequence[int | str], source: str) -> Sequences:
    """Keep only `users`, in their order.

    Raises
    ------
    InputError
        If `sequences` lack one of them. The message names `source`, where the sequences come from.
    """
    place = find_ids(pa.array([str(user) for user in users], pa.string()), sequences.users)
    if (place < 0).any():
        unknown = [repr(users[index]) for index in np.flatnonzero(place < 0).tolist()]
        raise InputError(
            f"inference.users: not in {source}: {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}; "
            "histories of new users go into a file for inference.users_file"
        )
    place = place[np.sort(np.unique(place, return_index=True)[1])]  # without repetitions
    ranges = [slice(*sequences.offsets[user : user + 2]) for user in place]
    return Sequences.of(
        sequences.users.take(pa.array(place)),
        [sequences.items[own] for own in ranges],
        pa.array(sequences.last_year[place], pa.int16(), mask=~sequences.has_last_year[place]),
        None if sequences.times is None else [sequences.times[own] for own in ranges],
    )


def users_of_dataset(dataset: PreparedDataset, users: Sequence[int | str]) -> Sequences:
    """Read the histories of a few users, and of no others.

    Raises
    ------
    InputError
        If a user is not in the data.
    """
    tables = []
    for file in dataset.sequence_files:
        filesystem, inner = storage.open_store(file)
        schema = pq.read_schema(inner, filesystem=filesystem)
        wanted = _spelled_as(schema.field("user").type, users)
        tables.append(pq.read_table(inner, filesystem=filesystem, filters=pc.field("user").isin(wanted)))
    return choose_users(
        Sequences.from_table(pa.concat_tables(tables), dataset.manifest.time_origin or 0),
        users,
        f"the data, which have {dataset.manifest.num_users:,} users, such as {some_of(_first_users(dataset))}",
    )


def users_of_file(path: str, items: ItemTable, data: DataConfig | None = None) -> NewUsers:
    """Read histories `user,item[,time]` from a CSV or Parquet file and make sequences from them as `prepare` does.

    `data` says how the file is written (columns, delimiter, header, time_unit), as for `prepare`.

    Leaves out interactions with items that are not in the catalogue, and users who then have no interactions.

    Raises
    ------
    InputError
        If the file is unusable, or no interaction is left.
    """
    path = storage.absolute(path)
    table, settled = _read(path, data)
    users = table["user"].combine_chunks()
    frame = pd.DataFrame({"user": users.to_numpy(zero_copy_only=False), "item": table["item"].to_numpy()})
    notes = list(settled.notes)
    if has_time := "time" in table.column_names:
        frame["time"] = table["time"].to_numpy()
        if num_duplicates := int(frame.duplicated().sum()):
            notes.append(f"exact duplicates of an interaction dropped: {num_duplicates:,}")
            frame = frame.drop_duplicates()
    frame["user"], ids = pd.factorize(frame["user"], sort=True)
    frame = frame.sort_values(["user", "time"] if has_time else "user", kind="stable")
    last = ~frame["user"].duplicated(keep="last")
    has_year = has_time and settled.time_unit != "order"
    last_year = year_of(frame.loc[last, "time"].to_numpy()) if has_year else np.zeros(len(ids), np.int16)

    place = find_ids(pa.array(frame["item"]).cast(pa.string()), items.ids)
    frame["token"] = place + 1
    unknown, known = frame[place < 0], frame[place >= 0]
    missing = unknown["item"].unique()
    if len(known) == 0:
        raise InputError(
            f"{path}: none of its {len(unknown):,} interactions is with an item of the catalogue, which has "
            f"{len(items.ids):,} items, such as {some_of(items.ids)}; found {some_of(missing)}"
        )
    if len(unknown):
        notes.append(
            f"interactions with items that the model does not know left out: {len(unknown):,}, of "
            f"{len(missing):,} items, such as {some_of(missing)}"
        )
    lengths = np.bincount(known["user"], minlength=len(ids))
    if num_empty := int((lengths == 0).sum()):
        notes.append(f"users without any item that the model knows; they get no recommendations: {num_empty:,}")
    kept = np.flatnonzero(lengths)
    ends = np.cumsum(lengths[kept])[:-1]
    sequences = Sequences.of(
        pa.array(ids[kept], users.type),
        np.split(known["token"].to_numpy(np.int32), ends),
        pa.array(last_year[kept], pa.int16()) if has_year else None,
        np.split(np.floor(known["time"].to_numpy()).astype(np.int64), ends) if has_time else None,
    )
    return NewUsers(sequences, notes)


def _read(path: str, data: DataConfig | None) -> tuple[pa.Table, Settled]:
    """Read user (int64 or string), item (string) and, if the file has it, time, in file order.

    Raises
    ------
    InputError
        If a row is unusable: the error of the first such row.
    """
    directory, _, name = path.rpartition("/")
    find_interactions(directory, name)  # says what is there instead
    _, chunks = scan_interactions(directory, name, _CHUNK_BYTES, data)
    summaries = [check_chunk(chunk) for chunk in chunks]
    settled = settle(path, [chunks], summaries)
    int_users = all(summary.int_users for summary in summaries)
    table = pa.concat_tables([piece for chunk in settled.chunks for piece in read_chunk(chunk, int_users)])
    spelled = {"user": pa.int64() if int_users else pa.string(), "item": pa.string()}
    columns = pa.table(
        {column: table[column].cast(spelled.get(column, table[column].type)) for column in table.column_names}
    )
    return columns, settled


def _spelled_as(kind: pa.DataType, users: Sequence[int | str]) -> pa.Array:
    """Convert to type `kind` the users that can be ids of that type, and leave out the others."""
    if pa.types.is_string(kind):
        return pa.array([str(user) for user in users], kind)
    numbers = [int(user) for user in users if str(user).lstrip("-").isdecimal()]
    return pa.array([number for number in numbers if -(2**63) <= number < 2**63], kind)


def _first_users(dataset: PreparedDataset) -> pa.Array:
    return dataset.read_part(dataset.parts()[0]).users[:3]
