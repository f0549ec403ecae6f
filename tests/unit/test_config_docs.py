import re
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from bert4rec import config_docs
from bert4rec.config import Config

pytestmark = pytest.mark.unit

DOCS = Path(__file__).parents[2] / "docs"


def test_the_committed_reference_is_the_generated_one():
    assert (DOCS / "config.md").read_text() == config_docs.markdown(), "python -m bert4rec.config_docs > docs/config.md"


def test_every_key_is_listed_once():
    listed = re.findall(r"^\| `(\w+\.\w+)` \|", config_docs.markdown(), re.M)
    fields = {group: section.annotation.model_fields for group, section in Config.model_fields.items()}
    assert listed == [f"{group}.{name}" for group in fields for name in fields[group]]


class _Example(BaseModel):
    a: int = Field(1, ge=1)
    b: float = Field(0.5, gt=0, lt=1)
    c: bool | None = None
    d: Literal["x", "y"] = "x"
    e: tuple[Literal["p", "q"], ...] = ("p",)
    f: int | None = Field(None, ge=2)
    g: str = "text: with a colon"
    h: dict[str, float] = Field(default_factory=dict)
    i: list[int] = Field([1, 2], min_length=1)


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("a", "int ≥ 1", "1"),
        ("b", "float > 0 and < 1", "0.5"),
        ("c", "true | false | null", "null"),
        ("d", "x | y", "x"),
        ("e", "list of p | q", "[p]"),
        ("f", "int ≥ 2 | null", "null"),
        ("g", "text", "'text: with a colon'"),
        ("h", "mapping", "{}"),
        ("i", "list of int", "[1, 2]"),
    ],
)
def test_types_and_defaults_as_a_user_writes_them(name, kind, default):
    field = _Example.model_fields[name]
    assert (config_docs._type(field), config_docs._default(field)) == (kind, default)
