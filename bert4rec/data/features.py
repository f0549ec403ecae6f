"""The metadata features of items. A feature is one row here and one key `model.use_NAME_emb` in the config."""

from typing import NamedTuple


class Feature(NamedTuple):
    """Where a feature's values lie."""

    file: str
    """FILE.tsv in the input, with columns `item` and the feature's name."""
    column: str
    """Column of items.parquet: indices into the feature's vocabulary in the manifest."""
    is_list: bool
    """Whether an item may have several values; of a feature that allows one, an item's first row counts."""


FEATURES = {
    "genre": Feature("genres", "genres", is_list=True),
    "director": Feature("directors", "director", is_list=False),
    "writer": Feature("writers", "writers", is_list=True),
}
