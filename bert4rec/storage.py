"""The only door to filesystems: local paths, or any URI that pyarrow knows (s3://, gs://, hdfs://).

A directory is whole when it holds ``manifest.json``. Writers remove it first and write it last (object stores have no
atomic rename), readers refuse a directory without it.
"""

import hashlib
import json
import os
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from bert4rec.errors import InputError

MANIFEST = "manifest.json"
_CHECKSUM = "checksum"
_BLOCK_BYTES = 8 << 20


def absolute(path: str) -> str:
    """`path` such that it means the same in every process: URIs as they are, local paths made absolute."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def join(path: str, *names: str) -> str:
    """`path` with `names` appended, for local paths and URIs alike."""
    return "/".join([path.rstrip("/"), *names])


def inside(path: str, name: str) -> str:
    """`path` with `name` appended, which was read from a file and must not lead out of `path`.

    Raises
    ------
    InputError
        If it does.
    """
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise InputError(f"{path}: names a file {name!r}, which does not lie in this directory; it was altered")
    return join(path, name)


def open_store(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of `path` and the path within it.

    Raises
    ------
    InputError
        If no filesystem is known for the URI's scheme.
    """
    try:
        filesystem, inner = pafs.FileSystem.from_uri(absolute(path))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"{path}: no filesystem for this path ({error}); expected a local path, s3:// or gs://"
        ) from None
    return filesystem, inner


def exists(path: str) -> bool:
    """Whether there is a file or a directory at `path`."""
    filesystem, inner = open_store(path)
    return bool(filesystem.get_file_info(inner).type != pafs.FileType.NotFound)


def read_bytes(path: str) -> bytes:
    """The whole of a small file."""
    filesystem, inner = open_store(path)
    with filesystem.open_input_stream(inner, compression=None) as stream:
        return bytes(stream.read())


def sha256(path: str) -> str:
    """64 hex digits of a file's content, read in blocks."""
    filesystem, inner = open_store(path)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(inner, compression=None) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_bytes(path: str, content: bytes | pa.Buffer) -> None:
    """Write a small file so that a reader sees all of it or none (renamed into place; object stores: one put)."""
    filesystem, inner = open_store(path)
    filesystem.create_dir(os.path.dirname(inner), recursive=True)
    target = f"{inner}.tmp" if isinstance(filesystem, pafs.LocalFileSystem) else inner
    with filesystem.open_output_stream(target, compression=None) as stream:
        stream.write(content)
    if target != inner:
        filesystem.move(target, inner)


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises
    ------
    InputError
        If the file is not there or holds no JSON object.
    """
    try:
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
    """What `write_sealed` wrote.

    Raises
    ------
    InputError
        If the file is not there, holds no JSON object, or something else than was written.
    """
    content = read_json(path)
    found = content.pop(_CHECKSUM, None)
    if found is None:
        raise InputError(f"{path}: has no {_CHECKSUM}; written by another version")
    if found != (expected := fingerprint(content)):
        raise InputError(f"{path}: was altered or is damaged ({_CHECKSUM} {found}, its content gives {expected})")
    return content


def remove(path: str) -> None:
    """Remove a file or a directory with all in it; nothing happens where there is none."""
    filesystem, inner = open_store(path)
    kind = filesystem.get_file_info(inner).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(inner)
    elif kind != pafs.FileType.NotFound:
        filesystem.delete_file(inner)


def move(source: str, target: str) -> None:
    """Move the directory `source` of files: at once where the filesystem can, else file by file."""
    filesystem, inner = open_store(source)
    _, inner_target = open_store(target)
    if isinstance(filesystem, pafs.LocalFileSystem):
        filesystem.move(inner, inner_target)
        return
    for info in filesystem.get_file_info(pafs.FileSelector(inner)):
        filesystem.move(info.path, join(inner_target, info.base_name))


def begin(path: str) -> None:
    """Make `path` an empty directory without a completion marker, ready to be written.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    check_writable(path)
    remove(join(path, MANIFEST))  # first, so that a reader never takes what follows for whole
    remove(path)
    filesystem, inner = open_store(path)
    filesystem.create_dir(inner, recursive=True)


def check_writable(path: str) -> None:
    """Make the directory `path` and see that a file can be written there.

    Raises
    ------
    InputError
        If not.
    """
    try:
        filesystem, inner = open_store(path)
        filesystem.create_dir(inner, recursive=True)
        probe = join(inner, ".writable")
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"1")
        filesystem.delete_file(probe)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


def commit(path: str, manifest: dict[str, Any]) -> None:
    """Mark the directory `path` as whole."""
    write_sealed(join(path, MANIFEST), manifest)


def is_complete(path: str) -> bool:
    """Whether the directory `path` was committed."""
    return exists(join(path, MANIFEST))


def fingerprint(content: Any) -> str:  # noqa: ANN401 - any JSON value
    """16 hex digits of the SHA-256 of a JSON value, the same for equal values in any key order."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
