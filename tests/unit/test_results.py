"""The tables of docs/results are those of the records, and README claims nothing that they do not hold."""

import json
import re

import pytest

from benchmarks import common, render
from tests.helpers.commands import ROOT

pytestmark = pytest.mark.unit


def record(date, machine="A", commit="c", notes=("note", "legend"), **figures):
    rows = [{"claim": claim, "figure": figure, "spread": "1 run"} for claim, figure in figures.items()]
    return {"date": date, "commit": commit, "machine": machine, "command": "run", "notes": list(notes), "rows": rows}


def shown(records, table=render.TABLES["tune"]):
    return [(claim, row["figure"], of["machine"]) for claim, row, of in render.current(table, records)]


def test_every_page_is_up_to_date():
    stale = [page.name for page, text in render.pages() if page.read_text() != text]
    assert not stale, "python -m benchmarks.render"


def test_every_file_of_records_has_a_table_on_one_page():
    names = [
        name for page in render.PAGES.glob("*.md") for name in re.findall(r"<!-- table: (\w+) -->", page.read_text())
    ]
    assert sorted(names) == sorted(path.stem for path in common.RESULTS.glob("*.jsonl")) == sorted(render.TABLES)


def test_records_say_where_they_come_from():
    for path in common.RESULTS.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            made = json.loads(line)
            assert set(made) == {"date", "commit", "machine", "versions", "command", "notes", "rows"}
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", made["date"])
            assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", made["commit"])
            assert made["rows"]


def test_what_readme_claims_stands_in_the_tables():
    tables = "\n".join(render.render(name, render.read(name)) for name in render.TABLES)
    for page in ("quality.md", "short_histories.md"):
        tables += (render.PAGES / page).read_text()  # published figures
    claimed = re.findall(r"\b0\.\d{3,4}\b|\b\d+\.\d+×", (ROOT / "README.md").read_text())
    assert len(claimed) >= 10
    assert not [figure for figure in claimed if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", tables)]


def test_a_newer_figure_replaces_an_older_one_of_the_same_machine():
    old, new = record("2026-01-01", x="1", y="2"), record("2026-01-02", x="3")
    elsewhere = record("2026-01-03", machine="B", x="4")
    assert shown([old, new, elsewhere]) == [("x", "4", "B"), ("x", "3", "A"), ("y", "2", "A")]


def test_the_best_comes_first_where_the_table_says_so():
    table = render.Table("{claim}", ("figure",), best_first="figure")
    assert [
        each[0] for each in shown([record("2026-01-01", low="0.1", high="0.3"), record("2026-01-02", mid="0.2")], table)
    ] == [
        "high",
        "mid",
        "low",
    ]


def test_a_table_names_each_command_once_and_leaves_out_empty_columns():
    records = [record("2026-01-01", x="1"), record("2026-01-01", commit="d", notes=("other",), y="2")]
    assert render.render("tune", records).splitlines() == [
        "| claim | figure | spread | machine | date | commit | command |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| x | 1 | 1 run | A | 2026-01-01 | c | a |",
        "| y | 2 | 1 run | A | 2026-01-01 | d | b |",
        "",
        "- a: `run`. note",
        "- b: `run`. other",
    ]


def test_published_results_come_back_as_a_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/tune.py", "--data", "a b", "--record"])
    common.publish("tune", ["note"], [{"claim": "x", "figure": "1", "spread": "2"}], True)
    (made,) = map(json.loads, (tmp_path / "results" / "tune.jsonl").read_text().splitlines())
    assert made["command"] == "python -m benchmarks.tune --data 'a b'"
    assert made["rows"] == [{"claim": "x", "figure": "1", "spread": "2"}]
    assert made["machine"] == common.machine()
    assert "| x | 1 | 2 |" in capsys.readouterr().out
    common.publish("tune", [], [{"claim": "x"}], False)
    assert len((tmp_path / "results" / "tune.jsonl").read_text().splitlines()) == 1
