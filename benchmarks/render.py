"""Tables of docs/results from benchmarks/results/*.jsonl: `python -m benchmarks.render [--check]`.

A page marks a table's place by the lines `<!-- table: NAME -->` and `<!-- end -->`; NAME.jsonl has its records. Every
row of a record is a figure of one claim. A newer record of the same claim on the same machine replaces it, so that a
table has one row a claim and machine; the file keeps all records. Under the table stand the commands, by their letters,
each with its record's first note. The newest record's other notes say what the columns mean.
"""

import argparse
import json
import re
import string
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, markdown

PAGES = Path(__file__).parent.parent / "docs" / "results"
_PLACE = re.compile(r"^<!-- table: (\w+) -->\n(.*?)^<!-- end -->$", re.M | re.S)


@dataclass(frozen=True)
class Table:
    """How the rows of one file of records are shown."""

    claim: str
    """What a row says something about, as a format of the row's columns; it tells newer from other figures."""
    columns: tuple[str, ...]
    """Columns of the rows that stand beside the claim; a row without one leaves it empty."""
    best_first: str = ""
    """Column by which rows stand in falling order; else newer machines come first, rows as they were recorded."""


_METRICS = ("HR@10", "NDCG@10", "spread", "popularity-100")
TABLES = {
    "ablations": Table("{change}", ("NDCG@10", "spread", "minutes")),
    "baselines": Table("{data}: {model}", (*_METRICS, "uniform-100")),
    "blend": Table("{claim}", ("seconds to fit", "MiB on disk", "users/s without", "users/s with", "memory, MiB")),
    "blends": Table(
        "{data}: {system}",
        ("HR@10", "NDCG@10", "spread", "users of 1-9 items", "of 10-49", "of 50-199", "of 200+", "weight"),
    ),
    "busy": Table(
        "{implementation}, beside {beside}, hidden {hidden}, {data}", ("tokens/s", "spread", "memory, MiB", "ours is")
    ),
    "causal": Table("{change}, seed {seed}", ("NDCG@10", "HR@10", "loss", "epochs")),
    "catalogue": Table(
        "{claim}",
        ("CPU ms a step", "of the fewest items", "memory, MiB", "of whole tables", "MB sent", "ms a step", "spread"),
    ),
    "checkpoints": Table("{saves in the middle of epochs}", ("seconds", "spread", "of the time without")),
    "discount": Table("{discount}", (*_METRICS, "popularity-100-of-all", "uniform-100")),
    "embed": Table("{implementation}", ("texts/s", "spread", "of encode")),
    "input": Table("{claim}", ("M tokens a CPU second", "M tokens/s", "spread", "waiting")),
    "large_model": Table("{claim}", ("weights, MiB", "anonymous, MiB", "mapped, MiB", "of both at once, MiB")),
    "memory": Table("{claim}", ("MiB", "of epoch 2")),
    "metadata": Table("{variant}", ("NDCG@10", "spread", "HR@10", "gates", "seconds a training")),
    "muon": Table("{implementation}, hidden {hidden}", ("ms a step", "spread", "float32 is")),
    "new_items": Table("seed {seed}", ("hidden items", "users", "AUC", "standard error")),
    "pipeline": Table("{claim}", ("figure", "spread")),
    "prepare": Table(
        "{implementation}, {rows} rows", ("seconds past it", "spread", "rows/s", "memory, MiB", "of ours")
    ),
    "quality": Table(
        "{model}",
        ("data", *_METRICS, "popularity-100-of-all", "uniform-100", "uniform-100-of-all", "one core"),
        "NDCG@10",
    ),
    "ray_cost": Table("{run}, hidden {hidden}", ("seconds", "spread", "of the time without Ray")),
    "recommend": Table(
        "{implementation}, hidden {hidden}, {data}",
        ("users/s", "seconds", "spread", "useful GFLOP/s", "share of peak", "memory, MiB", "ours is"),
    ),
    "rules": Table("{data}: {rules}", ("users/s", "seconds", "spread", "of no list", "memory, MiB")),
    "short_ablations": Table("{change}, seed {seed}", ("NDCG@10", "HR@10", "loss", "epochs", "seconds an epoch")),
    "short_histories": Table("{model}", ("HR@1", "HR@10", "NDCG@10", "spread", "coverage", "one core"), "NDCG@10"),
    "start": Table("{claim}", ("seconds", "spread", "of before")),
    "times": Table(
        "{data}, width {width}: {encoding}, seed {seed}",
        ("epochs", "loss", "NDCG@10, last", "NDCG@10, target", "NDCG@10, with the item before", "HR@10, last"),
    ),
    "times_test": Table(
        "{data}, width {width}: `{encoding}`",
        ("NDCG@10, last", "NDCG@10, target", "NDCG@10, with the item before", "HR@10, last", "epoch chosen"),
    ),
    "training": Table(
        "{implementation}, hidden {hidden}, {data}",
        ("tokens/s", "spread", "useful GFLOP/s", "share of peak", "memory, MiB", "input", "ours is"),
    ),
    "tune": Table("{claim}", ("figure", "spread")),
    "vectors": Table("{index}", ("equal lists", "recall@10")),
}


def read(name: str) -> list[dict[str, Any]]:
    """Records of NAME.jsonl, oldest first; of one day as they were appended."""
    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda record: str(record["date"]))


def current(table: Table, records: list[dict[str, Any]]) -> list[tuple[str, Mapping[str, str], dict[str, Any]]]:
    """(claim, row, record) of the newest figure of each claim and machine."""
    newest: dict[tuple[str, str], tuple[str, Mapping[str, str], dict[str, Any]]] = {}
    for record in records:
        for row in record["rows"]:
            claim = table.claim.format_map(row)
            newest[claim, record["machine"]] = claim, row, record  # stands where the claim stood first
    found = list(newest.values())
    if table.best_first:
        return sorted(found, key=lambda each: -float(each[1][table.best_first]))
    dates = {record["machine"]: record["date"] for record in records}
    machines = sorted(dates, key=lambda machine: str(dates[machine]), reverse=True)
    return sorted(found, key=lambda each: machines.index(each[2]["machine"]))


def render(name: str, records: list[dict[str, Any]]) -> str:
    """The Markdown of a table and of the commands under it."""
    table, letters = TABLES[name], dict[str, str]()
    rows = []
    for claim, row, record in current(table, records):
        source = " ".join([f"`{record['command']}`.", *record["notes"][:1]])
        letter = letters.setdefault(source, string.ascii_lowercase[len(letters)])
        columns = {column: row.get(column, "") for column in table.columns}
        where = {key: record[key] for key in ("machine", "date", "commit")}
        rows.append({"claim": claim, **columns, **where, "command": letter})
    kept = [column for column in rows[0] if any(row[column] for row in rows)]
    parts = [markdown([{column: row[column] for column in kept} for row in rows])]
    parts += [textwrap.fill(note, 120) for note in records[-1]["notes"][1:]]
    parts.append("\n".join(f"- {letter}: {source}" for source, letter in letters.items()))  # a line each, to copy
    return "\n\n".join(parts)


def pages() -> Iterator[tuple[Path, str]]:
    """Each page with its text as it ought to be."""
    for page in sorted(PAGES.glob("*.md")):
        yield page, _PLACE.sub(_place, page.read_text())


def _place(at: re.Match[str]) -> str:
    return f"<!-- table: {at[1]} -->\n\n{render(at[1], read(at[1]))}\n\n<!-- end -->"


def main() -> None:
    """Write the pages, or with --check only name those that are not up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page is not up to date")
    args = parser.parse_args()
    stale = [(page, text) for page, text in pages() if page.read_text() != text]
    for page, text in stale:
        if not args.check:
            page.write_text(text)
        print(page.name, "is not up to date" if args.check else "written")
    sys.exit(bool(stale) and args.check)


if __name__ == "__main__":
    main()
