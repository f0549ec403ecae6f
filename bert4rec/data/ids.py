"""Ids of users and items: int64 or strings, compared as they are spelled."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def find_ids(spelled: pa.Array, ids: pa.Array) -> np.ndarray:
    """[S] int64 places of ids, as strings, among `ids`; -1 where there is none."""
    index: np.ndarray = pc.index_in(spelled, ids.cast(pa.string())).fill_null(-1).to_numpy().astype(np.int64)
    return index


def some_of(ids: pa.Array | np.ndarray) -> str:
    """A few ids, to show how they are spelled."""
    return ", ".join(repr(value) for value in ids[:3].tolist())


def are_ints(ids: pa.Array) -> bool:
    """Whether each id comes back the same from int64, as 7 does, and 007, +7 and 2**63 do not."""
    try:
        return bool(pc.all(pc.equal(ids.cast(pa.int64()).cast(pa.string()), ids)).as_py() is not False)
    except pa.ArrowInvalid:
        return False


def as_ids(spelled: pa.Array) -> pa.Array:
    """int64 where every id is the usual spelling of one, as 7 is and 007 is not; else the strings themselves."""
    return spelled.cast(pa.int64()) if are_ints(spelled) else spelled


def ascending(values: pa.Array) -> pa.Array:
    """Integers by number, strings by their bytes."""
    return values.take(pc.sort_indices(values))
