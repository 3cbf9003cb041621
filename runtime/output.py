"""Where results go. Nothing of anybody's is destroyed: every file that a command line writes beside a checkpoint is
written here.

A regular file appears whole or not at all; links are followed; pipes and devices are written into. `write_new` never
touches what is there, `write` replaces it. Names are cut to what a file system takes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from covo_npu.kernels.errors import CovoError

log = logging.getLogger(__name__)

MAX_NAME_BYTES = 255  # of a file, where the file system does not say
SPARE_BYTES = 24  # of a name: for a number, and what a partial file has around it
DESCRIPTOR = re.compile(r"/dev/(?:fd/(\d+)|(stdout)|(stderr))|/proc/(?:self|thread-self)/fd/(\d+)")
# What a file system answers that cannot do what was asked.
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK, errno.ENOTTY, errno.EBADF)
NO_LINKS = (errno.EPERM, errno.EMLINK, errno.EXDEV, *UNSUPPORTED)
IN_PLACE = (errno.EACCES, errno.EPERM, errno.EBUSY)  # the file may be written and its folder not: a mounted file


class OutputError(CovoError):
    """A result cannot be written where it should go."""


def require_writable(target: str | os.PathLike[str], ours: Callable[[bytes], bool] | None = None) -> None:
    """Raise OutputError unless a file can be written there, its folders made if need be. Makes nothing.

    ours: whether the content of a file that is there may be replaced.
    """
    path = Path(target)
    try:
        if not os.fspath(path.name) or path.is_dir():
            raise OutputError(f"{target}: is a folder, expected the name of a file")
        found = path.stat()
    except FileNotFoundError:
        require_writable_folder(path.resolve().parent)
        if (size := len(os.fsencode(path.name))) > (longest := longest_name(path.parent)):
            raise OutputError(f"{target}: a name of {size} bytes, {longest} are possible there") from None
        return
    except (OSError, ValueError) as error:
        raise unwritable(target, error) from error
    if stat.S_ISSOCK(found.st_mode) or not os.access(path, os.W_OK):
        raise OutputError(f"{target}: cannot be written: no permission, or a socket; choose another place")
    if ours is not None and stat.S_ISREG(found.st_mode) and found.st_size and _descriptor(path) is None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise unwritable(target, error) from error
        if not ours(content):
            raise OutputError(
                f"{target}: exists and is not a result of this command: choose another name, or remove it"
            )


def require_writable_folder(folder: Path) -> None:
    """Raise OutputError unless files can be made in the folder, or the folder itself can be made. Makes nothing."""
    try:
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    except (OSError, ValueError) as error:
        raise unwritable(folder, error) from error
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: cannot be written ({existing} is not a writable folder); choose another place")


def write(target: str | os.PathLike[str], data: bytes) -> None:
    """Write into a pipe or a device; make or replace a regular file, which is whole at every moment.

    A link stays a link. Raises OutputError if that cannot be done.
    """
    path = Path(target)
    try:
        if (descriptor := _descriptor(path)) is not None:
            _write_into(os.dup(descriptor), data)
            return
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        existing = path.stat() if path.exists() else None
        if existing is not None and not stat.S_ISREG(existing.st_mode):
            _write_into(os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC), data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial(path.parent) as new:
                _fill(new, data)
                if existing is not None:
                    with contextlib.suppress(OSError):  # not all file systems have modes
                        shutil.copymode(path, new)
                new.replace(path)
        except OSError as error:
            if existing is None or error.errno not in IN_PLACE:
                raise
            _write_into(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC), data)
    except (OSError, ValueError) as error:
        raise unwritable(target, error) from error


def write_new(path: Path, data: bytes) -> Path:
    """Return where the data is: in a new file of this name, or if one is there, of this name with a number.

    Raises OutputError if that cannot be done.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial(path.parent) as new:
            _fill(new, data)
            return appear(new, path)
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error


def keep(path: Path, data: bytes) -> tuple[Path, str]:
    """Return what write_new returns, and "": or, if that cannot be done, a place for temporary files, and why."""
    try:
        return write_new(path, data), ""
    except OutputError as error:
        place = write_new(aside(path.stem, path.suffix), data)
        return place, f"{error}; it is in {place}"


def aside(stem: str, suffix: str) -> Path:
    """Return the path of a file in a new folder for temporary files: for what cannot be written where it should go."""
    return fitting(Path(tempfile.mkdtemp(prefix="covo-")), stem, suffix)


def fitting(folder: Path, stem: str, suffix: str) -> Path:
    """Return the path of a file in a folder. A name with which it would be too long is cut, its hash behind it."""
    whole, room = os.fsencode(stem), longest_name(folder) - len(suffix) - SPARE_BYTES
    if len(whole) > room:
        end = room - 9
        while end and whole[end] & 0xC0 == 0x80:  # within a character
            end -= 1
        stem = f"{os.fsdecode(whole[:end])}~{hashlib.blake2b(whole, digest_size=4).hexdigest()}"
    return folder / f"{stem}{suffix}"


def longest_name(folder: Path) -> int:
    """Return how many bytes the name of a file in the folder may have."""
    existing = next((parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists()), "/")
    try:
        return os.pathconf(existing, "PC_NAME_MAX")
    except (OSError, ValueError):
        return MAX_NAME_BYTES


def sync(descriptor: int) -> None:
    """Put a file or a folder on the disk. Where the file system cannot do that by request, it is logged, once."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(f"this file system cannot put a file or folder on the disk by request ({error.strerror})")


def unwritable(target: str | os.PathLike[str], error: Exception) -> OutputError:
    """Return the error for a place that cannot be written."""
    return OutputError(
        f"{os.fspath(target)}: cannot be written: {getattr(error, 'strerror', None) or error}; choose another folder"
    )


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, the first time."""
    log.warning(message)


def appear(file: Path, path: Path) -> Path:
    """Return the name that a file got: this one, or if a file of this name is there, one with a number behind it."""
    for number in itertools.count(1):
        place = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        with contextlib.suppress(FileExistsError):
            _rename_new(file, place)
            return place
    raise AssertionError("numbers do not end")


def _rename_new(file: Path, place: Path) -> None:
    """Give a file its name, perhaps beside its old one. Raises FileExistsError if there is one of this name."""
    try:
        os.link(file, place)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))  # ours from here on
        file.replace(place)


@contextlib.contextmanager
def partial(folder: Path) -> Iterator[Path]:
    """Yield the name of a hidden file to be made in a folder, which goes if it is not renamed."""
    path = folder / f".{os.getpid()}-{os.urandom(4).hex()}.partial"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _fill(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        sync(file.fileno())


def _write_into(descriptor: int, data: bytes) -> None:
    with open(descriptor, "wb") as file:
        file.write(data)


def _descriptor(path: Path) -> int | None:
    """Return the descriptor of this process that a path like /dev/stdout names."""
    match = DESCRIPTOR.fullmatch(os.fspath(path))
    if not match:
        return None
    return 1 if match[2] else 2 if match[3] else int(match[1] or match[4])
