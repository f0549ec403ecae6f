"""Downloads MovieLens archives and converts them to our input files, `FILES`.

Every rating becomes an interaction, in the archive's row order.
"""

import csv
import hashlib
import http.client
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.csv as pacsv

from bert4rec.config import DataConfig
from bert4rec.errors import InputError, shown

FILES = ("train_ratings.csv", "titles.tsv", "genres.tsv", "years.tsv")
URL = "https://files.grouplens.org/datasets/movielens/{}.zip"
LICENCE = "MovieLens is for research use, no redistribution; cite Harper & Konstan 2015, doi.org/10.1145/2827872"
MD5: dict[str, str | None] = {  # as GroupLens publishes them beside the archives; None: at each download
    "ml-latest-small": None,  # GroupLens replaces it from time to time
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-10m": "ce571fd55effeba0271552578f2648bd",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-32m": "d472be332d4daa821edc399621853b57",
}
NAMES = tuple(MD5)
ML_100K_RATINGS_SHA256 = "bc63129f6ba7890a51749e1830a274db1422de52e25c2e53fa4c903268656789"  # of our file
RECBOLE = "recbole==1.2.1"
RECBOLE_DIR = "recbole/dataset_example/ml-100k"
RECBOLE_ITEMS_SHA256 = "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"

_SCHEMA = pa.schema([(name, pa.int64()) for name in ("user", "item", "time")])
_NO_GENRE = ("(no genres listed)", "unknown", "")
_YEAR_OF_TITLE = re.compile(r"\((\d{4})\)(?: \([A-Z]+\))?$")  # one title of ml-100k ends "(1995) (V)"
_YEAR_OF_DATE = re.compile(r"-(\d{4})$")


class _Item(NamedTuple):
    id: str
    title: str
    genres: list[str]
    released: str = ""


@dataclass(frozen=True)
class _Layout:
    ratings: str
    delimiter: str
    columns: tuple[str, str, str]
    """User, item and time: their names in `names` or, if that is empty, in the file's header."""
    names: tuple[str, ...]
    items: Callable[[Path], Iterator[_Item]]


def provide(name: str, archive: str | None = None, out_dir: str | None = None, overwrite: bool = False) -> None:
    """Put data set `name` into `out_dir` (default: data/NAME), from `archive`, data/NAME.zip or GroupLens.

    If GroupLens cannot be reached, ml-100k comes from RecBole's wheel. A complete data set in `out_dir` stays as it is.

    Raises
    ------
    InputError
        If no source is available, or a source has a wrong hash or format.
    """
    out, kept = Path(out_dir or f"data/{name}"), Path(f"data/{name}.zip")
    if not overwrite and all((out / file).is_file() for file in FILES):
        print(f"{out}: already there, left alone")
        return
    _check_target(out, overwrite)
    sha256 = ML_100K_RATINGS_SHA256 if name == "ml-100k" and archive is None else None
    if archive is None and not kept.exists():
        try:
            download(name, kept)
        except (OSError, http.client.HTTPException) as error:
            failure = f"{URL.format(name)}: {getattr(error, 'reason', error)}"
            if name != "ml-100k":
                raise InputError(f"{failure}; put {name}.zip at {kept} yourself, or pass --archive") from None
            _provide_from_recbole(out, overwrite, failure)
            return
    source = archive or str(kept)
    count = convert(source, name, str(out), overwrite=overwrite, ratings_sha256=sha256)
    print(f"{out}: {count:,} ratings of {name} from {source}. {LICENCE}")


def fetch_if_default(data_dir: str) -> None:
    """Call `ensure_ml_100k` if `data_dir` is the default of data.data_dir. Other directories belong to the user."""
    if data_dir == DataConfig.model_fields["data_dir"].default:
        ensure_ml_100k(data_dir)


def ensure_ml_100k(out_dir: str = "data/ml-100k") -> None:
    """Call `provide` for ml-100k unless `out_dir` has a ratings file, which may be the user's own.

    A finished conversion is moved into place as a whole, so an existing ratings file is always complete.

    Raises
    ------
    InputError
        As `provide`. If no source is available, the message says which were tried, why they failed and what to do.
    """
    if not Path(out_dir, FILES[0]).is_file():
        provide("ml-100k", out_dir=out_dir)


def convert(
    archive: str, layout: str, out_dir: str, *, overwrite: bool = False, ratings_sha256: str | None = None
) -> int:
    """Convert an archive, zipped or unpacked, to `FILES` in `out_dir`; return the number of ratings.

    Parameters
    ----------
    layout
        One of `NAMES`, or "recbole" for the ml-100k in RecBole's wheel.
    overwrite
        Replace an earlier conversion (never a directory that holds anything else).
    ratings_sha256
        Expected hash of the written train_ratings.csv.

    Raises
    ------
    InputError
        If the archive is damaged or has another format, `out_dir` holds other files, or the hash differs.
    """
    source, target = Path(archive), Path(out_dir)
    _check_target(target, overwrite)
    if not source.exists():
        raise InputError(f"{source}: no such archive; expected {layout} as a zip file or unpacked in a directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            new = Path(scratch, "new")  # not the directory of mkdtemp, which other users cannot read
            new.mkdir()
            _write_items(LAYOUTS[layout].items(source), new)
            count = _write_ratings(source, LAYOUTS[layout], new / FILES[0])
            if ratings_sha256:
                with (new / FILES[0]).open("rb") as stream:
                    _check_hash(f"{FILES[0]} of {source}", "sha256", stream, ratings_sha256)
            if target.exists():
                target.rename(Path(scratch, "old"))
            new.rename(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source}: damaged, or no {layout} archive ({error})") from None
    except OSError as error:
        raise InputError(f"{source}: cannot be converted to {target} ({error})") from None
    return count


def download(name: str, path: Path) -> None:
    """Download GroupLens's archive of `name` to `path`, and check the MD5 that GroupLens publishes.

    Raises
    ------
    OSError, http.client.HTTPException
        If GroupLens cannot be reached or the download breaks off.
    InputError
        If the MD5 is not the published one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    expected = MD5[name] or _published_md5(name)
    part, url, done, begin = path.with_name(f"{path.name}.part"), URL.format(name), 0, time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=10) as response, part.open("wb") as file:
            total = int(response.headers["Content-Length"] or 0)
            while block := response.read(1 << 20):
                done += file.write(block)
                if sys.stderr.isatty():
                    left = (time.monotonic() - begin) * max(total - done, 0) / done
                    line = f"{path.name}: {done / 1e6:.0f} of {total / 1e6:.0f} MB, {left:.0f} s left"
                    print(f"\r{line:60}", end="" if done < total else "\n", file=sys.stderr, flush=True)
        if done < total:
            raise OSError(f"broke off after {done:,} of {total:,} bytes")
        with part.open("rb") as stream:
            _check_hash(url, "md5", stream, expected)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _published_md5(name: str) -> str:
    """The MD5 that lies beside an archive."""
    url = f"{URL.format(name)}.md5"
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read(1000).decode(errors="replace")
    found = re.search(r"\b[0-9a-f]{32}\b", text)
    if found is None:
        raise InputError(f"{url}: holds no MD5, but {shown(text)}")
    return found[0]


def download_recbole(directory: str) -> Path:
    """Download the wheel of `RECBOLE`, which holds ml-100k, from the package index.

    Raises
    ------
    OSError
        If pip is not installed or does not find the wheel.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", directory, RECBOLE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise OSError("no answer in 300 s") from None
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return next(Path(directory).glob("*.whl"))


def _provide_from_recbole(out: Path, overwrite: bool, failure: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            wheel = download_recbole(scratch)
        except OSError as error:
            raise InputError(
                f"ml-100k is not available: {failure}; pip download {RECBOLE}, which holds a copy: {error}; "
                "put ml-100k.zip at data/ml-100k.zip, or set data.data_dir to a directory of input files"
            ) from None
        with _open(wheel, f"{RECBOLE_DIR}/ml-100k.item") as stream:
            _check_hash(f"ml-100k.item of {RECBOLE}", "sha256", stream, RECBOLE_ITEMS_SHA256)
        count = convert(str(wheel), "recbole", str(out), overwrite=overwrite, ratings_sha256=ML_100K_RATINGS_SHA256)
    print(f"{out}: {count:,} ratings of ml-100k from the wheel of {RECBOLE} ({failure}). {LICENCE}")


def _check_target(target: Path, overwrite: bool) -> None:
    found = os.listdir(target) if target.is_dir() else [target.name] if target.exists() else []
    if others := sorted(set(found) - set(FILES if overwrite else ())):
        hint = "which is no conversion's" if overwrite else "and --overwrite is not given"
        raise InputError(f"{target}: holds {', '.join(others[:5])}, {hint}; remove it or choose another directory")


def _check_hash(what: str, algorithm: str, stream: IO[bytes], expected: str) -> None:
    found = hashlib.new(algorithm)
    while block := stream.read(1 << 20):
        found.update(block)
    if found.hexdigest() != expected:
        raise InputError(
            f"{what}: {algorithm} {found.hexdigest()}, expected {expected}; it is damaged or not the published one"
        )


def _open(archive: Path, file: str) -> IO[bytes]:
    """Open `file` at the top of the archive or in a directory at its top, since archives have either form."""
    root = archive if archive.is_dir() else zipfile.Path(archive)
    for folder in (root, *(path for path in root.iterdir() if path.is_dir())):
        if (folder / file).is_file():
            return (folder / file).open("rb")
    raise InputError(f"{archive}: no {file} in it; found {', '.join(sorted(p.name for p in root.iterdir())[:5])}")


def _write_ratings(archive: Path, layout: _Layout, path: Path) -> int:
    count = 0
    try:
        with _open(archive, layout.ratings) as source, path.open("wb") as sink:
            reader = pacsv.open_csv(
                source,
                pacsv.ReadOptions(column_names=layout.names or None, use_threads=False),  # threads lose row numbers
                pacsv.ParseOptions(delimiter=layout.delimiter),
                pacsv.ConvertOptions(
                    include_columns=layout.columns,
                    column_types=dict.fromkeys(layout.columns, pa.int64()),
                    null_values=[],  # an empty id is an error
                ),
            )
            sink.write(b"user,item,time\n")
            with pacsv.CSVWriter(sink, _SCHEMA, write_options=pacsv.WriteOptions(include_header=False)) as writer:
                for batch in reader:
                    writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=_SCHEMA))
                    count += len(batch)
    except pa.ArrowException as error:
        shape = layout.delimiter.join(layout.names or layout.columns)
        raise InputError(f"{archive}, {layout.ratings}: {error}; expected whole numbers, {shape}") from None
    if not count:
        raise InputError(f"{archive}, {layout.ratings}: no ratings in it")
    return count


def _write_items(items: Iterator[_Item], out: Path) -> None:
    with (
        (out / "titles.tsv").open("w", encoding="utf-8", newline="\n") as titles,
        (out / "genres.tsv").open("w", encoding="utf-8", newline="\n") as genres,
        (out / "years.tsv").open("w", encoding="utf-8", newline="\n") as years,
    ):
        titles.write("item\ttitle\n")
        genres.write("item\tgenre\n")
        years.write("item\tyear\n")
        for item in items:
            title = re.sub(r"[\t\r\n]", " ", item.title).strip()
            titles.write(f"{item.id}\t{title}\n")
            genres.writelines(f"{item.id}\t{genre}\n" for genre in item.genres if genre not in _NO_GENRE)
            if year := _YEAR_OF_TITLE.search(title) or _YEAR_OF_DATE.search(item.released):
                years.write(f"{item.id}\t{year[1]}\n")


def _rows(
    archive: Path, file: str, separator: str, encoding: str, columns: tuple[str, ...], header: bool = False
) -> Iterator[list[str]]:
    expected = f"expected {len(columns)}: {separator.join(columns)}"
    with io.TextIOWrapper(_open(archive, file), encoding=encoding) as text:
        rows = csv.reader(text) if separator == "," else (line.rstrip("\n").split(separator) for line in text)
        for number, row in enumerate(rows, 1):
            if header and number == 1:
                if tuple(row) != columns:
                    raise InputError(f"{archive}, {file}, row 1: header {separator.join(row)}, {expected}")
            elif len(row) == len(columns):
                yield row
            elif any(row):  # u.genre ends with an empty line
                raise InputError(f"{archive}, {file}, row {number}: {len(row)} fields, {expected}")


def _items_100k(archive: Path) -> Iterator[_Item]:
    genres = [row[0] for row in _rows(archive, "u.genre", "|", "latin-1", ("genre", "index"))]
    columns = ("item", "title", "release date", "video release date", "URL", *genres)
    for row in _rows(archive, "u.item", "|", "latin-1", columns):
        yield _Item(row[0], row[1], [genre for genre, flag in zip(genres, row[5:], strict=True) if flag == "1"], row[2])


def _items_1m(archive: Path, encoding: str = "latin-1") -> Iterator[_Item]:
    for item, title, genres in _rows(archive, "movies.dat", "::", encoding, ("item", "title", "genres")):
        yield _Item(item, title, genres.split("|"))


def _items_10m(archive: Path) -> Iterator[_Item]:
    return _items_1m(archive, "utf-8")


def _items_csv(archive: Path) -> Iterator[_Item]:
    for item, title, genres in _rows(archive, "movies.csv", ",", "utf-8-sig", ("movieId", "title", "genres"), True):
        yield _Item(item, title, genres.split("|"))


def _items_recbole(archive: Path) -> Iterator[_Item]:
    columns = ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq")
    for item, title, year, genres in _rows(archive, f"{RECBOLE_DIR}/ml-100k.item", "\t", "utf-8", columns, True):
        if year == "unkonwn":  # RecBole's spelling for the one GroupLens title without a year, "unknown"
            title = "unknown"
        elif year and not title.endswith(f"({year})"):
            title = f"{title} ({year})"  # RecBole moved the last bracket of GroupLens's title, a year or a "V"
        yield _Item(item, title, genres.split(" "))


# pyarrow splits at single characters: `::` is two separators with an unnamed column between them
_DAT_COLUMNS = ("user", "", "item", "", "rating", "", "time")
_CSV = _Layout("ratings.csv", ",", ("userId", "movieId", "timestamp"), (), _items_csv)
LAYOUTS = {
    "ml-100k": _Layout("u.data", "\t", ("user", "item", "time"), ("user", "item", "rating", "time"), _items_100k),
    "ml-1m": _Layout("ratings.dat", ":", ("user", "item", "time"), _DAT_COLUMNS, _items_1m),
    "ml-10m": _Layout("ratings.dat", ":", ("user", "item", "time"), _DAT_COLUMNS, _items_10m),
    "ml-latest-small": _CSV,
    "ml-20m": _CSV,
    "ml-25m": _CSV,
    "ml-32m": _CSV,
    "recbole": _Layout(
        f"{RECBOLE_DIR}/ml-100k.inter", "\t", ("user_id:token", "item_id:token", "timestamp:float"), (), _items_recbole
    ),
}
