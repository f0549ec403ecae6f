"""Lists every key of the config with its type, default and meaning, for `--help` and for docs/config.md.

`python -m bert4rec.config_docs > docs/config.md` writes the page.
"""

import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bert4rec.config import Config

HEADING = """\
# Config reference

`python -m bert4rec.config_docs > docs/config.md` generates this page from the docstrings of `bert4rec/config.py`.

Every job that takes `--config` takes all keys: in a YAML file (`--config FILE`, with groups as sections), or as
`group.key=value` on the command line, which overrides the file. Jobs read values as YAML: `null` means no value, and
`[a, b]` is a list. If a key does not exist or a value is out of range, the job ends with one message before any work.
The message names the nearest key.
"""

_NAMES = {bool: "true | false", str: "text", type(None): "null"}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


class Key(NamedTuple):
    """One setting."""

    group: str
    name: str
    type: str
    default: str
    """The default value as YAML."""
    meaning: str


def all_keys() -> Iterator[Key]:
    """All keys in the order of the config's groups."""
    for group, section in Config.model_fields.items():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            yield Key(group, name, _type(field), _default(field), " ".join((field.description or "").split()))


def markdown() -> str:
    """The text of docs/config.md."""
    lines = [HEADING]
    previous = ""
    for key in all_keys():
        if key.group != previous:
            described = " ".join((Config.model_fields[key.group].annotation.__doc__ or "").split())
            lines.append(
                f"\n## {key.group}\n\n{described}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |"
            )
            previous = key.group
        cells = (f"`{key.group}.{key.name}`", key.type, f"`{key.default}`", key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _type(field: FieldInfo) -> str:
    """Describe a type, such as `int ≥ 1`, `recent | weighted` or `float > 0 | null`."""
    bounds = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in _SIGNS.items()
        if isinstance(limit, annotated_types.BaseMetadata) and hasattr(limit, name)
    ]
    kinds = [_kind(each) for each in _alternatives(field.annotation)]
    return " | ".join([" ".join([kinds[0], " and ".join(bounds)]).strip(), *kinds[1:]])


def _kind(annotation: Any) -> str:  # noqa: ANN401 - any type
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " | ".join(_kind(each) for each in inner)
    if origin in (tuple, list):
        return f"list of {' | '.join(_kind(each) for each in inner if each is not ...)}"
    if origin is dict:
        return "mapping"
    return _NAMES.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _alternatives(annotation: Any) -> tuple[Any, ...]:  # noqa: ANN401
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    print(markdown(), end="")
