"""Sorts lists of users (`user,item`) by user with Ray Data, once, so that a worker reads those of its own users only.

The sorted list lies beside the prepared dataset, under a name made of both contents: user (as in the dataset) and item
(its place in the catalogue, -1 for an unknown one), in files of which the manifest tells the first and the last user.
"""

import json
import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bert4rec import lease, storage
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.ids import find_ids
from bert4rec.data.interactions import Chunk, check_chunk, read_chunk
from bert4rec.errors import InputError
from bert4rec.inference.item_lists import ITEM, USER, ItemList, twice_message, with_sorted
from bert4rec.inference.ranking import Ranking

if TYPE_CHECKING:
    import ray

_ROW_GROUP_ROWS = 65_536


def sort_lists(ranking: Ranking, dataset: PreparedDataset) -> tuple[Ranking, list[str]]:
    """Sort the lists of users that the ranking has, unless that is done, and return the ranking that reads them there.

    Returns
    -------
    ranking : Ranking
        Equal to the given one.
    notes : list of str
        Lines for the user on what is not in the data.

    Raises
    ------
    InputError
        If a row of a list is unusable, a user has an item twice, or no row is of a user and an item of the data.
    """
    notes = []
    for key in ("candidates", "exclude"):
        given: ItemList | None = getattr(ranking, key)
        if given is None or given.is_for_all:
            continue
        path = _path_of(given, dataset)
        directory, name = os.path.split(path)
        with lease.held(directory, f"{name}.{lease.HOLDER}"):
            if not storage.is_complete(path):
                _sort(given, dataset, path)
        notes += [
            f"{given.source}: {note}" for note in storage.read_sealed(storage.join(path, storage.MANIFEST))["notes"]
        ]
        ranking = ranking.with_lists({key: with_sorted(given, path)})
    return ranking, notes


def already_sorted(ranking: Ranking, dataset: PreparedDataset) -> Ranking:
    """The ranking that reads lists of users where `sort_lists` has sorted them before, if it has."""
    for key in ("candidates", "exclude"):
        given: ItemList | None = getattr(ranking, key)
        if given is not None and not given.is_for_all and storage.is_complete(path := _path_of(given, dataset)):
            ranking = ranking.with_lists({key: with_sorted(given, path)})
    return ranking


def _path_of(given: ItemList, dataset: PreparedDataset) -> str:
    name = storage.fingerprint([given.digest, dataset.manifest.fingerprint])
    return storage.join(os.path.dirname(dataset.path.rstrip("/")), "lists", name)


def _sort(given: ItemList, dataset: PreparedDataset, path: str) -> None:
    import ray

    from bert4rec.data import ray_data

    check = ray.remote(check_chunk)
    num_rows, distinct = given.check(ray.get([check.remote(chunk) for chunk in given.chunks]))
    items = dataset.items()
    unknown = distinct.filter(pa.array(find_ids(distinct, items.ids) < 0))
    note = given.unknown_items(unknown, len(distinct), items)
    storage.remove(path)  # what a killed job left
    storage.check_writable(path)
    ids = ray.put(items.ids.cast(pa.string()))
    kind, opened = _kind_of_users(dataset), (dataset.path, dataset.manifest.fingerprint)

    def write(block: pa.Table) -> pa.Table:
        return pa.table({"written": [json.dumps(_write(block, *opened, path))]})

    with ray_data.settings():
        rows = ray_data.dataset_of([partial(_read, chunk, kind, ids) for chunk in given.chunks])
        written = rows.sort([USER, ITEM]).map_batches(write, batch_size=None, batch_format="pyarrow")
        found = [json.loads(row["written"]) for row in written.iter_rows()]
    if twice := [each for each in found if each["twice"]]:
        user, item = twice[0]["first_twice"]
        raise InputError(twice_message(given, user, items.ids[item].as_py(), sum(each["twice"] for each in twice)))
    num_kept = sum(each["rows"] for each in found)
    if not sum(each["known"] for each in found):
        raise InputError(f"{given.source}: no row is of a user and an item of the data, of {num_rows:,} rows")
    notes = [] if note is None else [note.removeprefix(f"{given.source}: ")]
    if num_kept < num_rows:
        notes.append(f"{num_rows - num_kept:,} of {num_rows:,} rows are of users who are not in the data")
    files = [[each["file"], each["first"], each["last"]] for each in found if each["rows"]]
    storage.commit(path, {"files": sorted(files, key=lambda file: file[1]), "notes": notes})


def _kind_of_users(dataset: PreparedDataset) -> pa.DataType:
    filesystem, inner = storage.open_store(dataset.sequence_files[0])
    return pq.read_schema(inner, filesystem=filesystem).field(USER).type


def _read(chunk: Chunk, kind: pa.DataType, ids_of_items: "ray.ObjectRef") -> Iterator[pa.Table]:
    """The rows of a chunk: users of that kind, and places of their items; rows of no such user are left out."""
    import ray

    ids = ray.get(ids_of_items)
    for table in read_chunk(chunk):
        user, item = (table[name].combine_chunks() for name in (USER, ITEM))
        users = user.dictionary
        if pa.types.is_integer(kind):
            usual = pc.match_substring_regex(users, r"^(0|-?[1-9]\d{0,17})$")
            users = pc.if_else(usual, users, None).cast(kind)
        users = users.take(user.indices)
        place = find_ids(item.dictionary, ids)[item.indices.to_numpy()].astype(np.int32)
        yield pa.table({USER: users, ITEM: place}).filter(users.is_valid())


def _write(block: pa.Table, dataset_path: str, fingerprint: str, path: str) -> dict[str, Any]:
    """Write the rows of a sorted block whose user is in the data; what it has."""
    summary: dict[str, Any] = {"rows": 0, "known": 0, "twice": 0}
    if not len(block):
        return summary
    users = block[USER].combine_chunks()
    there = pc.is_in(users, _users_between(PreparedDataset(dataset_path, fingerprint=fingerprint), users[0], users[-1]))
    block = block.filter(there)
    if not len(block):
        return summary
    users, place = block[USER].combine_chunks(), block[ITEM].to_numpy()
    same = pc.equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False) & (place[1:] == place[:-1]) & (place[1:] >= 0)
    first, last = users[0].as_py(), users[-1].as_py()
    # A task that runs again writes the same file again.
    name = f"{storage.fingerprint([first, int(place[0]), last, int(place[-1])])}.parquet"
    filesystem, inner = storage.open_store(storage.join(path, name))
    pq.write_table(block, inner, filesystem=filesystem, row_group_size=_ROW_GROUP_ROWS)
    summary |= {"file": name, "first": first, "last": last, "rows": len(block), "known": int((place >= 0).sum())}
    if same.any():
        at = int(same.argmax())
        summary |= {"twice": int(same.sum()), "first_twice": [users[at].as_py(), int(place[at])]}
    return summary


def _users_between(dataset: PreparedDataset, first: pa.Scalar, last: pa.Scalar) -> pa.Array:
    """The users of the dataset from `first` to `last`."""
    inside = (pc.field(USER) >= first) & (pc.field(USER) <= last)
    tables = []
    for file in dataset.sequence_files:
        filesystem, inner = storage.open_store(file)
        tables.append(pq.read_table(inner, filesystem=filesystem, columns=[USER], filters=inside, use_threads=False))
    return pa.concat_tables(tables)[USER].combine_chunks()
