"""Runs covo-convert in forked children and kills each at another moment; prints what every one left behind.

    python kill_at.py SRC DST --times N         kill -9 after N different times
    python kill_at.py SRC DST --steps           kill -9 before each operation on files that names DST
    ... --force                                 onto an existing checkpoint, which is put there first
    ... --text-only                             without speech, which is faster
    ... --two-renames                           as on a system that cannot exchange two folders in one step

One JSON object on stdout: `states`, one for each kill ("none", "old", "new" or what is wrong), and `killed`, how many
children did not live to their end. A run without a kill between them must succeed and leave only the destination.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import xxhash

from covo_npu.convert import folder, plan, report, source, write  # noqa: F401  imported once, before the forks
from covo_npu.convert.cli import main
from covo_npu.runtime.checkpoint.format import BLOCK_BYTES, MANIFEST, read_manifest


def convert(arguments: argparse.Namespace, kill_before: int = 0, kill_after_s: float = 0.0) -> tuple[bool, int, float]:
    """Return whether a child was killed, how many operations it named, how long it took."""
    read, told = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        count = 0

        def hook(event: str, details: tuple) -> None:
            nonlocal count
            name = arguments.dst.name
            if event == "ctypes.dlsym" or any(
                name in str(detail) for detail in details if isinstance(detail, (str, Path))
            ):
                count += 1
                if count == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        options = ["--force"] * arguments.force + ["--no-token2wav"] * arguments.text_only
        code = main(["--src", str(arguments.src), "--dst", str(arguments.dst), *options])
        os.write(told, str(count).encode())
        os._exit(code)
    os.close(told)
    if kill_after_s:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    operations = int(os.read(read, 20) or 0)
    os.close(read)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and os.waitstatus_to_exitcode(status):
        sys.exit(f"a run without a kill ended with {os.waitstatus_to_exitcode(status)}")
    return killed, operations, time.perf_counter() - start


def state(dst: Path, old: str) -> str:
    """Return what is at the destination."""
    if not dst.exists():
        return "none"
    manifest = read_manifest(dst)
    for name, record in manifest.files.items():
        data = (dst / name).read_bytes()
        blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
        if list(record.blocks) != [xxhash.xxh3_128_hexdigest(block) for block in blocks]:
            return f"damaged: {name}"
    return "old" if (dst / MANIFEST).read_text() == old else "new"


def prepare(arguments: argparse.Namespace) -> str:
    """Put the starting state there; return the old checkpoint's manifest, "" if there is none."""
    shutil.rmtree(arguments.dst, ignore_errors=True)
    if not arguments.force:
        return ""
    shutil.copytree(arguments.old, arguments.dst)
    return (arguments.dst / MANIFEST).read_text()


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the states after all kills."""
    if arguments.two_renames:
        folder._exchange = lambda a, b: False
    prepare(arguments)
    convert(arguments)  # the first run warms up
    prepare(arguments)
    _, operations, seconds = convert(arguments)
    moments = random.Random(5)
    points: list[dict[str, float]] = [{"kill_after_s": moments.uniform(0, seconds)} for _ in range(arguments.times)]
    points += [{"kill_before": n + 1} for n in range(operations if arguments.steps else 0)]
    states, killed = [], 0
    for number, point in enumerate(points):
        old = prepare(arguments)
        died, _, _ = convert(arguments, **point)  # type: ignore[arg-type]
        killed += died
        states.append(state(arguments.dst, old))
        if number % 4 == 0 and (arguments.force or states[-1] == "none"):
            convert(arguments)
            states.append(f"then {state(arguments.dst, old)}")
            if left := [path.name for path in arguments.dst.parent.iterdir() if path != arguments.dst]:
                states.append(f"left behind: {left}")
    return {"states": states, "killed": killed, "operations": operations, "points": len(points)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path)
    parser.add_argument("--old", type=Path)
    parser.add_argument("--times", type=int, default=0)
    for flag in ("--steps", "--force", "--two-renames", "--text-only"):
        parser.add_argument(flag, action="store_true")
    print(json.dumps(run(parser.parse_args())))
