"""Finds out which columns of an interactions file are the user, the item and the time, and says what to set if it
cannot."""

import re
from collections.abc import Mapping, Sequence

from bert4rec.config import DataConfig
from bert4rec.data.files import require_columns
from bert4rec.errors import InputError, shown

_WORDS = {
    "user": "user|u|uid|reviewer|customer|visitor|member|account|client|person|session|viewer|listener",
    "item": "item|i|iid|movie|product|asin|book|isbn|track|song|artist|business|article|film|video|sku|game|news",
    "time": "time|timestamp|ts|date|datetime|dt|epoch|(unix|event|review|click|order|view|rating)(time|date|timestamp)",
}
_OTHER_TIMES = {
    *("release", "released", "birth", "run", "life", "publish", "published", "publication", "watch", "dwell"),
    *("elapsed", "duration", "total", "spent", "screen", "join", "joined"),
}
_DELIMITERS = {"\t": "tab", ";": "';'", "|": "'|'", "::": "'::'", ",": "','", " ": "' '"}


def find_columns(
    path: str, names: tuple[str, ...], data: DataConfig, folder: dict[str, str], first: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Say what each column of a file is.

    Parameters
    ----------
    names
        The file's own names of its columns; numbers if it has no header.
    folder
        Columns that its folders give it.
    first
        Fields of the first line of a CSV file, to say what is wrong with it.

    Returns
    -------
    columns
        The names with user, item and time for the columns to read, wherever these come from, and no other column of
        these names.
    folder
        Values of those that come from the folders.

    Raises
    ------
    InputError
        If a column is missing or doubled, or the file has a time that nothing reads.
    """
    own = {role: data.columns.get(role, role) for role in ("user", "item", "time")}
    if "time" not in data.columns and "time" not in names and "time" not in folder:
        own["time"] = None
    wanted = {role: name for role, name in own.items() if name is not None}
    in_folder = {role: folder[name] for role, name in wanted.items() if name in folder and name not in names}
    if len(in_folder) == len(wanted):
        raise InputError(f"{path}: all columns come from its folders; expected at least one in the file")
    required = [name for role, name in wanted.items() if role not in in_folder]
    require_columns(path, names, required, _hint(names, first, data) if set(required) - set(names) else "")
    if "time" not in wanted and "time" not in data.columns:
        _refuse_unread_time(path, [*names, *folder], data)
    role_of = {name: role for role, name in wanted.items()}
    columns = [role_of.get(name, f"{name} (not read)" if name in wanted else name) for name in names]
    return (*columns, *in_folder), tuple(in_folder.items())


def _refuse_unread_time(path: str, names: list[str], data: DataConfig) -> None:
    columns: dict[str, str | None] = {str(role): name for role, name in data.columns.items()}
    likely = [name for name in names if _is_likely("time", name)]
    if likely:
        plural = "s" * (len(likely) > 1)
        raise InputError(
            f"{path}: no column time, but column{plural} {shown(', '.join(likely))}, which prepare would not read; set "
            f"{_option(columns | {'time': likely[0]})}, or {_option(columns | {'time': None})} to keep the "
            "order of rows"
        )


def _hint(names: Sequence[str], first: Sequence[str], data: DataConfig) -> str:
    """What a user could set so that the columns are found."""
    if first and first[0][:1] in ("{", "["):
        return "; this looks like JSON, expected CSV or Parquet"
    if first and len(first) == 1:
        for delimiter, spelled in _DELIMITERS.items():
            if delimiter != data.delimiter and delimiter in first[0]:
                fields = [field.strip() for field in first[0].split(delimiter)]
                return f"; the first line has the separator {spelled}: set data.delimiter={spelled}" + _hint(
                    fields, fields, data.model_copy(update={"delimiter": delimiter})
                )
    if not data.header:
        return f"; without a header, columns have numbers: {_option({'user': '1', 'item': '2', 'time': '4'})}"
    if first and all(re.fullmatch(r"-?\d+(\.\d*)?([eE]\d+)?", name) for name in first):
        time = {"time": str(len(first))} if len(first) > 2 else {}
        return "; the first line is a row of numbers: for a file without a header set data.header=false " + _option(
            {"user": "1", "item": "2", **time}
        )
    likely = {role: [name for name in names if _is_likely(role, name)] for role in _WORDS}
    found: dict[str, str | None] = {role: matching[0] for role, matching in likely.items() if matching}
    found |= {role: name for role, name in data.columns.items() if name in names or name is None}
    if {"user", "item"} <= set(found) and found != {role: role for role in found}:
        return f"; perhaps {_option(found)}"
    return "" if set(data.columns) >= {"user", "item"} else "; data.columns names other columns"


def _option(columns: Mapping[str, str | None]) -> str:
    pairs = ", ".join(f"{role}: {'null' if name is None else name}" for role, name in columns.items())
    return f'data.columns="{{{shown(pairs, 300)}}}"'


def _is_likely(role: str, name: str) -> bool:
    """Whether a column's name says that it is a user, an item or a time, in any of the usual ways to write names."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name.split(":")[0])]
    if role == "time":
        is_time = words and (re.fullmatch(_WORDS["time"], words[-1]) or (len(words) > 1 and words[-1] == "at"))
        return bool(is_time) and not _OTHER_TIMES & set(words)
    return any(re.fullmatch(f"({_WORDS[role]})(id)?", word) for word in words)
