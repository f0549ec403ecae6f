"""The metadata features of items. A feature is one row here and one key `model.use_NAME_emb` in the config."""

from typing import NamedTuple


class Feature(NamedTuple):
    """Where to find the values of a feature."""

    file: str
    """FILE.tsv in the input, with columns `item` and the feature's name."""
    column: str
    """Column of items.parquet: indices into the feature's vocabulary in the manifest."""
    is_list: bool
    """Whether an item may have several values. If not, the first row of an item counts."""


FEATURES = {
    "genre": Feature("genres", "genres", is_list=True),
    "director": Feature("directors", "director", is_list=False),
    "writer": Feature("writers", "writers", is_list=True),
}
