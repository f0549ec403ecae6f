"""Finds the input files, identifies them, and reads their headers.

If a file is wrong, the `InputError` names the file, the line, the column and what is expected.
"""

import csv
import fnmatch
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, assert_never
from urllib.parse import unquote as from_url

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from bert4rec import storage
from bert4rec.data.dataset import InputFile
from bert4rec.data.features import FEATURES
from bert4rec.errors import InputError, shown

METADATA = {"years": "year", "titles": "title", **{feature.file: name for name, feature in FEATURES.items()}}
"""For each optional file NAME.tsv or NAME.csv, its second column; the first is `item`."""
Form = Literal["text", "parquet", "gzip", "bz2", "zstd", "lz4", "xz", "zip"]
"""What a file is by its first bytes. Readers decompress all forms but text and parquet."""
HEAD_BYTES = 1 << 20
READ_BYTES = 8 << 20
_MAGIC: dict[bytes, Form] = {
    rb"PAR1[\x00-\x1f]": "parquet",
    rb"\x1f\x8b": "gzip",
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bz2",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"\x04\x22\x4d\x18": "lz4",
    rb"\xfd7zXZ\x00": "xz",
    rb"PK\x03\x04": "zip",
}
_UNREADABLE = {
    rb"ORC[^ -~]": "an ORC file",
    rb"Obj\x01": "an Avro file",
    rb"PARE[\x00-\x1f]": "an encrypted Parquet file",
    rb"ARROW1\x00": "an Arrow (Feather) file",
    rb"\xff\x06\x00\x00sNaPpY": "a file compressed by snappy",
    rb"7z\xbc\xaf": "a 7z archive",
    rb"Rar!\x1a": "a RAR archive",
    rb"\xd0\xcf\x11\xe0": "an Excel file",
    rb"\x89HDF": "an HDF5 file",
    rb"SQLite format 3\x00": "an SQLite file",
    rb"\xff\xfe|\xfe\xff": "UTF-16 text",
}
_EXPECTED = "expected CSV in UTF-8 (plain, or compressed by gzip, bzip2, zstd, lz4, xz or zip) or Parquet"
_QUOTE = ord('"')


def find_interactions(data_dir: str, data_file: str) -> list[str]:
    """Sorted names, below `data_dir`, of the files that `data_file` names.

    `data_file` is a path or a pattern: `*`, `?` and `[…]` match within a name, and a part `**` matches any number of
    folders. A folder stands for all files below it. Names that begin with `_` or `.` do not count, unless `data_file`
    spells them out.

    Raises
    ------
    InputError
        If there is no such file.
    """
    parts = [part for part in data_file.split("/") if part not in ("", ".")]
    _check_directory(data_dir)
    found = sorted(set(_matching(data_dir, "", parts)))
    if not found:
        present, near = [], data_dir
        for part in parts:  # the deepest folder that is there
            present = [name for name, _ in _entries(near)]
            if (part, True) not in _entries(near):
                break
            near = storage.join(near, part)
        listed = shown(", ".join(present[:10])) + (" …" if len(present) > 10 else "") if present else "nothing"
        raise InputError(f"{storage.join(data_dir, data_file)}: no such file; the directory holds {listed}")
    return found


def _matching(data_dir: str, base: str, parts: Sequence[str], is_folder: bool = True) -> Iterator[str]:
    """Yield the files at or below `base`, a name in `data_dir`, that the `parts` of a pattern match."""
    if not is_folder:
        if not parts:
            yield base
        return
    entries = _entries(storage.join(data_dir, base) if base else data_dir)
    visible = [(name, below) for name, below in entries if is_visible(name)]
    if not parts:
        for name, below in visible:
            yield from _matching(data_dir, _join(base, name), parts, below)
        return
    head, *rest = parts
    exact = [below for name, below in entries if name == head]
    if exact or head == "..":  # also a name that holds * or [
        yield from _matching(data_dir, _join(base, head), rest, not exact or exact[0])
    elif head == "**":
        yield from _matching(data_dir, base, rest)
        for name, below in visible if rest else ():
            yield from _matching(data_dir, _join(base, name), parts, below)
    else:
        for name, below in entries if head[0] in "._" else visible:
            if fnmatch.fnmatchcase(name, head):
                yield from _matching(data_dir, _join(base, name), rest, below)


def is_visible(name: str) -> bool:
    """Whether a file or folder counts: what Spark and others leave beside the data begins with `_` or `.`."""
    return not name.startswith(("_", "."))


def _join(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name


def _entries(directory: str) -> list[tuple[str, bool]]:
    """Sorted names in a directory, and whether each is a folder."""
    filesystem, inner = storage.open_store(directory)
    infos = filesystem.get_file_info(pafs.FileSelector(inner))
    return sorted((info.base_name, info.type == pafs.FileType.Directory) for info in infos)


def _check_directory(directory: str) -> None:
    filesystem, inner = storage.open_store(directory)
    if filesystem.get_file_info(inner).type != pafs.FileType.Directory:
        raise InputError(f"{directory}: no such directory; expected one with the input files (data.data_dir)")


def folder_values(name: str) -> dict[str, str]:
    """Columns that the folders of a file give it, as Hive and Spark name them: `date=2020-01-01/part-0.csv`."""
    pairs = [part.split("=", 1) for part in name.split("/")[:-1] if "=" in part]
    return {key: "" if value == "__HIVE_DEFAULT_PARTITION__" else from_url(value) for key, value in pairs}


def find_metadata(data_dir: str) -> dict[str, str]:
    """Names of the metadata files in `data_dir`, plain or compressed, by key of METADATA: NAME.tsv before NAME.csv."""
    found = {}
    for key in METADATA:
        names = _metadata_names(data_dir, key)
        for ending in (".tsv", ".csv"):
            named = [name for name in names if re.fullmatch(rf"{key}\{ending}(\.(gz|bz2|zst|lz4|xz|zip))?", name)]
            if named and key not in found:
                found[key] = named[0]
    return found


def unread_metadata(data_dir: str) -> list[str]:
    """A note on each file that is named like a metadata file but is not read."""
    read = find_metadata(data_dir)
    return [
        f"{name} is not read"
        + (f", because {read[key]} is there" if key in read else f"; expected {key}.tsv or {key}.csv")
        for key in METADATA
        for name in _metadata_names(data_dir, key)
        if name != read.get(key)
    ]


def _metadata_names(data_dir: str, key: str) -> list[str]:
    _check_directory(data_dir)
    return [name for name, is_folder in _entries(data_dir) if name.startswith(f"{key}.") and not is_folder]


def size_of(data_dir: str, name: str) -> int:
    """Bytes of a file."""
    filesystem, inner = storage.open_store(storage.join(data_dir, name))
    return int(filesystem.get_file_info(inner).size)


def hash_file(data_dir: str, name: str) -> InputFile:
    """Size and SHA-256 of a file."""
    return InputFile(name=name, size=size_of(data_dir, name), sha256=storage.sha256(storage.join(data_dir, name)))


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn an error from reading `path` into an InputError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        # OSError is also what pyarrow raises for damaged compression and Parquet.
        raise InputError(f"{path}: cannot be read ({error}); missing rights, or a damaged file") from None


@storage.patient
def form_of(path: str) -> Form:
    """What a file is, by its first bytes.

    Raises
    ------
    InputError
        If it is of a kind that no reader here reads.
    """
    filesystem, inner = storage.open_store(path)
    with filesystem.open_input_stream(inner, compression=None) as stream:
        head = stream.read(16)
    for pattern, form in _MAGIC.items():
        if re.match(pattern, head, re.DOTALL):
            return form
    _refuse(path, head)
    return "text"


def _refuse(path: str, head: bytes) -> None:
    for pattern, what in _UNREADABLE.items():
        if re.match(pattern, head, re.DOTALL):
            raise InputError(f"{path}: {what}; {_EXPECTED}")


@contextmanager
def open_text(path: str, form: Form) -> Iterator[pa.NativeFile]:
    """Open a file for reading from its start, decompressed.

    Raises
    ------
    InputError
        If a zip archive holds more than one file, or needs a password.
    """
    filesystem, inner = storage.open_store(path)
    match form:
        case "text" | "gzip" | "bz2" | "zstd" | "lz4":
            with filesystem.open_input_stream(inner, compression=None if form == "text" else form) as stream:
                yield stream
        case "xz":
            with filesystem.open_input_file(inner) as file, lzma.open(file) as stream:
                yield pa.PythonFile(stream, mode="r")
        case "zip":
            with filesystem.open_input_file(inner) as file, zipfile.ZipFile(file) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                members = [member for member in members if is_visible(member.filename.rpartition("/")[2])]
                if len(members) != 1 or members[0].flag_bits & 1:
                    found = "needs a password" if len(members) == 1 else f"holds {len(members):,} files"
                    raise InputError(f"{path}: a zip archive that {found}; expected one with a single file, unlocked")
                with archive.open(members[0]) as stream:
                    yield pa.PythonFile(stream, mode="r")
        case "parquet":
            raise AssertionError("Parquet is no text")
        case _:
            assert_never(form)


@storage.patient
def read_head(path: str, form: Form) -> bytes:
    """The first MiB of a text file, decompressed.

    Raises
    ------
    InputError
        If that is not text.
    """
    with open_text(path, form) as stream:
        head = bytes(stream.read(HEAD_BYTES))
    if form != "text":
        _refuse(path, head)
        for pattern, inside in _MAGIC.items():
            if re.match(pattern, head, re.DOTALL):
                raise InputError(f"{path}: a {inside} file inside of {form}; decompress it")
    return head


def first_line(path: str, head: bytes, delimiter: str) -> tuple[tuple[str, ...], int]:
    """Fields of the first line of `head`, without blanks around them, and its bytes with the line end.

    Raises
    ------
    InputError
        If it is not one line of text.
    """
    end = head.find(b"\n") + 1 or len(head)
    try:
        line = head[:end].decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise InputError(f"{path}, line 1: not UTF-8 text; it begins with {head[:8]!r}; {_EXPECTED}") from None
    if "\0" in line.replace(delimiter, ""):
        raise InputError(f"{path}, line 1: not text; it begins with {head[:8]!r}; {_EXPECTED}")
    single = one_byte(delimiter)
    line = line.replace(delimiter, single) if len(delimiter) > 1 else line
    try:
        fields = next(csv.reader([line], delimiter=single, strict=True), [])
    except csv.Error as error:
        raise InputError(f"{path}, line 1: not a header of one line ({shown(str(error))})") from None
    return tuple(name.strip() for name in fields), end


def one_byte(delimiter: str) -> str:
    """The character that stands for `delimiter` while a file is parsed; parsers take no longer ones."""
    return delimiter if len(delimiter) == 1 else "\x1f"


def read_header(path: str, delimiter: str, wanted: tuple[str, ...]) -> tuple[tuple[str, ...], int, bool]:
    """Return the column names, the header's length in bytes, and whether any data follow it.

    Raises
    ------
    InputError
        If the file is empty or a column of `wanted` is not there exactly once.
    """
    head = read_head(path, form_of(path))
    if not head.strip():
        raise InputError(f"{path}: the file is empty; expected a header with the columns {' and '.join(wanted)}")
    columns, end = first_line(path, head, delimiter)
    require_columns(path, columns, wanted)
    return columns, end, bool(head[end:].strip())


def require_columns(path: str, columns: Sequence[str], wanted: Sequence[str], hint: str = "") -> None:
    """Raise an InputError if `columns` does not have each `wanted` column exactly once."""
    for name in wanted:
        if columns.count(name) != 1:
            found = "no" if name not in columns else "more than one"
            raise InputError(
                f"{path}: {found} column {shown(name)}; found {shown(', '.join(columns), 300)}; "
                f"expected {shown(', '.join(wanted))}{hint}"
            )


class Quotes:
    """Checks the quotes after a CSV's header. RFC 4180 allows them only around a whole field, and doubled within it.

    CSV readers disagree about any other quote. An unclosed one, for example, swallows all following rows into one
    field."""

    def __init__(self, path: str, delimiter: str = ",", line: int = 2) -> None:
        self.path = path
        self.inside = False
        self._line, self._opened_in = line, line
        self._before = b"\n"  # the byte before the next block
        self._outside = np.isin(np.arange(256), list(b'"\r\n' + delimiter.encode()))  # [256] bool, by byte

    def feed(self, block: bytes) -> None:
        """Take the file's next bytes.

        Raises
        ------
        InputError
            If a quote is in a place where RFC 4180 allows none.
        """
        if b'"' in block or self._before == b'"':
            self._check(block)
        self._line += block.count(b"\n")
        self._before = block[-1:] or self._before

    def _check(self, block: bytes) -> None:
        """Check that a delimiter, a line end or another quote (doubling) stands outside each outer quote."""
        text = np.frombuffer(self._before + block, np.uint8)
        quotes = np.flatnonzero(text == _QUOTE)
        if self._before == b'"':  # the last call has checked this quote, but not the byte after it
            closed_before, quotes = quotes[: not self.inside], quotes[1:]
        else:
            closed_before = quotes[:0]
        opening, closing = quotes[int(self.inside) :: 2], quotes[1 - self.inside :: 2]
        closing = np.append(closed_before, closing)
        closing = closing[closing + 1 < len(text)]  # what follows the last byte comes with the next block
        wrong = np.append(opening[~self._outside[text[opening - 1]]], closing[~self._outside[text[closing + 1]]])
        if len(wrong):
            line = self._line + block.count(b"\n", 0, max(int(wrong.min()) - 1, 0))
            raise InputError(
                f"{self.path}, line {line}: a quote inside a field; expected quotes around whole fields only, and "
                'doubled within them ("a ""b"" c")'
            )
        if len(opening):
            self._opened_in = self._line + block.count(b"\n", 0, int(opening[-1]) - 1)
        self.inside = bool((len(quotes) + self.inside) % 2)

    def end(self) -> None:
        """Take the end of the file.

        Raises
        ------
        InputError
            If a quote is left open.
        """
        if self.inside:
            raise InputError(f"{self.path}, line {self._opened_in}: a quote is opened that is never closed")


def unquote(fields: pa.Array) -> pa.Array:
    """Remove the quotes of a CSV writer, and undouble the quotes within a quoted field."""
    inner = pc.utf8_slice_codeunits(fields, 1, -1)
    quoted = pc.match_substring_regex(fields, '^"(?:[^"]|"")*"$')
    return pc.if_else(quoted, pc.replace_substring(inner, '""', '"'), fields)
