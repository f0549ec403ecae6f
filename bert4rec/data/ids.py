"""Ids of users and items: int64 or strings, compared by their spelling."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def find_ids(spelled: pa.Array, ids: pa.Array) -> np.ndarray:
    """[S] int64 place of each id in `ids`, or -1. The ids to find are strings."""
    index: np.ndarray = pc.index_in(spelled, ids.cast(pa.string())).fill_null(-1).to_numpy().astype(np.int64)
    return index


def some_of(ids: pa.Array | np.ndarray) -> str:
    """A few ids, for messages that show their spelling."""
    return ", ".join(repr(value) for value in ids[:3].tolist())


def are_ints(ids: pa.Array) -> bool:
    """Whether each id is the usual spelling of an int64: 7 is, but 007, +7 and 2**63 are not."""
    try:
        return bool(pc.all(pc.equal(ids.cast(pa.int64()).cast(pa.string()), ids)).as_py() is not False)
    except pa.ArrowInvalid:
        return False


def as_ids(spelled: pa.Array) -> pa.Array:
    """Convert to int64 if `are_ints`; otherwise keep the strings."""
    return spelled.cast(pa.int64()) if are_ints(spelled) else spelled


def ascending(values: pa.Array) -> pa.Array:
    """Sort the values: integers by number, strings by their bytes."""
    return values.take(pc.sort_indices(values))


def trim(ids: pa.DictionaryArray) -> tuple[pa.DictionaryArray, int]:
    """Ids without blanks around them, and the number of rows that had some."""
    trimmed = pc.utf8_trim_whitespace(ids.dictionary)
    had = pc.not_equal(trimmed, ids.dictionary).to_numpy(zero_copy_only=False)
    if not had.any():
        return ids, 0
    distinct = trimmed.dictionary_encode()
    indices = distinct.indices.take(ids.indices)
    return pa.DictionaryArray.from_arrays(indices, distinct.dictionary), int(had[ids.indices.to_numpy()].sum())


_LIKE_MISSING = pa.array(["nan", "null", "none", "\\n", "<na>", "n/a", "nat", "nil", "undefined"])


def like_missing(ids: pa.Array, rows: np.ndarray) -> Iterator[tuple[str, int]]:
    """Ids that other programs write for a missing value, and how many of the `rows` [len(ids)] each has."""
    is_like = pc.is_in(pc.utf8_lower(ids), _LIKE_MISSING).to_numpy(zero_copy_only=False)
    for place in np.flatnonzero(is_like).tolist():
        yield ids[place].as_py(), int(rows[place])
