"""The evaluation protocols. A protocol is one row here and its name in `config.Protocol`."""

from typing import Literal, NamedTuple

from bert4rec.config import ItemModel, Protocol, QueryTime


class Drawn(NamedTuple):
    """Items that are drawn for each user."""

    num_items: int
    by: Literal["popularity", "uniform"]
    """Probability of each item in a draw: proportional to its training interactions, or the same for all."""
    never: Literal["own", "target"]
    """What is never drawn: every item that the user ever had, or the target alone."""


class RankedAmong(NamedTuple):
    """What a target is ranked among."""

    description: str
    drawn: Drawn | None = None
    """None: all items."""
    ranks_seen: bool = False
    """Whether the items of the user's history are ranked too."""
    with_seen: Protocol | None = None
    """The same with the items of the history: evaluation.exclude_seen=false takes it instead."""


ASKED: dict[QueryTime, str] = {
    "last": "at the usual time after the item before it",
    "target": "at its own time, which nobody knows in advance",
}
"""What a model that reads times is told of the query's time, by evaluation.query_time."""

MODEL: Literal["BERT4Rec"] = "BERT4Rec"
Blended = Literal["BERT4Rec+ease", "BERT4Rec+item-knn"]
BLENDED: dict[ItemModel, Blended] = {"ease": "BERT4Rec+ease", "item-knn": "BERT4Rec+item-knn"}
"""The model with inference.blend is ranked besides, under this name."""
OtherQuery = Literal["BERT4Rec/last", "BERT4Rec/target"]
OTHER_QUERY: dict[QueryTime, tuple[OtherQuery, QueryTime]] = {
    "last": ("BERT4Rec/target", "target"),
    "target": ("BERT4Rec/last", "last"),
}
"""By evaluation.query_time: a model that reads times is also ranked by the other query time, under this name."""

PROTOCOLS: dict[Protocol, RankedAmong] = {
    "all": RankedAmong("all items ranked without the user's seen ones", with_seen="all-with-seen"),
    "all-with-seen": RankedAmong("all items ranked with the user's seen ones", ranks_seen=True),
    "popularity-100": RankedAmong(
        "ranked among 100 items drawn by popularity, none of the user's own", Drawn(100, "popularity", "own")
    ),
    "popularity-100-of-all": RankedAmong(
        "ranked among what the user has not seen of 100 items drawn by popularity", Drawn(100, "popularity", "target")
    ),
    "uniform-100": RankedAmong(
        "ranked among 100 items drawn uniformly, none of the user's own", Drawn(100, "uniform", "own")
    ),
    "uniform-100-of-all": RankedAmong(
        "ranked among what the user has not seen of 100 items drawn uniformly", Drawn(100, "uniform", "target")
    ),
}
