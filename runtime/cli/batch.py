"""covo-run --batch: dialogues from a file of JSON lines, answered side by side, each written when it is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote

import xxhash

from covo_npu.kernels.errors import CovoError, listed
from covo_npu.runtime import output
from covo_npu.runtime.cli.console import legible

if TYPE_CHECKING:
    from covo_npu.runtime.engine import Dialogue, Engine
    from covo_npu.runtime.events import Reply, Ticket
    from covo_npu.runtime.model import CovoAudio
    from covo_npu.runtime.options import Ask

Results = dict[str, tuple[list[str], bool]]  # id -> the names of the questions that were answered, whether it failed

RESULTS = "results.jsonl"
SETTINGS = "results.settings.json"  # how those were answered
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class BatchError(CovoError):
    """A file of dialogues, or the results of an earlier run, cannot be used."""


@dataclass(frozen=True, slots=True)
class Item:
    """One dialogue of the file: spoken questions, one a round, to be answered on their own."""

    id: str
    questions: tuple[Path, ...]


@dataclass(slots=True)
class Answer:
    """The replies of one dialogue. error: why it ended before its last round, or None.

    warnings: what is odd about questions and replies; faults: of writing them.
    """

    item: Item
    replies: list[Reply] = field(default_factory=list)
    error: CovoError | None = None
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


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


def read_items(path: Path) -> list[Item]:
    """Return the dialogues of a file: one JSON object a line with "id", a text of its own, and "audio", path or list.

    Relative paths start at the file's folder, of a pipe at the working folder. Raises BatchError with the faults of the
    first ten lines that have any.
    """
    items: dict[str, Item] = {}
    faults = []
    folder = path.parent if path.is_file() else Path()
    try:
        content = path.read_bytes()
        if content.startswith(UTF_16):
            raise BatchError(f"{path}: is text in UTF-16; save it as UTF-8")
        lines = content.decode("utf-8-sig").split("\n")  # not splitlines(): a text may hold U+2028 and its like
    except (OSError, ValueError) as error:
        raise BatchError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            name, audio = _entry(json.loads(line))
            if name in items:
                raise ValueError(f"id {name!r} stands there before")
        except (ValueError, RecursionError) as error:
            faults.append(f"line {number}: {error}")
        else:
            items[name] = Item(name, tuple(folder / file for file in audio))
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise BatchError(
            f"{path}: {'; '.join(faults[:10])}{more}. "
            'Expected lines like {"id": "q1", "audio": "q1.wav"} or {"id": "d1", "audio": ["first.wav", "second.wav"]}'
        )
    return list(items.values())


def _entry(data: Any) -> tuple[str, list[str]]:
    if isinstance(data, list):
        raise ValueError('expected an object with "id" and "audio", found a list: write one object a line, without [ ]')
    if not isinstance(data, dict) or not {"id", "audio"} <= set(data):
        raise ValueError('expected an object with "id" and "audio"')
    if more := sorted(set(data) - {"id", "audio"}):
        raise ValueError(f'unknown keys {", ".join(map(repr, more))}, expected "id" and "audio" alone')
    name, audio = data["id"], [data["audio"]] if isinstance(data["audio"], str) else data["audio"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"expected a text as id, found {name!r}")
    if not isinstance(audio, list) or not audio or not all(isinstance(file, str) for file in audio):
        raise ValueError(f"expected a path or a list of paths as audio of {name!r}")
    return name, audio


def require_apart(folder: Path, json_file: str | None) -> None:
    """Raise BatchError if --json names a file that the batch writes itself."""
    places = [os.path.realpath(folder / name) for name in (RESULTS, SETTINGS)]
    if json_file not in (None, "-") and os.path.realpath(str(json_file)) in places:
        raise BatchError(f"{json_file}: holds the results of the dialogues; choose another file for --json")


@contextlib.contextmanager
def results_file(folder: Path, settings: Mapping[str, Any] | None = None) -> Iterator[tuple[IO[bytes], Results]]:
    """Yield the results of a folder, open for appending and locked, and what is in them.

    A last line without its end, of a run that was cut off while writing, is removed: its dialogue is answered again.
    settings: how dialogues are answered now; beside results that were made otherwise nothing is written. Raises
    BatchError then, if another process writes there, or if a line is not a result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BatchError(
                f"{path}: another process is writing there; wait for it, or choose another --output"
            ) from error
        except OSError as error:
            if error.errno not in output.UNSUPPORTED:
                raise
            output.warn_once(f"{folder}: no locks there ({error.strerror}): let no second process write there")
        file.seek(0)
        whole, _, cut = file.read().rpartition(b"\n")
        done: Results = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                done[entry["id"]] = [Path(one["input"]).name for one in entry["rounds"]], "error" in entry
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise BatchError(
                    f"{path}: line {number} is not a result; remove it, or choose another --output"
                ) from error
        if cut and not (folder / SETTINGS).exists():  # a run of ours notes its settings before its first line
            raise BatchError(f"{path}: its last line is not a result; remove it, or choose another --output")
        _require_same(folder / SETTINGS, settings or {}, bool(done))
        file.truncate(len(whole) + 1 if whole else 0)
        file.seek(0, os.SEEK_END)
        yield file, done


def _require_same(path: Path, settings: Mapping[str, Any], answered: bool) -> None:
    """Note the settings of this run, unless there are results: then raise BatchError if theirs were others."""
    before: Mapping[str, Any] = {}
    if answered and path.exists():
        try:
            before = json.loads(path.read_text("utf-8"))
            changed = [key for key in settings if key in before and before[key] != settings[key]]
            others = [f"{key}: {before[key]!r} there, {settings[key]!r} now" for key in changed]
        except (OSError, ValueError, TypeError) as error:
            raise BatchError(
                f"{path}: does not say how the results beside it were made ({error}); choose another --output"
            ) from error
        if others:
            raise BatchError(
                f"{path.parent}: holds results that were made with other settings ({'; '.join(others)}): "
                "take the same, or choose another --output"
            )
    if before != settings:
        output.write(path, (json.dumps(settings, indent=1) + "\n").encode())


def settings_of(model: CovoAudio, ask: Ask) -> dict[str, Any]:
    """Return what answers depend on, for JSON: the checkpoint, the number formats, what is asked."""
    asked = dataclasses.asdict(dataclasses.replace(ask, voice=None))
    voice = [getattr(ask.voice, part.name) for part in dataclasses.fields(ask.voice)] if ask.voice else []
    settings = {
        **asked.pop("sampling"),
        **asked,
        "voice": xxhash.xxh3_64_hexdigest(b"".join(part.numpy().tobytes() for part in voice)),
        "dtype": model.report.dtype,
        "token2wav_dtype": model.report.token2wav_dtype,
        "vocoder_dtype": model.report.vocoder_dtype,
        "max_context": model.max_context,
        "weights": xxhash.xxh3_64_hexdigest(repr([file.blocks for file in model.manifest.files.values()]).encode()),
    }
    return json.loads(json.dumps(settings))  # as they are read again


def answers(engine: Engine, items: Iterable[Item], ask: Ask) -> Generator[Answer, None, None]:
    """Yield the answer of each dialogue when it is complete. A dialogue is taken when a slot is free for it."""
    from covo_npu.runtime.engine import Dialogue
    from covo_npu.runtime.events import Done, Failed

    waiting = iter(items)
    active: dict[Ticket, tuple[Dialogue, Answer]] = {}

    def continued(dialogue: Dialogue, answer: Answer) -> bool:
        """Whether the next question of a dialogue is under way; not if there is none, or if it cannot be used."""
        if len(answer.replies) == len(answer.item.questions) or answer.error:
            return False
        try:
            question = answer.item.questions[len(answer.replies)]
            waveform = engine.model.waveform(question, warn=answer.warnings.append)
            active[engine.submit(dialogue, waveform, ask)] = dialogue, answer
        except CovoError as error:
            answer.error = error
        return answer.error is None

    try:
        while True:
            free = engine.free_slots and engine.speaking < engine.num_slots
            if free and (item := next(waiting, None)) is not None:
                if not continued(dialogue := Dialogue(), answer := Answer(item)):
                    yield answer
                continue
            if not active:
                return
            for event in engine.step():
                if not isinstance(event, Done | Failed):
                    continue
                dialogue, answer = active.pop(event.ticket)
                if isinstance(event, Done):
                    answer.replies.append(event.reply)
                    answer.warnings += event.reply.warnings
                elif isinstance(event.error, CovoError):
                    answer.error = event.error
                else:
                    raise event.error
                if not continued(dialogue, answer):
                    engine.forget(dialogue)
                    yield answer
    finally:  # an interruption leaves nothing that is still spoken
        for ticket in active:
            engine.cancel(ticket)


def run(engine: Engine, ask: Ask, items: Sequence[Item], folder: Path, on_answer: Callable[[Answer], None]) -> Totals:
    """Return the totals after answering all dialogues that the results in `folder` lack.

    An answer's WAV files are written first, then its line, which is on the disk when the next one is begun: after an
    interruption the same command goes on with what is missing. A dialogue that fails is an answer too, with "error".
    Raises BatchError if the results there were made with other settings, or of other questions.
    """
    with results_file(folder, settings_of(engine.model, ask)) as (file, done):
        _require_same_questions(items, done, folder)
        rounds = tokens = failed = 0
        waiting = [item for item in items if item.id not in done]
        started = time.perf_counter()
        with contextlib.closing(answers(engine, waiting, ask)) as answered:
            for answer in answered:
                file.write(_line(result(answer, folder)))
                file.flush()
                output.sync(file.fileno())
                rounds += len(answer.replies)
                tokens += sum(len(reply.tokens) for reply in answer.replies)
                failed += answer.error is not None or bool(answer.faults)
                on_answer(answer)
        seconds = time.perf_counter() - started
    load = engine.load
    return Totals(
        dialogues=len(waiting),
        failed=failed,
        skipped=len(items) - len(waiting),
        rounds=rounds,
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds if seconds else 0.0,
        mean_batch=load.step_tokens / load.steps if load.steps else 0.0,
    )


def _require_same_questions(items: Iterable[Item], done: Results, folder: Path) -> None:
    """Raise BatchError if a dialogue was answered before, and has other questions now, by name or number."""
    others = []
    for item in items:
        asked = [legible(question.name) for question in item.questions]
        answered, failed = done.get(item.id, (asked, False))
        if answered != (asked[: len(answered)] if failed else asked):
            others.append(item.id)
    if others:
        raise BatchError(
            f"{folder / RESULTS}: holds results of other questions under these ids: "
            f"{listed([repr(one) for one in others])}. Give them other ids, or choose another --output"
        )


def _line(entry: Mapping[str, Any]) -> bytes:
    """Return a line of results; a text that is not Unicode is escaped, so that it is read again as it was."""
    try:
        return (json.dumps(entry, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(entry) + "\n").encode()


def result(answer: Answer, folder: Path) -> dict[str, Any]:
    """Return the JSON object of an answer, after writing the WAV files of its replies into the folder.

    Any id is the name of a file, and no two the same; what is there under such a name is left alone.
    """
    from covo_npu.runtime.cli.record import round_record, write_speech

    rounds = []
    name = quote(answer.item.id, safe="", errors="surrogatepass")
    for number, (question, reply) in enumerate(zip(answer.item.questions, answer.replies), 1):
        place, fault = write_speech(reply, folder, name, f"-{number:02d}.wav")
        answer.faults += [fault] if fault else []
        wav = None if place is None else str(place) if fault else place.name
        rounds.append(round_record(legible(str(question)), reply, wav))
    line: dict[str, Any] = {"id": answer.item.id, "rounds": rounds}
    if answer.warnings:
        line["warnings"] = [legible(warning) for warning in answer.warnings]
    if answer.error is not None:
        line["error"] = legible(str(answer.error))
    return line
