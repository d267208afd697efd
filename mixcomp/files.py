"""Files that are written whole or not at all, and read without trusting what lies on the disk.

Writing: everything goes to a sibling with a name of its own, is flushed to the disk, and takes the place of
the old version in one rename; a crash, a full disk or Ctrl-C leaves the old version as it was.  Reading: plain
names only, no symbolic links, and check and use share one descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mixcomp.errors import ArtifactError, MixCompError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

#: names of files inside a saved folder: plain, portable, no leading dot
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")

_PARTIAL = ".partial"
_PIECE = 1 << 24
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_name(name: object) -> str:
    """The name itself if it is a plain file name; otherwise ``ArtifactError``.  Nothing is opened."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ArtifactError(
            f"file name {name!r:.200} is not a plain name: 1 to 64 of the characters A-Z a-z 0-9 . _ - "
            "and no leading dot; save the model again"
        )
    return name


def open_regular(folder: Path, name: str) -> BinaryIO:
    """Open a regular file of a folder, unbuffered; links, pipes, devices and folders are an ``ArtifactError``.

    One kind of link is followed: those of a Hugging Face cache, from ``snapshots/<revision>`` into its ``blobs``.
    """
    path = folder / check_name(name)
    if path.is_symlink() and path.resolve().parent == folder.resolve().parent.parent / "blobs":
        path = path.resolve()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: the file is missing; copy or save the folder again") from None
    except OSError as error:
        what = "it is a symbolic link" if error.errno == errno.ELOOP else str(error.strerror)
        raise ArtifactError(f"{path}: cannot be opened ({what}); copy or save the folder again") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ArtifactError(f"{path}: is not a regular file; copy or save the folder again")
    return os.fdopen(descriptor, "rb", buffering=0)


def check_size(file: BinaryIO, name: str, size: int) -> None:
    """``ArtifactError`` unless the open file holds exactly ``size`` bytes."""
    found = os.fstat(file.fileno()).st_size
    if found != size:
        problem = "truncated" if found < size else "too long"
        raise ArtifactError(f"{name}: {problem}, {found} bytes where {size} are listed; copy or save the folder again")


def fill(file: BinaryIO, name: str, target: memoryview, offset: int) -> None:
    """Read exactly ``len(target)`` bytes from ``offset`` on, through short reads; threads may share the file."""
    done = 0
    while done < len(target):
        try:
            count = os.preadv(file.fileno(), [target[done:]], offset + done)
        except OSError as error:
            raise ArtifactError(f"{name}: cannot be read ({error.strerror}); check the disk") from error
        if not count:
            raise ArtifactError(f"{name}: ended {len(target) - done} bytes early; copy or save the folder again")
        done += count


def read_whole(folder: Path, name: str, limit: int) -> bytes:
    """The bytes of a small file; more than ``limit`` is an ``ArtifactError`` before anything is read."""
    with open_regular(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ArtifactError(f"{name}: {size} bytes, at most {limit} are read; save the model again")
        data = bytearray(size)
        fill(file, name, memoryview(data), 0)
        return bytes(data)


def check_digest(folder: Path, name: str, size: int, wanted: str) -> None:
    """``ArtifactError`` unless the file has this size and sha256; reads it piece by piece."""
    digest = hashlib.sha256()
    with open_regular(folder, name) as file:
        check_size(file, name, size)
        piece = memoryview(bytearray(min(_PIECE, size)))
        for start in range(0, size, _PIECE):
            part = piece[: size - start]
            fill(file, name, part, start)
            digest.update(part)
    if digest.hexdigest() != wanted:
        raise ArtifactError(f"{name}: damaged, its sha256 is not the listed one; copy or save the folder again")


def sha256(data: bytes | memoryview) -> str:
    """Digest as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into a ``StorageError`` that says how much room is left."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        free = _free_bytes(target)
        raise StorageError(
            f"{target}: the file system refused a write ({reason}; {free} bytes free there); what was there "
            "before is unchanged: make room or choose another folder"
        ) from error


def need_room(target: Path, needed: int) -> None:
    """``StorageError`` if fewer than ``needed`` bytes are free where ``target`` will lie."""
    free = _free_bytes(target)
    if free < needed:
        raise StorageError(
            f"{target}: {needed} bytes are needed and {free} are free; make room or choose another folder"
        )


def require_replaceable(target: Path, manifest: str, limit: int, listed: Callable[[bytes], Iterable[str]]) -> None:
    """``ArtifactError`` unless ``target`` is absent, empty, or holds nothing but what a manifest in it lists."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target}: is a file; give the name of a folder to save to")
    found = {path.name for path in target.iterdir()}
    ours: set[str] = set()
    if manifest in found:
        try:
            ours = {manifest, *listed(read_whole(target, manifest, limit))}
        except MixCompError as error:
            raise ArtifactError(
                f"{target}: what is there cannot be read, so it is not replaced ({error}); "
                "choose another folder or remove this one"
            ) from error
    if found - ours:
        raise ArtifactError(
            f"{target}: holds files that MixComp did not write: {sorted(found - ours)[:5]}; "
            "choose another folder or remove them"
        )


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a new file to the disk itself; its size in bytes and its sha256."""
    digest = hashlib.sha256()
    size = 0
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Put ``data`` (text as UTF-8) at ``path``: the old file or the new one, never a torn one.

    Raises ``StorageError`` when the file system refuses; the old file is intact then and nothing else is left.
    """
    path = Path(path)
    partial = _sibling(path)
    with storage_errors(path):
        try:
            write_file(partial, [data.encode() if isinstance(data, str) else data])
            os.replace(partial, path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its place when the block ends well.

    If the block raises, ``target`` stays as it was.  The caller has checked that what is there may go.
    """
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        partial, lock = _claim(target)
        try:
            yield partial
            sync_folder(partial)
            _put_in_place(partial, target)
            sync_folder(target.parent)
        finally:
            # after a failure these are the unfinished files, after a success the replaced ones
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, target: Path) -> None:
    try:
        os.rename(partial, target)  # works where nothing or an empty folder is
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _exchange(partial, target)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step; in two, undone on failure, where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
        if done == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code))
    aside = _sibling(other)
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")


def _claim(target: Path) -> tuple[Path, int]:
    """A new empty sibling folder and the descriptor that holds its lock, so that nobody sweeps it."""
    while True:
        partial = _sibling(target)
        partial.mkdir()
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # another writer swept it before it could be locked
            continue
        with suppress(OSError):  # a file system without locks: then nothing is ever swept
            fcntl.flock(lock, fcntl.LOCK_EX)
        if partial.is_dir():
            return partial, lock
        os.close(lock)


def _sweep(target: Path) -> None:
    """Remove what killed writers of ``target`` left; a living writer holds the lock of its folder."""
    pattern = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{8}" + re.escape(_PARTIAL))
    for path in target.parent.iterdir():
        if not pattern.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        with suppress(OSError):  # gone already, or locked
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)


def _free_bytes(target: Path) -> int:
    place = next(p for p in (target, *target.absolute().parents) if p.is_dir())
    return shutil.disk_usage(place).free
