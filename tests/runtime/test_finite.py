"""What is not finite does not speak: logits, samples, casts. And what several threads may do with one model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from covo_npu.runtime import CovoAudio, Session
from covo_npu.runtime.checkpoint.format import CheckpointError
from covo_npu.runtime.engine import Dialogue, Engine, NotFiniteError
from covo_npu.runtime.events import Done, Failed, Text
from covo_npu.runtime.options import Ask, Sampling, SpeechBlocks
from covo_npu.runtime.speech import SpeechStream

AUDIO = Path(__file__).parents[1] / "data" / "audio"
QUESTION = AUDIO / "question_zh_44k_stereo.wav"
SHORT = {"max_new_tokens": 6, "system": "short"}


@pytest.fixture
def model(convert_tiny: Callable[[str], Path], device: str) -> CovoAudio:
    """A model of its own: tests break it. Without graphs, which would replay what was captured before."""
    return CovoAudio.load(convert_tiny("float32"), device=device, dtype="float32", max_context=900, graph="off")


def broken_after(model, count, value, monkeypatch):
    """Let the logits hold `value` at one id from the count-th row on that is computed."""
    logits, calls = model.networks.llm.logits, []

    def broken(hidden):
        found = logits(hidden)
        calls.append(None)
        if len(calls) > count:
            found[0, 7] = value
        return found

    monkeypatch.setattr(model.networks.llm, "logits", broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("count", [0, 3])
def test_logits_that_are_not_finite_end_the_reply(model, monkeypatch, value, sampling, count):
    session = Session(model, mode="a2t", sampling=sampling, **SHORT)
    before = session.say(QUESTION)
    broken_after(model, count, value, monkeypatch)
    with pytest.raises(NotFiniteError, match=f"logits after {count} tokens are NaN or infinite"):
        session.say(QUESTION)
    monkeypatch.undo()
    assert session.dialogue.rounds == 1 and len(session.say(QUESTION).tokens) == len(before.tokens)


def test_weights_that_break_under_way_end_the_reply(convert_tiny, device):
    """Also where steps are captured: what is read of a replay is judged as well."""
    how = "eager" if device == "cpu" else "mmap"  # mapped weights cannot be written
    model = CovoAudio.load(convert_tiny("float32"), device=device, dtype="float32", max_context=900, load=how)
    session = Session(model, mode="a2t", max_new_tokens=40, system="short")
    session.say(QUESTION)
    events = session.stream(QUESTION)
    for event in events:
        if isinstance(event, Text):
            break
    with torch.inference_mode():
        model.networks.llm.lm_head.weight[7] = float("nan")
    with pytest.raises(NotFiniteError, match="logits after"):
        for _ in events:
            pass


def test_one_broken_row_leaves_its_neighbour_alone(model, monkeypatch):
    """Side by side, in one step: only the dialogue of the broken row ends."""
    expected = Session(model, mode="a2t", **SHORT).say(QUESTION).tokens
    engine, waveform, ask = Engine(model, 2), model.waveform(QUESTION), Ask("a2t", **SHORT)
    tickets = [engine.submit(Dialogue(), waveform, ask) for _ in range(2)]
    logits = model.networks.llm.logits

    def broken(hidden):
        found = logits(hidden)
        if len(found) == 2:
            found[1, 3] = float("nan")
        return found

    monkeypatch.setattr(model.networks.llm, "logits", broken)
    ends = {}
    while len(ends) < 2:
        ends |= {event.ticket: event for event in engine.step() if isinstance(event, Done | Failed)}
    assert ends[tickets[0]].reply.tokens == expected
    assert isinstance(ends[tickets[1]].error, NotFiniteError)


def change_speech(monkeypatch, change):
    """Let every piece of speech [n] be what `change` makes of it."""
    work = SpeechStream.work
    monkeypatch.setattr(SpeechStream, "work", lambda self: (change(piece) for piece in work(self)))


@pytest.mark.parametrize("blocks", [None, SpeechBlocks((8, 4))])
def test_samples_that_are_not_finite_end_the_reply(model, monkeypatch, blocks):
    session = Session(model, max_new_tokens=40, system="short", blocks=blocks)

    def broken(piece):
        piece[len(piece) // 2 : len(piece) // 2 + 1] = float("nan")
        return piece

    change_speech(monkeypatch, broken)
    with pytest.raises(NotFiniteError, match="samples of its speech are NaN or infinite"):
        session.say(QUESTION)
    assert session.dialogue.rounds == 0
    monkeypatch.undo()
    assert session.say(QUESTION).waveform.size


def test_a_reply_tells_what_is_odd_about_its_speech(model, monkeypatch):
    assert Session(model, max_new_tokens=1, system="short").say(QUESTION).warnings == (
        "the reply has no speech: the model gave no audio codes",
    )
    assert Session(model, mode="a2t", max_new_tokens=1, system="short").say(QUESTION).warnings == ()
    change_speech(monkeypatch, lambda piece: (piece * 1e6).clip(-1, 1))
    (line,) = Session(model, max_new_tokens=40, system="short").say(QUESTION).warnings
    assert "clipped" in line


def test_a_cast_that_overflows_is_refused_with_its_count(convert_tiny, monkeypatch):
    from covo_npu.runtime import ground as module

    load = module.load_tensors

    def large(*arguments, **named):
        weights = load(*arguments, **named)
        for tensors in weights.files.values():
            for name in tensors:
                if name.endswith("layers.1.down_proj.weight"):
                    tensors[name] = tensors[name].clone()
                    tensors[name].view(-1)[3:5] = 7e4
        return weights

    monkeypatch.setattr(module, "load_tensors", large)
    assert CovoAudio.load(convert_tiny("float32"), device="cpu", dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"beyond 65504, the largest of float16: 2 of llm\.\S+down_proj\.weight"):
        CovoAudio.load(convert_tiny("float32"), device="cpu", dtype="float16")


@pytest.mark.slow
def test_four_dialogues_of_one_model_in_four_threads(convert_tiny, device):
    """In bfloat16: the tokens of each are those that it gets alone, and no switch of the process is left behind."""
    model = CovoAudio.load(convert_tiny("bfloat16"), device=device, dtype="bfloat16", max_context=900)
    questions = (QUESTION, AUDIO / "question_en_48k_24bit.wav")
    ask = Ask(max_new_tokens=24, system="short")

    def dialogue(number):
        session = Session(model, ask, seed=number)
        replies = [session.say(questions[(number + turn) % 2]) for turn in range(2)]
        return [reply.tokens for reply in replies], [reply.waveform for reply in replies]

    def switches():
        return (
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision(),
        )  # fmt: skip

    alone = [dialogue(number) for number in range(4)]
    before, running = switches(), threading.active_count()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(dialogue, range(4)))
    for (tokens, waveforms), (expected_tokens, expected) in zip(found, alone, strict=True):
        assert tokens == expected_tokens
        assert all(np.array_equal(a, b) for a, b in zip(waveforms, expected, strict=True))
    assert switches() == before
    end = time.monotonic() + 30
    while threading.active_count() > running:  # those that spoke end by themselves, soon
        assert time.monotonic() < end
        time.sleep(0.01)


def test_four_threads_of_one_engine_take_turns(convert_tiny, device):
    model = CovoAudio.load(convert_tiny("float32"), device=device, dtype="float32", max_context=900)
    expected = Session(model, mode="a2t", **SHORT).say(QUESTION).tokens
    engine = Engine(model, 2)
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(Session(model, mode="a2t", engine=engine, **SHORT).say, QUESTION) for _ in range(4)]
    assert [one.result().tokens for one in asked] == [expected] * 4
