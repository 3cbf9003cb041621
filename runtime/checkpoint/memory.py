"""How much memory there is. Imports nothing, so that covo-check doctor can ask where something is broken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MEMORY_INFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")  # lines of number:controllers:path; version 2 has neither of the first two
GROUPS = Path("/sys/fs/cgroup")
# The files of a group in versions 2 and 1: what it may use, what it uses; where it says what can be given back.
FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
)


def available_memory_bytes() -> float:
    """Return the bytes that can be allocated without swapping, in the machine and in the limits of containers.

    Infinity where the system does not say.
    """
    return min((_available_in_machine(), *(left for group in _groups() for left in _left(group))))


def _available_in_machine() -> float:
    lines = _text(MEMORY_INFO).splitlines()
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), float("inf"))


def _groups() -> Iterator[Path]:
    """Yield the groups of this process and those around them. Inside a container its own may look like the root."""
    yield from (GROUPS, GROUPS / "memory")
    for line in _text(OWN_GROUPS).splitlines():
        _, controllers, path = (line + "::").split(":")[:3]
        if controllers in ("", "memory"):
            group = GROUPS / controllers / path.lstrip("/")
            yield from (place for place in (group, *group.parents) if GROUPS in place.parents)


def _left(group: Path) -> Iterator[float]:
    """Yield how much more a group may use, if it has a limit. Cached files count as free, as MemAvailable has it."""
    for limit, used, statistics, key in FILES:
        texts = [_text(group / name).strip() for name in (limit, used)]
        if all(text.isdigit() for text in texts):  # no limit is "max", or a number beyond any memory
            found = dict(line.split() for line in _text(group / statistics).splitlines() if len(line.split()) == 2)
            yield max(0.0, float(texts[0]) - float(texts[1]) + float(found.get(key, 0)))


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError:
        return ""
