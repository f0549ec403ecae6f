"""A second, slow implementation of the readers and `prepare`, row by row with Python's csv, to compare with."""

import csv
import gzip
import io
import math
import re
from datetime import UTC, datetime

from bert4rec.data.files import METADATA
from tests.twins.reference import PreparedTwin, ids_as_they_are_kept

LARGEST_TIME = 1e11
_FOUR_CENTURIES = 146_097 * 86_400  # in seconds


class UnusableError(Exception):
    """A file is unusable. The message says why."""


def read_ratings(content: bytes) -> list[tuple]:
    """(user, item[, time]) of a CSV file, in order."""
    rows = list(csv.reader(io.StringIO(_text(content), newline=""), strict=True))
    header = [name.strip() for name in rows[0]] if rows else []
    wanted = ["user", "item", "time"][: 2 + ("time" in header)]
    _check_utf8(*header)
    if any(header.count(name) != 1 for name in wanted):
        raise UnusableError("header")
    ratings = []
    for row in rows[1:]:
        if not row:
            continue
        if len(row) != len(header):
            raise UnusableError(f"fields of {row}")
        user, item, *time = (row[header.index(name)] for name in wanted)
        _check_utf8(user, item, *time)
        if not (user and item):
            raise UnusableError(f"an id of {row} is missing")
        ratings.append((user, item, *map(seconds, time)))
    return ratings


def seconds(time: str) -> float:
    """Parse a time. Raise if the readers would refuse its spelling."""
    if (
        not re.fullmatch(r"[ \t]*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?[ \t]*", time, re.ASCII)
        or abs(float(time)) > LARGEST_TIME
    ):
        raise UnusableError(f"time {time!r}")
    return float(time)


def read_metadata(content: bytes, column: str) -> list[tuple]:
    """(item, value) of a TSV file, in order."""
    lines = re.split(r"\r\n|\n|\r", _text(content))
    header = [name.strip() for name in lines[0].split("\t")]
    _check_utf8(*header)
    if any(header.count(name) != 1 for name in ("item", column)):
        raise UnusableError("header")
    rows = []
    for line in lines[1:]:
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) != len(header):
            raise UnusableError(f"fields of {line!r}")
        item, value = (_unquoted(fields[header.index(name)]) for name in ("item", column))
        _check_utf8(item, value)
        if not item:
            raise UnusableError("item is missing")
        if column == "year" and value:
            if not re.fullmatch(r"-?\d{1,5}(\.0*)?", value, re.ASCII) or abs(float(value)) > 32767:
                raise UnusableError(f"year {value!r}")
            value = int(float(value))
        if value != "":
            rows.append((item, value))
    return rows


def prepared(files: dict[str, bytes]) -> PreparedTwin:
    """The prepared dataset of `files`, content by name: ratings.csv and metadata."""
    files = {
        name.removesuffix(".gz"): gzip.decompress(content) if name.endswith(".gz") else content
        for name, content in files.items()
    }
    return prepared_from(read_ratings(files["ratings.csv"]), files)


def prepared_from(ratings: list[tuple], files: dict[str, bytes], are_strings: tuple = (False, False)) -> PreparedTwin:
    """The same from rows. `are_strings` says whether users (items) stay strings even if all are numbers."""
    if not ratings:
        raise UnusableError("no rows")
    users, items = (
        ids if stay else ids_as_they_are_kept(ids)
        for ids, stay in zip(
            ([str(rating[column]) for rating in ratings] for column in (0, 1)), are_strings, strict=True
        )
    )
    has_time = len(ratings[0]) == 3
    seen, histories, duplicates = set(), {}, 0
    for user, item, rating in zip(users, items, ratings, strict=True):
        time = rating[2] if has_time else 0
        if has_time and (user, item, time) in seen:
            duplicates += 1
            continue
        seen.add((user, item, time))
        histories.setdefault(user, []).append((time, item))
    counts: dict = {}
    rows, times = [], []
    for user in sorted(histories, key=_by_bytes):
        history = sorted(histories[user], key=lambda pair: pair[0])  # stable
        if has_time:
            times.append([math.floor(time) for time, _ in history])
        rows.append((user, [item for _, item in history], year_of(history[-1][0]) if has_time else None))
        for _, item in history:
            counts[item] = counts.get(item, 0) + 1
    tables = {
        key: read_metadata(files[f"{key}.tsv"], column) for key, column in METADATA.items() if f"{key}.tsv" in files
    }

    def values(key, item):
        return [value for of, value in tables.get(key, []) if of == str(item)]

    catalogue = [
        (
            item,
            counts[item],
            *(next(iter(values(key, item)), None) for key in ("years", "titles")),
            list(dict.fromkeys(values("genres", item))),
            next(iter(values("directors", item)), None),
            list(dict.fromkeys(values("writers", item))),
        )
        for item in sorted(counts, key=lambda item: (-counts[item], _by_bytes(item)))
    ]
    return PreparedTwin(rows, catalogue, duplicates, times)


def year_of(time: float) -> int:
    """UTC calendar year, also for times outside the range of datetime."""
    whole, shift = math.floor(time), 0
    while whole < 0:
        whole, shift = whole + _FOUR_CENTURIES, shift + 400
    return datetime.fromtimestamp(whole, UTC).year - shift


def _by_bytes(identifier):
    return identifier.encode() if isinstance(identifier, str) else identifier


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if re.fullmatch(r'"([^"]|"")*"', field) else field


def _text(content: bytes) -> str:
    """Decode UTF-8. Bytes that are not UTF-8 matter only in columns that are read, so keep them as surrogates."""
    return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _check_utf8(*values: str) -> None:
    if any("\udc80" <= character <= "\udcff" for value in values for character in value):
        raise UnusableError("not UTF-8")
