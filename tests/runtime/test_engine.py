"""Continuous batching: every dialogue is answered as if it were alone, whatever runs beside it, and exactly once."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runtime.tape import Tape

from covo_npu.runtime import CovoAudio, Sampling, batch_cli, cli
from covo_npu.runtime.decode import Decoder
from covo_npu.runtime.engine import Answer, Dialogue, Engine

AUDIO = Path(__file__).parents[1] / "data" / "audio"
ENGLISH, CHINESE, LONG = (
    AUDIO / f"{name}.wav" for name in ("question_en_48k_24bit", "question_zh_44k_stereo", "long_16k_over30s")
)
DIALOGUES = (
    Dialogue("one", (ENGLISH,)),
    Dialogue("two", (CHINESE, ENGLISH)),
    Dialogue("three", (LONG,)),
    Dialogue("four", (ENGLISH, CHINESE, CHINESE)),
    Dialogue("five", (CHINESE,)),
)
GREEDY, WARM = Sampling(), Sampling(temperature=0.9, top_k=50, top_p=0.95)


@pytest.fixture(scope="module")
def model(convert_tiny: Callable[[str], Path], device: str) -> CovoAudio:
    return CovoAudio.load(convert_tiny("float32"), device=device, dtype="float32", max_context=2600)


@pytest.fixture(scope="module")
def alone(model: CovoAudio) -> dict[Sampling, dict[str, list[list[int]]]]:
    """The ids of every round, one dialogue at a time, through a session."""
    found: dict[Sampling, dict[str, list[list[int]]]] = {}
    for sampling in (GREEDY, WARM):
        found[sampling] = {}
        for dialogue in DIALOGUES:
            chat = model.session("a2t", sampling, 24, seed=4)
            found[sampling][dialogue.name] = [chat.say(question).tokens for question in dialogue.questions]
    return found


def tokens(found: Iterator[Answer]) -> dict[str, list[list[int]]]:
    return {answer.dialogue.name: [reply.tokens for reply in answer.replies] for answer in found}


@pytest.mark.parametrize(
    ("max_batch", "sampling", "form"),
    [
        (1, GREEDY, "eager"), (2, WARM, "ahead"), (3, GREEDY, "eager"), (3, WARM, "captured"), (3, GREEDY, "ahead"),
        (8, GREEDY, "captured"), (8, WARM, "eager"), (8, GREEDY, "ahead"),
    ],
    ids=lambda value: f"T={value.temperature}" if isinstance(value, Sampling) else None,
)  # fmt: skip
def test_a_batch_equals_one_at_a_time(
    model: CovoAudio, alone, monkeypatch: pytest.MonkeyPatch, max_batch: int, sampling: Sampling, form: str
) -> None:
    monkeypatch.setattr(model, "capture", Tape() if form == "captured" else None)
    engine = Engine(model, max_batch, "a2t", sampling, 24, seed=4)
    engine._decoder.runs_ahead = engine._decoder.runs_ahead or form == "ahead"
    assert tokens(engine.answer(DIALOGUES)) == alone[sampling]
    assert engine.load.step_tokens == sum(len(t) - 1 for rounds in alone[sampling].values() for t in rounds)
    if max_batch > 1:
        assert engine.load.step_tokens / engine.load.steps > 1.3


def test_replies_of_different_lengths_leave_and_join_at_any_time(
    model: CovoAudio, alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop token is one that occurs early in some replies, so slots are left in the middle and are moved into."""
    whole = [t for rounds in alone[GREEDY].values() for t in rounds]
    stop = next(i for i in whole[1] if i not in whole[0])
    monkeypatch.setitem(model.manifest.special_tokens, "endoftext", stop)
    moved: list[tuple[int, int]] = []
    move = Decoder.move
    monkeypatch.setattr(Decoder, "move", lambda self, a, b: moved.append((a, b)) or move(self, a, b))
    expected = {}
    for dialogue in DIALOGUES:
        chat = model.session("a2t", GREEDY, 24)
        expected[dialogue.name] = [chat.say(question).tokens for question in dialogue.questions]
    lengths = {len(t) for rounds in expected.values() for t in rounds}
    assert len(lengths) > 1
    assert tokens(Engine(model, 3, "a2t", GREEDY, 24).answer(DIALOGUES)) == expected
    assert moved and all(source > target for source, target in moved)


def test_a_fault_ends_its_own_dialogue_only(model: CovoAudio, alone, tmp_path: Path) -> None:
    faulty = Dialogue("faulty", (ENGLISH, tmp_path / "none.wav", ENGLISH))
    found = {
        answer.dialogue.name: answer for answer in Engine(model, 2, "a2t", GREEDY, 24).answer((faulty, *DIALOGUES))
    }
    assert "none.wav" in str(found["faulty"].error)
    assert [reply.tokens for reply in found["faulty"].replies] == alone[GREEDY]["one"]
    assert {name: [r.tokens for r in answer.replies] for name, answer in found.items() if name != "faulty"} == alone[
        GREEDY
    ]
    assert all(answer.error is None for name, answer in found.items() if name != "faulty")


def test_dialogues_are_taken_when_a_slot_is_free(model: CovoAudio) -> None:
    taken: list[str] = []

    def watched() -> Iterator[Dialogue]:
        for dialogue in DIALOGUES:
            taken.append(dialogue.name)
            yield dialogue

    found = Engine(model, 2, "a2t", GREEDY, 3).answer(watched())
    assert next(found).dialogue.name in ("one", "two")
    assert taken == ["one", "two"]
    assert {answer.dialogue.name for answer in found} | {"one", "two"} == {d.name for d in DIALOGUES}


# --- the file of dialogues and its results


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
    return batch_cli.run(Engine(model, 2, "a2t", GREEDY, 6), batch, folder, on_answer)


def test_results_of_a_file(model: CovoAudio, batch: Path, tmp_path: Path) -> None:
    totals = run(model, batch, tmp_path / "out")
    found = lines(tmp_path / "out")
    assert found["one"]["rounds"][0]["tokens"] == model.session("a2t", GREEDY, 6).say(ENGLISH).tokens
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


def test_speech_is_written_under_names_of_any_id(model: CovoAudio, batch: Path, tmp_path: Path) -> None:
    batch.write_text(json.dumps({"id": "../a b", "audio": ENGLISH.name}) + "\n")
    folder = tmp_path / "out"
    batch_cli.run(Engine(model, 2, "a2ta", GREEDY, 12), batch, folder, lambda answer: None)
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
    ],
)
def test_faults_of_the_file_are_told_with_their_lines(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(batch_cli.BatchError) as error:
        batch_cli.read_dialogues(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_results_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / batch_cli.RESULTS
    path.write_text('{"id": "a"}\nnotes\n')
    with pytest.raises(batch_cli.BatchError, match="line 2 is not a result"), batch_cli.results_file(tmp_path):
        pass
    assert path.read_text() == '{"id": "a"}\nnotes\n'


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
