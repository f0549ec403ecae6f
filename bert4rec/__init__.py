"""BERT4Rec sequential recommendation as a batch system on Ray.

    from bert4rec import evaluate, load, load_config, prepare, recommend, train

`prepare`, `embed`, `train`, `evaluate` and `recommend` are the jobs' five steps; `load` reads a model directory, to
rank without Ray. Nothing is imported before it is used, so that Ray is imported only by the five.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bert4rec.api import embed as embed
    from bert4rec.api import evaluate as evaluate
    from bert4rec.api import prepare as prepare
    from bert4rec.api import recommend as recommend
    from bert4rec.api import train as train
    from bert4rec.config import Config as Config
    from bert4rec.config import load_config as load_config
    from bert4rec.model import BERT4Rec as BERT4Rec
    from bert4rec.recommender import load as load
    from bert4rec.storage import InputError as InputError

_HOME = {
    **dict.fromkeys(("prepare", "embed", "train", "evaluate", "recommend"), "api"),
    **{
        "Config": "config",
        "load_config": "config",
        "BERT4Rec": "model",
        "load": "recommender",
        "InputError": "storage",
    },
}
__all__ = [
    "BERT4Rec",
    "Config",
    "InputError",
    "embed",
    "evaluate",
    "load",
    "load_config",
    "prepare",
    "recommend",
    "train",
]


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_HOME[name]}"), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        """`bert4rec.train` is the function, not the module of that name, which importing that would put there."""
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
