"""A second, slow implementation of the readers and `prepare`, row by row with Python's csv, to compare with."""

import csv
import io
import math
import re
from datetime import UTC, datetime, timedelta

from bert4rec.config import DataConfig
from bert4rec.data.features import FEATURES
from bert4rec.data.files import METADATA
from tests.twins.reference import PreparedTwin, ids_as_they_are_kept

LARGEST_TIME = 1e11
_FOUR_CENTURIES = 146_097 * 86_400  # in seconds


class UnusableError(Exception):
    """A file is unusable. The message says why."""


def read_ratings(content: bytes, data: DataConfig) -> list[tuple]:
    """(user, item[, time]) of a CSV file, in order; times as `settled_times` leaves them to do."""
    text, delimiter = _text(content), data.delimiter
    if len(delimiter) > 1:
        text, delimiter = text.replace(delimiter, "\x1f"), "\x1f"
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter))
    if data.header:
        header = [name.strip() for name in rows[0]] if rows else []
    else:
        header = [str(number) for number in range(1, len(next(filter(None, rows), [])) + 1)]
        rows = [[], *rows]
    wanted = [data.columns.get(role, role) for role in ("user", "item")]
    if data.columns.get("time", "time") in header:
        wanted.append(data.columns.get("time", "time"))
    _check_utf8(*header)
    if any(header.count(name) != 1 for name in wanted):
        raise UnusableError("header")
    ratings = []
    for row in rows[1:]:
        if not row:
            continue
        if len(row) != len(header):
            raise UnusableError(f"fields of {row}")
        user, item, *time = (row[header.index(name)].replace("\x1f", data.delimiter) for name in wanted)
        _check_utf8(user, item, *time)
        if not (user.strip() and item.strip()):
            raise UnusableError(f"an id of {row} is missing")
        ratings.append((user.strip(), item.strip(), *time))
    return ratings


def with_seconds(ratings: list[tuple], unit: str) -> tuple[list[tuple], bool]:
    """The same with times in Unix seconds, and whether these have years. `unit` is data.time_unit."""
    if not ratings or len(ratings[0]) == 2:
        return ratings, False
    texts = [rating[2] for rating in ratings]
    first = next((text for text in texts if text.strip()), "")
    if re.match(r"\s*\d{4}(-\d|\d{4}T\d)", first):
        times, unit = [iso_seconds(text) for text in texts], "clock"
    else:
        numbers = [number(text) for text in texts]
        unit = unit_of(numbers) if unit == "auto" else unit
        scale = {"s": 1, "order": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
        times = [calendar_seconds(value) if unit == "date" else value / scale[unit] for value in numbers]
        if any(time is None or abs(time) > LARGEST_TIME for time in times):
            raise UnusableError("a time is out of range")
    return [(user, item, time) for (user, item, _), time in zip(ratings, times, strict=True)], unit != "order"


def unit_of(numbers: list[float]) -> str:
    """What the numbers are by their size."""
    if any(abs(value) > 1e20 for value in numbers):
        raise UnusableError("a time is too large")
    if all(calendar_seconds(value) is not None for value in numbers):
        return "date"
    if all(abs(value) < 1e8 for value in numbers):
        return "order"
    for low, high, unit in ((-1, 1e11, "s"), (1e11, 1e14, "ms"), (1e14, 1e17, "us"), (1e17, 1e20, "ns")):
        if all(low < abs(value) <= high for value in numbers):
            return unit
    raise UnusableError("times of several units")


def calendar_seconds(value: float) -> float | None:
    """Seconds of 20240131 or 20240131235959 of the years 1900 to 2100; None for another number."""
    digits = str(int(value))
    if value != int(value) or len(digits) not in (8, 14) or not "1900" <= digits[:4] <= "2100":
        return None
    try:
        return datetime.strptime(f"{digits:0<14} +0000", "%Y%m%d%H%M%S %z").timestamp() if _has_day(digits) else None
    except ValueError:
        return None


def _has_day(digits: str) -> bool:
    return "00" not in (digits[4:6], digits[6:8])


def iso_seconds(text: str) -> float:
    """Seconds of an ISO 8601 date or time, in UTC if it has no zone."""
    text = re.sub(r" ?(UTC|Z)$", "+00:00", text.strip())
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UnusableError(f"time {text!r}") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) / 1e6


def number(time: str) -> float:
    """Parse a number. Raise if the readers would refuse its spelling."""
    if not re.fullmatch(r"[ \t]*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?[ \t]*", time, re.ASCII):
        raise UnusableError(f"time {time!r}")
    if abs(float(time)) == math.inf:
        raise UnusableError(f"time {time!r}")
    return float(time)


def read_metadata(content: bytes, column: str, separator: str) -> list[tuple]:
    """(item, value) of a TSV file, in order; several for a field of a list that holds several."""
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
        item = item.strip()
        if not item:
            raise UnusableError("item is missing")
        if column == "year" and value:
            if not re.fullmatch(r"-?\d{1,5}(\.0*)?", value, re.ASCII) or abs(float(value)) > 32767:
                raise UnusableError(f"year {value!r}")
            value = int(float(value))
        is_list = column in FEATURES and FEATURES[column].is_list
        values = [value]
        if is_list and separator and separator in value:
            values = [part.strip() for part in value.split(separator)]
        rows += [(item, each) for each in values if each != ""]
    return rows


def prepared(files: dict[str, bytes], **options) -> PreparedTwin:
    """The prepared dataset of `files`, content by name: ratings.csv and metadata. `options` are those of the data."""
    data = DataConfig(**options)
    ratings, has_years = with_seconds(read_ratings(files["ratings.csv"], data), data.time_unit)
    return prepared_from(ratings, files, has_years=has_years, separator=data.list_separator)


def prepared_from(
    ratings: list[tuple],
    files: dict[str, bytes],
    are_strings: tuple = (False, False),
    has_years: bool = True,
    separator: str = "|",
) -> PreparedTwin:
    """The same from rows with Unix seconds. `are_strings` says whether users (items) stay strings even if all are
    numbers."""
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
        rows.append((user, [item for _, item in history], year_of(history[-1][0]) if has_time and has_years else None))
        for _, item in history:
            counts[item] = counts.get(item, 0) + 1
    tables = {
        key: read_metadata(files[f"{key}.tsv"], column, separator)
        for key, column in METADATA.items()
        if f"{key}.tsv" in files
    }
    if any(rows and not {item for item, _ in rows} & {str(item) for item in counts} for rows in tables.values()):
        raise UnusableError("no item of a metadata file has ratings")

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
