"""covo-run --batch: dialogues from a file of JSON lines, answered side by side, each written when it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote

from covo_npu.kernels.errors import CovoError

if TYPE_CHECKING:
    from covo_npu.runtime.engine import Answer, Dialogue, Engine

RESULTS = "results.jsonl"


class BatchError(CovoError):
    """A file of dialogues, or the results of an earlier run, cannot be used."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What a batch did. seconds: from the first dialogue's start to the last one's end, loading not included."""

    dialogues: int
    failed: int
    skipped: int  # answered by an earlier run
    rounds: int
    tokens: int
    seconds: float
    tokens_per_s: float
    mean_batch: float  # dialogues that a step served on average


def read_dialogues(path: Path) -> list[Dialogue]:
    """Return the dialogues of a file: one JSON object a line with "id", a text of its own, and "audio", path or list.

    Relative paths start at the file's folder. Raises BatchError with the faults of the first ten lines that have any.
    """
    from covo_npu.runtime.engine import Dialogue  # here, so that covo-run --help need not wait for torch

    dialogues: dict[str, Dialogue] = {}
    faults = []
    try:
        lines = path.read_text("utf-8").split("\n")  # not splitlines(): a text may hold U+2028 and its like
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{path}: cannot be read as text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            name, audio = _entry(json.loads(line))
            if name in dialogues:
                raise ValueError(f"id {name!r} stands there before")
        except (ValueError, RecursionError) as error:
            faults.append(f"line {number}: {error}")
        else:
            dialogues[name] = Dialogue(name, tuple(path.parent / file for file in audio))
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise BatchError(
            f"{path}: {'; '.join(faults[:10])}{more}. "
            'Expected lines like {"id": "q1", "audio": "q1.wav"} or {"id": "d1", "audio": ["first.wav", "second.wav"]}'
        )
    return list(dialogues.values())


def _entry(data: Any) -> tuple[str, list[str]]:
    if not isinstance(data, dict) or set(data) != {"id", "audio"}:
        raise ValueError('expected an object with "id" and "audio"')
    name, audio = data["id"], [data["audio"]] if isinstance(data["audio"], str) else data["audio"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"expected a text as id, found {name!r}")
    if not isinstance(audio, list) or not audio or not all(isinstance(file, str) for file in audio):
        raise ValueError(f"expected a path or a list of paths as audio of {name!r}")
    return name, audio


@contextlib.contextmanager
def results_file(folder: Path) -> Iterator[tuple[IO[bytes], set[str]]]:
    """Yield the results of a folder, open for appending and locked, and the ids that are in them.

    A last line without its end, of a run that was cut off while writing, is removed: its dialogue is answered again.
    Raises BatchError if another process writes there, or if a line is not a result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BatchError(
                f"{path}: another process is writing there; wait for it, or choose another --output"
            ) from error
        file.seek(0)
        whole, _, _ = file.read().rpartition(b"\n")
        done = set()
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                done.add(json.loads(line)["id"])
            except (ValueError, TypeError, KeyError) as error:
                raise BatchError(
                    f"{path}: line {number} is not a result; remove it, or choose another --output"
                ) from error
        file.truncate(len(whole) + 1 if whole else 0)
        file.seek(0, os.SEEK_END)
        yield file, done


def run(engine: Engine, source: Path, folder: Path, on_answer: Callable[[Answer], None]) -> Totals:
    """Return the totals after answering all dialogues of `source` that the results in `folder` lack.

    An answer's WAV files are written first, then its line, which is on the disk when the next one is begun: after an
    interruption the same command goes on with what is missing. A dialogue that fails is an answer too, with "error".
    """
    dialogues = read_dialogues(source)
    with results_file(folder) as (file, done):
        rounds = tokens = failed = 0
        waiting = [dialogue for dialogue in dialogues if dialogue.name not in done]
        started = time.perf_counter()
        for answer in engine.answer(waiting):
            file.write((json.dumps(result(answer, folder), ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            rounds += len(answer.replies)
            tokens += sum(len(reply.tokens) for reply in answer.replies)
            failed += answer.error is not None
            on_answer(answer)
        seconds = time.perf_counter() - started
    load = engine.load
    return Totals(
        dialogues=len(waiting),
        failed=failed,
        skipped=len(dialogues) - len(waiting),
        rounds=rounds,
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds if seconds else 0.0,
        mean_batch=load.step_tokens / load.steps if load.steps else 0.0,
    )


def result(answer: Answer, folder: Path) -> dict[str, Any]:
    """Return the JSON object of an answer, after writing the WAV files of its replies into the folder."""
    from covo_npu.runtime.record import round_record, write_speech

    rounds = []
    for number, (question, reply) in enumerate(zip(answer.dialogue.questions, answer.replies), 1):
        wav = f"{quote(answer.dialogue.name, safe='')}-{number:02d}.wav"  # any id is a file name, and no two the same
        rounds.append(round_record(str(question), reply, wav if write_speech(reply, folder / wav) else None))
    line = {"id": answer.dialogue.name, "rounds": rounds}
    return line if answer.error is None else {**line, "error": str(answer.error)}
