"""Finds the input files, identifies them, and reads their headers.

If a file is wrong, the `InputError` names the file, the line, the column and what is expected.
"""

import csv
import fnmatch
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from bert4rec import storage
from bert4rec.data.dataset import InputFile
from bert4rec.data.features import FEATURES
from bert4rec.errors import InputError

METADATA = {"years": "year", "titles": "title", **{feature.file: name for name, feature in FEATURES.items()}}
"""For each optional file NAME.tsv, its second column; the first is `item`."""
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_HEADER_BYTES = 1 << 20
READ_BYTES = 8 << 20


def find_interactions(data_dir: str, data_file: str) -> list[str]:
    """Sorted names of the files in `data_dir` that `data_file`, a name or a glob pattern, matches.

    Raises
    ------
    InputError
        If no file matches.
    """
    subdirectory, pattern = posixpath.split(data_file)
    present = _list(storage.join(data_dir, subdirectory) if subdirectory else data_dir)
    names = [pattern] if pattern in present else fnmatch.filter(present, pattern)
    if not names:
        found = ", ".join(present[:10]) + (" …" if len(present) > 10 else "") if present else "nothing"
        raise InputError(f"{storage.join(data_dir, data_file)}: no such file; the directory holds {found}")
    return [posixpath.join(subdirectory, name) for name in names]


def find_metadata(data_dir: str) -> dict[str, str]:
    """Names of the metadata files in `data_dir`, plain or compressed, by key of METADATA."""
    present = _list(data_dir)
    found = {}
    for key in METADATA:
        names = [
            name for name in present if name == f"{key}.tsv" or (name.startswith(f"{key}.tsv.") and is_compressed(name))
        ]
        if names:
            found[key] = names[0]
    return found


def size_of(data_dir: str, name: str) -> int:
    """Bytes of a file."""
    filesystem, inner = storage.open_store(storage.join(data_dir, name))
    return int(filesystem.get_file_info(inner).size)


def hash_file(data_dir: str, name: str) -> InputFile:
    """Size and SHA-256 of a file."""
    return InputFile(name=name, size=size_of(data_dir, name), sha256=storage.sha256(storage.join(data_dir, name)))


def is_compressed(name: str) -> bool:
    """Whether the file's name has the ending of a compressed file, which readers then decompress."""
    return name.endswith(_COMPRESSED)


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn an error from reading `path` into an InputError."""
    try:
        yield
    except OSError as error:  # also what pyarrow raises for damaged compression and Parquet
        raise InputError(f"{path}: cannot be read ({error}); missing rights, or a damaged file") from None


@storage.patient
def read_header(path: str, delimiter: str, wanted: tuple[str, ...]) -> tuple[tuple[str, ...], int, bool]:
    """Return the column names, the header's length in bytes, and whether any data follow it.

    Raises
    ------
    InputError
        If the file is empty or a column of `wanted` is not there exactly once.
    """
    filesystem, inner = storage.open_store(path)
    with filesystem.open_input_stream(inner, compression="detect") as stream:
        head = stream.read(_HEADER_BYTES)
    if not head.strip():
        raise InputError(f"{path}: the file is empty; expected a header with the columns {' and '.join(wanted)}")
    end = head.find(b"\n") + 1 or len(head)
    try:
        line = head[:end].decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise InputError(f"{path}, line 1: not UTF-8 text") from None
    try:
        columns = tuple(name.strip() for name in next(csv.reader([line], delimiter=delimiter, strict=True), []))
    except csv.Error as error:
        raise InputError(f"{path}, line 1: not a header of one line ({error})") from None
    require_columns(path, columns, wanted)
    return columns, end, bool(head[end:].strip())


def require_columns(path: str, columns: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """Raise an InputError if `columns` does not have each `wanted` column exactly once."""
    for name in wanted:
        if columns.count(name) != 1:
            found = "no" if name not in columns else "more than one"
            raise InputError(f"{path}: {found} column {name}; found {', '.join(columns)}; expected {', '.join(wanted)}")


def _list(directory: str) -> list[str]:
    filesystem, inner = storage.open_store(directory)
    if filesystem.get_file_info(inner).type != pafs.FileType.Directory:
        raise InputError(f"{directory}: no such directory; expected one with the input files (data.data_dir)")
    infos = filesystem.get_file_info(pafs.FileSelector(inner))
    return sorted(info.base_name for info in infos if info.is_file and not info.base_name.startswith("."))


def unquote(fields: pa.Array) -> pa.Array:
    """Remove the quotes of a CSV writer, and undouble the quotes within a quoted field."""
    inner = pc.utf8_slice_codeunits(fields, 1, -1)
    quoted = pc.match_substring_regex(fields, '^"(?:[^"]|"")*"$')
    return pc.if_else(quoted, pc.replace_substring(inner, '""', '"'), fields)
