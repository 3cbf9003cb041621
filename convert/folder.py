"""A folder that appears whole or not at all.

Everything is written into a hidden sibling `.<name>.partial-<pid>`, put on the disk, then renamed into place. A lock
file `.<name>.lock` keeps a second writer out; what a killed writer left is cleared by the next one. Nothing but renames
ever touches the destination, so a kill at any moment leaves the old folder, the new one or none. Network and FUSE file
systems may have no locks or no way to put a folder on the disk: that is logged, once, and the work goes on.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import xxhash

from covo_npu.convert.errors import ConvertError
from covo_npu.runtime.output import MAX_NAME_BYTES, UNSUPPORTED, sync, warn_once

LONGEST_BYTES = 32  # what stands around the name in a hidden one
SPARE_BYTES = 64 * 2**20  # what a file system needs beside the data, and the rows of the system prompt
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_space(folder: Path, needed: int) -> None:
    """Raise ConvertError if the disk of a folder (or of its nearest existing parent) has not that many bytes free."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed + SPARE_BYTES:
        raise ConvertError(
            f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free on the disk of {place}; "
            "make room or choose another disk; nothing was written"
        )


@contextlib.contextmanager
def new_folder(destination: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a partial folder that becomes `destination` when the block ends without an error, and vanishes otherwise.

    replace: an existing destination is swapped out, only then; without it the destination must not exist or be empty.
    Raises ConvertError if another writer is at work on the same destination.
    """
    destination = destination.resolve()  # a link stays a link: what it points at is replaced
    parent = destination.parent
    with _lock(_beside(destination, "lock"), destination):
        _clear(destination)
        if not replace and destination.exists() and any(destination.iterdir()):
            raise ConvertError(f"{destination} exists; --force replaces it once the new one is complete")
        partial = _beside(destination, f"partial-{os.getpid()}")
        partial.mkdir()
        try:
            yield partial
            _sync(partial)
            _put_in_place(partial, destination, replace)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # after an exchange: the old folder
            _sync(parent)


def _put_in_place(partial: Path, destination: Path, replace: bool) -> None:
    if not replace or not destination.exists():
        partial.rename(destination)  # onto nothing or an empty folder; anything else fails
    elif not _exchange(partial, destination):
        retired = _beside(destination, "retired")
        destination.rename(retired)  # a kill from here to the next line leaves none; the next writer puts it back
        partial.rename(destination)
        shutil.rmtree(retired)
    _sync(destination.parent)


def _clear(destination: Path) -> None:
    """Remove what killed writers left. Only called under the lock."""
    retired = _beside(destination, "retired")
    if retired.exists() and not destination.exists():
        retired.rename(destination)
    partial = re.compile(re.escape(_beside(destination, "partial-").name) + r"\d+")
    for stale in [path for path in destination.parent.iterdir() if partial.fullmatch(path.name) or path == retired]:
        shutil.rmtree(stale)


def _beside(destination: Path, kind: str) -> Path:
    """Return the hidden path beside the destination; a name with which it would be too long gives way to its hash."""
    name = destination.name
    if len(os.fsencode(name)) > MAX_NAME_BYTES - LONGEST_BYTES:
        name = xxhash.xxh3_128_hexdigest(os.fsencode(name))
    return destination.with_name(f".{name}.{kind}")


@contextlib.contextmanager
def _lock(path: Path, destination: Path) -> Iterator[None]:
    """Hold the lock file. It is removed at the end; a writer that had opened the removed one tries again."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ConvertError(f"{destination}: another process is writing there; wait for it, or stop it") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(fd)
                raise
            warn_once(f"this file system has no locks ({error.strerror}): start one conversion at a time")
        if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
            break
        os.close(fd)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step; return False where kernel, C library or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd)
    finally:
        os.close(fd)
