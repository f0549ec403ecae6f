"""Reads whole files of item vectors."""

import numpy as np
import pyarrow as pa

from bert4rec.data import vectors


def read_vectors(path: str) -> tuple[pa.Array, np.ndarray]:
    """Ids [n] and vectors [n, width]."""
    ids, blocks = vectors.read_vectors(path)
    return ids, np.concatenate(list(blocks))
