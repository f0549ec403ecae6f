"""BERT4Rec sequential recommendation as a batch system on Ray.

    from bert4rec import evaluate, load, load_config, prepare, recommend, train

`prepare`, `embed`, `train`, `evaluate` and `recommend` are the five steps of the jobs. `load` reads a model directory,
to rank without Ray. The package imports a name on first use, so that only the five steps import Ray."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bert4rec.api import embed as embed
    from bert4rec.api import evaluate as evaluate
    from bert4rec.api import prepare as prepare
    from bert4rec.api import recommend as recommend
    from bert4rec.api import train as train
    from bert4rec.config import Config as Config
    from bert4rec.config import load_config as load_config
    from bert4rec.errors import InputError as InputError
    from bert4rec.inference.ranking import Ranking as Ranking
    from bert4rec.inference.recommender import load as load
    from bert4rec.model.network import BERT4Rec as BERT4Rec

_HOME = {
    **dict.fromkeys(("prepare", "embed", "train", "evaluate", "recommend"), "api"),
    **{
        "Config": "config",
        "load_config": "config",
        "BERT4Rec": "model.network",
        "Ranking": "inference.ranking",
        "load": "inference.recommender",
        "InputError": "errors",
    },
}
__all__ = [
    "BERT4Rec",
    "Config",
    "InputError",
    "Ranking",
    "embed",
    "evaluate",
    "load",
    "load_config",
    "prepare",
    "recommend",
    "train",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
