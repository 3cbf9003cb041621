"""How a source arrives on a disk: in the folder of a cache, with pointers or pages in the place of files, unfinished.

A file that passes here may still be damaged; its reader says so.
"""

import fcntl
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from covo_npu.convert.config import CONFIG
from covo_npu.convert.errors import ConvertError, Kind, refuse
from covo_npu.kernels.errors import listed
from covo_npu.runtime.checkpoint.format import LFS_POINTER

AGAIN = "Download the files again."
HEAD_BYTES = 512

# What stands in the place of a file: (its first bytes, what it is).
SERVER_ANSWERS = (
    (re.compile(rb"\s*<(!doctype|html)", re.IGNORECASE), "a web page"),
    (re.compile(rb"\s*<\?xml"), "an XML message"),
    (re.compile(rb'\s*\{\s*"error"'), "a message of the server"),
    (re.compile(rb"(Access to |Entry not found|Invalid |Not Found|Repository not found|Unauthorized)"), "a message"),
)

# What programs put behind the name of a file while it is not complete: the file itself, or notes beside it.
UNFINISHED = (
    ".aria2", ".aria2__temp", ".st",  # aria2, axel
    ".crdownload", ".part", ".download", ".opdownload",  # Chrome, Firefox, Safari, Opera
    ".partial", ".tmp", ".temp", ".filepart", ".incomplete",  # curl's wrappers, WinSCP, Hugging Face
    ".!ut", ".!qb", ".bc!", ".td", ".td.cfg", ".xltd",  # torrents, Thunder
    ".downloading", ".baiduyun.downloading", ".baiduyun.p.downloading", ".baidupcs-go-downloading",
)  # fmt: skip
TRACE = re.compile(r"(\.[0-9a-f-]+)?(" + "|".join(map(re.escape, UNFINISHED)) + ")", re.IGNORECASE)  # an id, perhaps
RSYNC = re.compile(r"\.(?P<name>.+)\.[A-Za-z0-9]{6}")  # the hidden file that it renames in the end

# Where clients keep unfinished downloads, as seen from the folder of the weights. A finished one may leave some there.
CLIENTS = (
    (".cache/huggingface/download", "**/*.incomplete"),
    ("._____temp", "**/*"),  # ModelScope
    ("../../blobs", "*.incomplete"),  # Hugging Face's cache, seen from a snapshot
)
HF_LOCKS = ".cache/huggingface/download"


def source_folder(src: Path) -> Path:
    """Return the folder of the weights: src, or the only snapshot if src is a cache folder of `hf download`."""
    if src.is_file():
        raise ConvertError(f"{src}: is a file; --src expects the folder that it lies in, {src.parent}")
    if not src.is_dir():
        raise ConvertError(f"{src}: no such folder; --src expects the folder of the published weights")
    if (src / CONFIG).exists():
        return src
    patterns = ("*",) if src.name == "snapshots" else ("snapshots/*", "models--*/snapshots/*")
    snapshots = sorted(path for pattern in patterns for path in src.glob(pattern) if path.is_dir())
    if len(snapshots) == 1:
        return snapshots[0]
    if snapshots:
        rows = [f"{path}{_refs(path)}" for path in snapshots]
        raise ConvertError(
            f"{src}: holds {len(rows)} snapshots; name one with --src:\n  {listed(rows, 10, chr(10) + '  ')}"
        )
    below = sorted(str(path.parent) for path in src.glob(f"*/{CONFIG}") if path.parent.name != "token2wav")
    if below:
        raise ConvertError(
            f"{src}: has no {CONFIG}; --src expects the folder of the weights; is it {' or '.join(below)}?"
        )
    return src


def check_downloads(folder: Path, files: Mapping[str, Path]) -> tuple[str, ...]:
    """Return warnings on what lies around the files of a source. files: name -> where it is, or would be.

    Raises ConvertError that names every file that is a pointer, a page, or not complete.
    """
    heads = {name: _head(path) for name, path in files.items() if path.is_file()}
    pointers = [name for name, head in heads.items() if head.startswith(LFS_POINTER)]
    dangling = [f"{name} -> {p.readlink()}" for name, p in files.items() if p.is_symlink() and not p.exists()]
    others = [name for name, path in files.items() if path.exists() and not path.is_file()]
    answers = [f"{name}: {answer}" for name, head in heads.items() if (answer := _server_answer(name, head))]
    traces = [f"{name}: {trace} stands beside it" for name, path in files.items() for trace in _traces(path)]
    running = [f"{name}: its download is running" for name, path in files.items() if _is_locked(folder, name, path)]
    fetch = "Fetch what they point at: git lfs install, then git lfs pull in their folder; or use hf download."
    refuse(
        str(folder),
        Kind("files are pointers of git-lfs, not what they point at", pointers, fetch),
        Kind("files are folders, pipes or devices", others, AGAIN),
        Kind("links lead nowhere", dangling, "Copy what they lead to, too (cp -rL follows links), or download again."),
        Kind(
            "files are what a server said instead", answers, f"{AGAIN} Does it want you to log in or to accept terms?"
        ),
        Kind("downloads have not ended", traces + running, "Let them end or start them again; remove what they left."),
    )
    stale = [f"{name}.lock" for name, path in files.items() if path.with_name(f"{path.name}.lock").exists()]
    rest = unfinished(folder)
    return (
        *([f"{folder}: locks of downloads that nobody holds: {listed(stale)}"] if stale else []),
        *([f"{folder}: unfinished downloads: {listed(rest)}; remove them if all have ended"] if rest else []),
    )


def unfinished(folder: Path) -> list[str]:
    """Return the unfinished downloads in a folder of weights and in the places of clients around it."""
    here = [path.name for path in folder.iterdir() if path.name.lower().endswith(UNFINISHED)]
    there = [
        f"{place}/{path.name}"
        for place, pattern in CLIENTS
        if not place.startswith("..") or folder.parent.name == "snapshots"
        for path in (folder / place).glob(pattern)
        if path.is_file()
    ]
    return sorted([*here, *there])


def download_again(folder: Path) -> str:
    """Return what to do about files that are missing or damaged."""
    rest = unfinished(folder)
    return AGAIN + (f" Some have not ended: {listed(rest)}." if rest else "")


def _refs(snapshot: Path) -> str:
    """Return which names of the repository mean a snapshot: ` (main)`, or nothing."""
    refs = snapshot.parents[1] / "refs"
    names = [
        path.name
        for path in sorted(refs.glob("*"))
        if path.is_file() and path.read_bytes().strip() == os.fsencode(snapshot.name)
    ]
    return f" ({', '.join(names)})" if names else ""


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _server_answer(name: str, head: bytes) -> str:
    """Return what a server sent in the place of a file, "" for a file. An object in a JSON file is one."""
    if name.endswith(".json") and head.lstrip().startswith(b"{"):
        return ""
    said = head[:60].decode(errors="replace").strip()
    return next((f"{what}, {said!r}" for pattern, what in SERVER_ANSWERS if pattern.match(head)), "")


def _traces(path: Path) -> Iterable[str]:
    """Yield the names of the files beside one that say that it is not complete."""
    if not path.parent.is_dir():
        return
    for other in sorted(os.listdir(path.parent)):
        behind = other.startswith(path.name) and TRACE.fullmatch(other, len(path.name))
        hidden = RSYNC.fullmatch(other)
        if behind or (hidden and hidden["name"] == path.name):
            yield other


def _is_locked(folder: Path, name: str, path: Path) -> bool:
    """Return whether another process holds the lock of a file's download. A lock that nobody holds says nothing."""
    for lock in (path.with_name(f"{path.name}.lock"), folder / HF_LOCKS / f"{name}.lock"):
        try:
            descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            continue  # a file system without locks
        finally:
            os.close(descriptor)
    return False
