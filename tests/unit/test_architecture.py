"""A folder imports only from those above it in the table of docs/architecture.md."""

import ast
import re

import pytest

from tests.helpers.commands import ROOT

pytestmark = pytest.mark.unit

TABLE = (
    (ROOT / "docs" / "architecture.md")
    .read_text()
    .partition("| file or folder, in import order |")[2]
    .partition("\n\n")[0]
)
ROWS = [re.findall(r"`([\w.]+?)(?:\.py|/)?`", row.split("|")[1]) for row in TABLE.splitlines() if row.startswith("| `")]
PLACE = {room: place for place, row in enumerate(ROWS) for room in row}


def room_of(module):
    """bert4rec.data.files -> data, jobs.train -> jobs; the package's own __init__ imports nothing by itself."""
    parts = module.split(".")
    return parts[0] if parts[0] == "jobs" else parts[1] if len(parts) > 1 else None


def imports_of(path):
    """Modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "bert4rec" else [f"bert4rec.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in ("bert4rec", "jobs"))


def violations(files):
    found = []
    for path in files:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if (room := room_of(module)) is None:
            continue
        for name in imports_of(path):
            other = room_of(name)
            if other != room and PLACE[other] > PLACE[room]:
                found.append(f"{path.relative_to(ROOT)} imports {name}, which docs/architecture.md lists below it")
    return found


def test_every_file_has_a_place():
    files = [*(ROOT / "bert4rec").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    rooms = {room_of(module) for module in modules} - {None}
    assert rooms <= set(PLACE), "list them in the table of docs/architecture.md"
    assert len(PLACE) > 15


def test_imports_only_lead_upwards():
    assert not violations([*(ROOT / "bert4rec").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])


def test_a_violation_names_both_files(tmp_path, monkeypatch):
    (tmp_path / "bert4rec" / "data").mkdir(parents=True)
    file = tmp_path / "bert4rec" / "data" / "files.py"
    file.write_text("from bert4rec import storage\ndef late():\n    from bert4rec.training import loop\n")
    monkeypatch.setattr("tests.unit.test_architecture.ROOT", tmp_path)
    assert violations([file]) == [
        "bert4rec/data/files.py imports bert4rec.training, which docs/architecture.md lists below it"
    ]
