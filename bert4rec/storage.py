"""All access to filesystems: local paths, and any URI that pyarrow knows (s3://, gs://, hdfs://).

A directory is complete if it holds ``manifest.json``. Writers write this file last, because object stores have no
atomic rename, and remove it first where they write over files that it names. Readers refuse a directory without it.
"""

import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from bert4rec.errors import InputError

MANIFEST = "manifest.json"
_CHECKSUM = "checksum"
_BLOCK_BYTES = 8 << 20
_SECONDS_TO_LIST = 60.0
_SECONDS_OF_PATIENCE = 30.0
_TRANSIENT = (
    "AWS Error NETWORK_CONNECTION",
    "AWS Error INTERNAL_FAILURE",  # also what becomes of any error that is longer than the file that was asked for
    "AWS Error SLOW_DOWN",
    "AWS Error SERVICE_UNAVAILABLE",
    "AWS Error REQUEST_TIMEOUT",
    "AWS Error UNKNOWN (HTTP status 5",
)
"""What pyarrow says when a store may answer a moment later; it has asked again for some seconds, or not at all."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def patient(work: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorator of what may be done twice: while an object store does not answer, do it again, for half a minute."""

    @wraps(work)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        end, pause = time.monotonic() + _SECONDS_OF_PATIENCE, 0.1
        while True:
            try:
                return work(*args, **kwargs)
            except OSError as error:
                if time.monotonic() + pause > end or not any(text in str(error) for text in _TRANSIENT):
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 5)

    return call


def absolute(path: str) -> str:
    """Make a local path absolute, so that it means the same in every process. URIs stay as they are."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def join(path: str, *names: str) -> str:
    """Append `names` to `path`, which may be a local path or a URI."""
    return "/".join([path.rstrip("/"), *names])


def inside(path: str, name: str) -> str:
    """Append `name`, which was read from a file, to `path`.

    Raises
    ------
    InputError
        If `name` leads out of `path`.
    """
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise InputError(f"{path}: names a file {name!r}, which is not in this directory; the file was altered")
    return join(path, name)


def open_store(path: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of `path` and the path within it.

    Raises
    ------
    InputError
        If pyarrow knows no filesystem for the URI's scheme.
    """
    try:
        filesystem, inner = pafs.FileSystem.from_uri(absolute(path))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"{path}: no filesystem for this path ({error}); expected a local path, s3:// or gs://"
        ) from None
    return filesystem, inner


def is_local(path: str) -> bool:
    """Whether `path` is on a disk of this machine, or one that is mounted as if it were."""
    return isinstance(open_store(path)[0], pafs.LocalFileSystem)


@patient
def exists(path: str) -> bool:
    """Whether a file or a directory exists at `path`.

    Raises
    ------
    InputError
        If the store does not let us look: the first that a job learns of wrong credentials.
    """
    filesystem, inner = open_store(path)
    try:
        return bool(filesystem.get_file_info(inner).type != pafs.FileType.NotFound)
    except OSError as error:
        if "ACCESS_DENIED" not in str(error):
            raise
        raise InputError(f"{path}: no access ({error}); check the credentials and their rights") from None


@patient
def read_bytes(path: str) -> bytes:
    """Read a small file."""
    filesystem, inner = open_store(path)
    with filesystem.open_input_stream(inner, compression=None) as stream:
        return bytes(stream.read())


@patient
def sha256(path: str) -> str:
    """SHA-256 of a file's content, as 64 hex digits. Reads the file in blocks."""
    filesystem, inner = open_store(path)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(inner, compression=None) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@patient
def size(path: str) -> int:
    """Bytes of a file, 0 if there is none."""
    filesystem, inner = open_store(path)
    return filesystem.get_file_info(inner).size or 0


@contextmanager
def on_local_disk(path: str) -> Iterator[str]:
    """Local path of a file, or of a copy of it that is there inside this block."""
    filesystem, inner = open_store(path)
    if isinstance(filesystem, pafs.LocalFileSystem):
        yield inner
        return
    with tempfile.TemporaryDirectory() as directory:
        copy = os.path.join(directory, os.path.basename(inner))
        _copy(path, copy)
        yield copy


@patient
def _copy(path: str, target: str) -> None:
    filesystem, inner = open_store(path)
    with filesystem.open_input_stream(inner, compression=None) as stream, open(target, "wb") as file:
        while block := stream.read(_BLOCK_BYTES):
            file.write(block)


@patient
def write_bytes(path: str, content: bytes | pa.Buffer) -> None:
    """Write a small file so that a reader sees all of it or none: by a rename, or on object stores by one put."""
    filesystem, inner = open_store(path)
    filesystem.create_dir(os.path.dirname(inner), recursive=True)
    # Each writer has its own name for what is not yet whole, or two of them would rename each other's.
    target = f"{inner}.{uuid.uuid4().hex[:8]}.tmp" if isinstance(filesystem, pafs.LocalFileSystem) else inner
    with filesystem.open_output_stream(target, compression=None) as stream:
        stream.write(content)
    if target != inner:
        filesystem.move(target, inner)


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises
    ------
    InputError
        If the file does not exist or does not hold a JSON object.
    """
    try:
        try:
            content = json.loads(read_bytes(path))
        except ValueError:  # pyarrow reads as many bytes as the file had, if another replaces it at that moment
            time.sleep(0.1)
            content = json.loads(read_bytes(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); the file is damaged") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write a JSON object, indented, all or nothing."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_sealed(path: str, content: dict[str, Any]) -> None:
    """Write a JSON object with the fingerprint of its content, for `read_sealed`."""
    write_json(path, content | {_CHECKSUM: fingerprint(content)})


def read_sealed(path: str) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Raises
    ------
    InputError
        If the file does not exist, does not hold a JSON object, or its content has changed since it was written.
    """
    content = read_json(path)
    found = content.pop(_CHECKSUM, None)
    if found is None:
        raise InputError(f"{path}: has no {_CHECKSUM}; written by another version")
    if found != (expected := fingerprint(content)):
        raise InputError(f"{path}: was altered or is damaged ({_CHECKSUM} {found}, its content gives {expected})")
    return content


@patient
def remove(path: str) -> None:
    """Remove a file, or a directory with its content. If nothing exists at `path`, do nothing."""
    filesystem, inner = open_store(path)
    kind = filesystem.get_file_info(inner).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(inner)
    elif kind != pafs.FileType.NotFound:
        filesystem.delete_file(inner)


def move(source: str, target: str, names: Sequence[str]) -> None:
    """Move the directory `source`, which holds the files `names`: at once on a local disk, otherwise file by file."""
    filesystem, inner = open_store(source)
    _, inner_target = open_store(target)
    if isinstance(filesystem, pafs.LocalFileSystem):
        filesystem.move(inner, inner_target)
        return
    for name in names:  # not those of a listing, which may lag
        filesystem.move(join(inner, name), join(inner_target, name))


def wait_until_listed(path: str, names: Sequence[str]) -> None:
    """Wait until the directory `path` shows the files `names` and no others: whoever lists it must find them all.

    Raises
    ------
    InputError
        If it does not within `_SECONDS_TO_LIST`.
    """
    filesystem, inner = open_store(path)
    end = time.monotonic() + _SECONDS_TO_LIST
    while True:
        listing = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
        found = {info.base_name for info in listing if info.is_file}
        if found == set(names):
            return
        if time.monotonic() > end:
            differing = ", ".join(sorted(found ^ set(names))[:3])
            raise InputError(
                f"{path}: shows other files than were written ({differing}); its listing lags, or another job writes "
                "there; run the same command again"
            )
        time.sleep(_SECONDS_TO_LIST / 100)


def remove_all_but(path: str, names: set[str]) -> None:
    """Remove what the directory `path` holds, except files and directories of these names."""
    filesystem, inner = open_store(path)
    for info in filesystem.get_file_info(pafs.FileSelector(inner)):
        if info.base_name not in names:
            remove(join(path, info.base_name))


def check_writable(path: str) -> None:
    """Make the directory `path` and check that it is writable.

    Raises
    ------
    InputError
        If it is not.
    """
    try:
        filesystem, inner = open_store(path)
        filesystem.create_dir(inner, recursive=True)
        probe = join(inner, f".writable-{uuid.uuid4().hex[:8]}")
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"1")
        filesystem.delete_file(probe)
    except OSError as error:
        hint = "; check the credentials and their rights" if "ACCESS_DENIED" in str(error) else ""
        raise InputError(f"{path}: cannot be written ({error.strerror or error}){hint}") from None


def commit(path: str, manifest: dict[str, Any]) -> None:
    """Mark the directory `path` as complete by writing its manifest."""
    write_sealed(join(path, MANIFEST), manifest)


def is_complete(path: str) -> bool:
    """Whether the directory `path` is complete, that is, has a manifest."""
    return exists(join(path, MANIFEST))


def fingerprint(content: Any) -> str:  # noqa: ANN401 - any JSON value
    """First 16 hex digits of the SHA-256 of a JSON value. The order of keys makes no difference."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def empty(shape: tuple[int, ...], kind: type, in_memory: bool) -> np.ndarray:
    """Values to be filled, in memory, or zeros in a file of the local disk that only this array keeps alive."""
    if in_memory:
        return np.empty(shape, kind)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, kind, "w+", shape=shape)
