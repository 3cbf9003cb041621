"""covo-run --batch: the file of dialogues, its results, what an interruption leaves, the command."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from covo_npu.runtime import Ask, CovoAudio, Engine, Session, output
from covo_npu.runtime.cli import batch as batch_cli
from covo_npu.runtime.cli import run as cli
from covo_npu.runtime.cli.batch import Answer

AUDIO = Path(__file__).parents[1] / "data" / "audio"
ENGLISH, CHINESE = AUDIO / "question_en_48k_24bit.wav", AUDIO / "question_zh_44k_stereo.wav"


@pytest.fixture(scope="module")
def model(convert_tiny: Callable[[str], Path], device: str) -> CovoAudio:
    return CovoAudio.load(convert_tiny("float32"), device=device, dtype="float32", max_context=2600)


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    for source in (ENGLISH, CHINESE):
        shutil.copy(source, tmp_path)
    entries = [
        {"id": "one", "audio": ENGLISH.name},
        {"id": "a/../b", "audio": [CHINESE.name, ENGLISH.name]},
        {"id": "three", "audio": CHINESE.name},
        {"id": "gone", "audio": "gone.wav"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n\n".join(json.dumps(entry) for entry in entries) + "\n")
    return path


def lines(folder: Path) -> dict[str, dict]:
    found = [json.loads(line) for line in (folder / batch_cli.RESULTS).read_text("utf-8").splitlines()]
    assert len({line["id"] for line in found}) == len(found), "a dialogue was answered twice"
    return {line["id"]: line for line in found}


def compared(found: dict[str, dict]) -> dict[str, object]:
    return {name: ([r["tokens"] for r in line["rounds"]], line.get("error")) for name, line in found.items()}


def run(model: CovoAudio, batch: Path, folder: Path, on_answer: Callable[[Answer], None] = lambda answer: None):
    return batch_cli.run(Engine(model, 2), Ask("a2t", max_new_tokens=6), batch_cli.read_items(batch), folder, on_answer)


def test_results_of_a_file(model: CovoAudio, batch: Path, tmp_path: Path) -> None:
    totals = run(model, batch, tmp_path / "out")
    found = lines(tmp_path / "out")
    assert found["one"]["rounds"][0]["tokens"] == Session(model, mode="a2t", max_new_tokens=6).say(ENGLISH).tokens
    assert [len(found[name]["rounds"]) for name in ("one", "a/../b", "three", "gone")] == [1, 2, 1, 0]
    assert "gone.wav" in found["gone"]["error"]
    assert (totals.dialogues, totals.failed, totals.skipped, totals.rounds) == (4, 1, 0, 4)
    assert totals.tokens == sum(len(r["tokens"]) for line in found.values() for r in line["rounds"])
    assert totals.tokens_per_s == totals.tokens / totals.seconds


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_run_goes_on_with_what_is_missing(
    model: CovoAudio, batch: Path, tmp_path: Path, after: int
) -> None:
    run(model, batch, tmp_path / "whole")
    count = 0

    def interrupt(answer: Answer) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, batch, tmp_path / "out", interrupt)
    before = lines(tmp_path / "out")
    assert len(before) == after
    with (tmp_path / "out" / batch_cli.RESULTS).open("ab") as file:
        file.write(b'{"id": "thr')  # cut off while writing
    assert run(model, batch, tmp_path / "out").skipped == after
    found = lines(tmp_path / "out")
    assert compared(found) == compared(lines(tmp_path / "whole"))
    assert {name: found[name] for name in before} == before
    assert run(model, batch, tmp_path / "out").dialogues == 0


def test_an_interruption_leaves_nothing_that_is_still_spoken(model: CovoAudio, batch: Path, tmp_path: Path) -> None:
    """Or the process would speak all that was begun before it ends, and throw it away."""
    engine, steps = Engine(model, 2), 0
    step = engine.step

    def interrupted() -> object:
        nonlocal steps
        steps += bool(engine.speaking)
        if steps == 3:
            raise KeyboardInterrupt
        return step()

    engine.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        items = batch_cli.read_items(batch)
        batch_cli.run(engine, Ask(max_new_tokens=48), items, tmp_path / "out", lambda answer: None)
    assert engine.speaking == 0 and engine.free_slots == engine.num_slots


def test_speech_is_written_under_names_of_any_id(model: CovoAudio, batch: Path, tmp_path: Path) -> None:
    batch.write_text(json.dumps({"id": "../a b", "audio": ENGLISH.name}) + "\n")
    folder = tmp_path / "out"
    items = batch_cli.read_items(batch)
    batch_cli.run(Engine(model, 2), Ask(max_new_tokens=12), items, folder, lambda answer: None)
    [line] = lines(folder).values()
    speaks = bool(line["rounds"][0]["audio_codes"])
    assert speaks == (line["rounds"][0]["wav"] is not None) == ((folder / "..%2Fa%20b-01.wav").exists())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "audio": "x.wav"}\n{"id": "a", "audio": "y.wav"}', "line 2: id 'a' stands there before"),
        ("{", "line 1: "),
        ('{"id": "a"}\n[]', 'line 1: expected an object with "id" and "audio"; line 2'),
        ('{"id": 7, "audio": "x.wav"}', "expected a text as id, found 7"),
        ('{"id": "a", "audio": []}', "expected a path or a list of paths"),
        ("x\n" * 12, "and 2 more"),
        ('[{"id": "a", "audio": "x.wav"}]', "found a list: write one object a line"),
        ('{"id": "a", "audio": "x.wav", "voice": "v"}', "unknown keys 'voice'"),
    ],
)
def test_faults_of_the_file_are_told_with_their_lines(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(batch_cli.BatchError) as error:
        batch_cli.read_items(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_text_of_another_encoding_is_told(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    for encoding, says in (("utf-16", "UTF-16; save it as UTF-8"), ("gbk", "cannot be read as UTF-8")):
        path.write_text('{"id": "问题", "audio": "x.wav"}', encoding)
        with pytest.raises(batch_cli.BatchError, match=says):
            batch_cli.read_items(path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_file_systems_without_locks_work(code: int, tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    output.warn_once.cache_clear()
    with batch_cli.results_file(tmp_path) as (file, done):
        assert done == {} and file.writable()
    assert "let no second process write there" in caplog.text


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"id": "a", "rounds": []}\nnotes\n', "line 2"),
        ('{"id": "a", "audio": "a.wav"}\n', "line 1"),  # a file of dialogues
        ('{"id": "a", "rounds": []}\nnotes', "its last line"),  # no run of ours was cut off there
        ('{"accuracy": 0.93}', "its last line"),
    ],
)
def test_results_that_are_not_ours_are_left_alone(text: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / batch_cli.RESULTS
    path.write_text(text)
    with pytest.raises(batch_cli.BatchError, match=f"{place} is not a result"), batch_cli.results_file(tmp_path):
        pass
    assert path.read_text() == text


def test_two_processes_do_not_write_the_same_results(tmp_path: Path) -> None:
    with (tmp_path / batch_cli.RESULTS).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(batch_cli.BatchError, match="another process"), batch_cli.results_file(tmp_path):
            pass


def test_the_command_line(
    convert_tiny: Callable[[str], Path], batch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--ckpt", str(convert_tiny("float32")), "--device", "cpu", "--mode", "a2t", "--max-new-tokens", "4"]
    output = ["--output", str(tmp_path / "out"), "--json", str(tmp_path / "report.json")]
    assert cli.main([*common, *output, "--batch", str(batch), "--max-batch", "2"]) == 1  # one file is missing
    shown = capsys.readouterr()
    assert "gone" in shown.err and "4 dialogues: " in shown.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["totals"]["dialogues"], report["totals"]["failed"], len(report["errors"])) == (4, 1, 1)
    assert len(lines(tmp_path / "out")) == 4
    assert cli.main([*common, *output, "--batch", str(batch)]) == 0
    assert "4 answered before" in capsys.readouterr().out
    assert cli.main([*common, "--batch", str(batch), str(ENGLISH)]) == 2
    assert cli.main([*common, "--graph", "on", str(ENGLISH)]) == 1
    assert "no graphs to capture" in capsys.readouterr().err
