"""What the times of an input are, and their Unix seconds."""

import re
from collections import Counter
from typing import assert_never

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert4rec.config import TimeUnit

UNIT_NAMES: dict[TimeUnit, str] = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
    "date": "dates",
    "order": "ordinals",
}
LARGEST_NUMBER = 1e20
_SMALLEST_TIME = 1e8  # the year 1973 in seconds; what lies below in all rows is no real log's time
_BOUNDS = (_SMALLEST_TIME, 1e11, 1e14, 1e17)  # 1e11: the year 5138 in seconds, but 1973 in milliseconds, and so on
_SIZES = ("ordinals", "seconds", "milliseconds", "microseconds", "nanoseconds")
_DATES = {"ordinals": "dates such as 20240131", "milliseconds": "dates such as 20240131235959"}
_FITTING: dict[TimeUnit, set[str]] = {
    "date": set(_DATES.values()),
    "order": {"ordinals", _DATES["ordinals"]},
    "s": {"seconds", "ordinals", _DATES["ordinals"]},
    "ms": {"milliseconds", _DATES["milliseconds"]},
    "us": {"microseconds"},
    "ns": {"nanoseconds"},
}
"""The sizes of numbers that each unit explains, in order of preference."""
_SPELLINGS = (
    (r"^\s+|\s+$", ""),
    (r"^(\d{4})(\d\d)(\d\d)[Tt ](\d\d)(\d\d)(\d\d)", r"\1-\2-\3T\4:\5:\6"),  # the basic format
    (r"^(\d{4})(\d\d)(\d\d)[Tt ](\d\d)(\d\d)", r"\1-\2-\3T\4:\5"),
    (r"\[[^\]]*\]$", ""),  # Java adds the zone's name
    (r"(?i) ?(utc|gmt|z)$", "Z"),
    (r"^(\d{4}-\d\d-\d\d)t", r"\1T"),
    (r"[.,](\d{1,6})\d*", r".\1"),
    (r"(\d) ([-+]\d\d)", r"\1\2"),
)
"""Patterns and replacements that make the one spelling that Arrow parses of all that ISO 8601 and databases have."""


def sizes_of(numbers: np.ndarray) -> Counter[str]:
    """How many of the numbers [N] look like each of: ordinals, seconds, milli-, micro-, nanoseconds, dates."""
    magnitude = np.abs(numbers)
    if not len(numbers) or (magnitude.min() >= _BOUNDS[0] and magnitude.max() <= _BOUNDS[1]):
        return +Counter(seconds=len(numbers))
    size = np.searchsorted(_BOUNDS, magnitude, side="left")  # 1e11 seconds are still seconds
    size[magnitude == _SMALLEST_TIME] = 1
    is_date = ~np.isnan(_calendar(numbers))
    counts = Counter[str]()
    for place, name in enumerate(_SIZES):
        dates = int((is_date & (size == place)).sum())
        counts[name] = int((size == place).sum()) - dates
        if dates:
            counts[_DATES[name]] = dates
    return +counts


def size_of_number(number: float) -> str:
    """What one number looks like."""
    return next(iter(sizes_of(np.array([number]))))


def unit_of(sizes: Counter[str]) -> TimeUnit | None:
    """The unit of numbers of these sizes; None if they do not agree on one. Without numbers: seconds."""
    if not sizes:
        return "s"
    return next((unit for unit, fitting in _FITTING.items() if set(sizes) <= fitting), None)


def fits(size: str, unit: TimeUnit) -> bool:
    """Whether a number of this size may have the unit."""
    return size in _FITTING[unit]


def majority(sizes: Counter[str]) -> TimeUnit:
    """The unit that most numbers fit."""
    return max(_FITTING, key=lambda unit: sum(count for size, count in sizes.items() if fits(size, unit)))


def unit_note(unit: TimeUnit | None, sizes: Counter[str]) -> str:
    """A line for the user if the unit was taken from the size of the numbers; empty for seconds."""
    if not sizes or unit is None or unit == "s":
        return ""
    if unit == "order":
        return (
            "WARNING times are numbers below 100,000,000, which as Unix seconds are before 1973: taken as an order "
            "alone, so that no interaction has a year and no later release is filtered; data.time_unit says what they "
            "are"
        )
    name = " or ".join(sorted(sizes)) if unit == "date" else f"{sizes.most_common(1)[0][0]} since 1970"
    return f"times are {name}, by their size; data.time_unit={unit} says so for certain"


def to_seconds(numbers: np.ndarray, unit: TimeUnit) -> np.ndarray:
    """[N] float64 Unix seconds of numbers; NaN for a number that is no date. An order stays as it is."""
    match unit:
        case "s" | "order":
            return numbers
        case "ms":
            return numbers / 1e3
        case "us":
            return numbers / 1e6
        case "ns":
            return numbers / 1e9
        case "date":
            return _calendar(numbers)
        case _:
            assert_never(unit)


def _calendar(numbers: np.ndarray) -> np.ndarray:
    """[N] float64 Unix seconds of dates such as 20240131 or 20240131235959, from 1900 to 2100; NaN for others."""
    numbers = np.where(np.isfinite(numbers), numbers, 0)
    has_clock = numbers >= 1e13
    day, clock = np.where(has_clock, numbers // 1e6, numbers), np.where(has_clock, numbers % 1e6, 0)
    usable = (day >= 19000101) & (day <= 21001231) & (day % 1 == 0) & (clock % 1 == 0)
    day, clock = np.where(usable, day, 19700101).astype(np.int64), np.where(usable, clock, 0).astype(np.int64)
    year, month, day = day // 10_000, day // 100 % 100, day % 100
    hour, minute, second = clock // 10_000, clock // 100 % 100, clock % 100
    usable &= (month >= 1) & (month <= 12) & (day >= 1) & (hour <= 23) & (minute <= 59) & (second <= 59)
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    usable &= days.astype("datetime64[M]") == months
    seconds = days.astype("datetime64[s]").astype(np.int64) + 3600 * hour + 60 * minute + second
    return np.where(usable, seconds, np.nan)


def looks_like_a_date(text: str) -> bool:
    """Whether a text is meant as an ISO 8601 date, and not as a number."""
    return bool(re.match(r"\s*\d{4}(-\d|\d{4}T\d)", text))


def parse_number(text: str) -> float:
    """Parse a number as Arrow's reader does; NaN if the reader refuses it."""
    try:
        return float(pa.scalar(text.strip(" \t")).cast(pa.float64()).as_py())
    except pa.ArrowInvalid:
        return np.nan


def parse_dates(texts: pa.ChunkedArray) -> np.ndarray:
    """[N] float64 Unix seconds of ISO 8601 dates and times; a time without a zone is UTC.

    Raises
    ------
    pa.ArrowInvalid
        If one is none.
    """
    try:
        return _unix(texts.cast(pa.timestamp("us")))
    except pa.ArrowInvalid:
        pass
    for pattern, replacement in _SPELLINGS:
        texts = pc.replace_substring_regex(texts, pattern, replacement)
    has_zone = pc.match_substring_regex(texts, r"\d[T ]\d\d.*(Z|[-+]\d\d(:?\d\d)?)$")
    nothing = pa.scalar(None, pa.string())
    zoned = pc.if_else(has_zone, texts, nothing).cast(pa.timestamp("us", "UTC")).cast(pa.timestamp("us"))
    return _unix(pc.coalesce(zoned, pc.if_else(has_zone, nothing, texts).cast(pa.timestamp("us"))))


def _unix(moments: pa.ChunkedArray) -> np.ndarray:
    seconds: np.ndarray = moments.cast(pa.int64()).to_numpy() / 1e6
    return seconds


def date_of(seconds: float) -> str:
    """A time for people."""
    return str(np.datetime64(int(np.floor(seconds)), "s")).replace("T", " ")
