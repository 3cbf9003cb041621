"""Captured evaluations of flow matching: what they give, whose turn it is, and when they are not to be had.

Graphs are here a tape that repeats recorded operators; CUDA and NPU graphs themselves need their devices.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from random_networks import random_token2wav
from runtime.speech_sizes import SMALL, small_voice
from runtime.tape import Tape, optional_tape
from torch import Tensor

from covo_npu.kernels import device as device_module
from covo_npu.kernels import native, select
from covo_npu.kernels.device import Turns
from covo_npu.kernels.errors import BackendError
from covo_npu.runtime.evaluations import BUCKET_FRAMES
from covo_npu.runtime.flow import Flow
from covo_npu.runtime.networks.dit import MAX_FRAMES
from covo_npu.runtime.networks.files import fill
from covo_npu.runtime.options import WHOLE, SpeechBlocks
from covo_npu.runtime.speech import SpeechStream, drawn_noise
from covo_npu.runtime.token2wav import SpeechDtypes, Token2Wav
from covo_npu.runtime.voice import Voice, no_voice

EAGER = random_token2wav(SMALL, native)
VOICE = small_voice()  # of 5 codes
FLOW = Flow(2)


def captured(tape: Tape, dtype: torch.dtype = torch.float32, **functions: Any) -> Token2Wav:
    """Return the networks with captured evaluations. functions: of the kernels, in place of native's."""
    kernels: Any = SimpleNamespace(**{name: getattr(native, name) for name in select.FUNCTIONS} | functions)
    with torch.device("meta"):
        networks = Token2Wav(SMALL, kernels, SpeechDtypes(dtype), tape)
    fill(networks, EAGER.state_dict())
    return networks


@torch.inference_mode()
def solved(networks: Token2Wav, num_codes: int, seed: int = 0) -> Tensor:
    """Return the latents of a reply, of num_codes codes with the voice's prompt."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(SMALL.dit.num_codes, (num_codes,), generator=generator)
    noise = torch.randn(4 * num_codes, SMALL.dit.latent_dim, generator=generator)
    voice = VOICE if num_codes > 6 else no_voice(SMALL.dit)
    *_, latents = networks.solve(codes, voice.prompt_latents, noise, voice, FLOW)
    return latents


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# float32: sums of other orders alone, of some 10^2 roundings; one frame too many is 1e-3 and more, see the mutants
CLOSE = 1e-5


def test_lengths_that_take_turns_in_the_same_graphs() -> None:
    """Longer, shorter, much shorter, full: what an earlier reply left in the frames beyond is not heard."""
    tape = Tape()
    networks = captured(tape)
    for num_codes in (31, 20, 1, 32, 64, 40, 33, 9):
        assert relative(solved(networks, num_codes, num_codes), solved(EAGER, num_codes, num_codes)) < CLOSE
    assert tape.captures == 2  # of 128 and of 256 frames
    assert tape.replays == 2 + 8 * FLOW.evaluations  # two that were compared


@pytest.mark.parametrize("num_codes", [32, 64])
def test_a_full_graph_gives_the_same_bits(num_codes: int) -> None:
    assert 4 * num_codes % BUCKET_FRAMES == 0
    assert torch.equal(solved(captured(Tape()), num_codes), solved(EAGER, num_codes))


def test_half_precision() -> None:
    """Products in bfloat16 differ by roundings that come out the other way, 2^-9 each."""
    exact, half = solved(EAGER, 25), solved(captured(Tape(), torch.bfloat16), 25)
    assert 1e-5 < relative(half, exact) < 2e-2


@torch.inference_mode()
def test_what_does_not_fit_is_launched() -> None:
    tape = Tape()
    networks = captured(tape)
    conditions = networks.dit.conditions(torch.zeros(MAX_FRAMES // 4 + 1, dtype=torch.int64), VOICE.prompt_latents)
    evaluate = networks.evaluations.under(conditions)
    (time,) = networks.dit.modulations([0.5], VOICE.speaker_embedding)
    latents = torch.randn(MAX_FRAMES + 4, SMALL.dit.latent_dim)
    assert torch.equal(evaluate(latents, time), networks.dit(latents, conditions, time)) and not tape.captures


# --- speech


def spoken(networks: Token2Wav, voice: Voice, blocks: SpeechBlocks, seed: int) -> NDArray[np.float32]:
    stream = SpeechStream(networks, voice, drawn_noise(seed, SMALL.dit.latent_dim), blocks, FLOW)
    codes = [(11 * seed + 7 * i) % SMALL.dit.num_codes for i in range(70)]
    pieces = [stream.push(codes[start : start + 7]) for start in range(0, 70, 7)]
    return np.concatenate((*pieces, stream.finish()))


OTHER = Voice(VOICE.prompt_codes[:3], VOICE.prompt_latents[:13], -VOICE.speaker_embedding)
REPLIES = [(VOICE, SpeechBlocks(), 1), (OTHER, SpeechBlocks(past_s=1), 2), (VOICE, WHOLE, 3), (OTHER, WHOLE, 4)] * 2


@pytest.mark.slow
def test_replies_in_threads_share_the_graphs() -> None:
    """Whole and in blocks, with two voices: evaluations of several replies take turns in one graph."""
    tape = Tape()
    networks = captured(tape)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda reply: spoken(networks, *reply), REPLIES))
    assert 3 <= tape.captures <= 5 and tape.replays > FLOW.evaluations * len(REPLIES)
    alone = [spoken(networks, *reply) for reply in REPLIES]
    for reply, together, one in zip(REPLIES, found, alone, strict=True):
        expected = spoken(EAGER, *reply)
        assert np.array_equal(together, one)
        assert np.abs(together - expected).max() <= 1e-4 * np.abs(expected).max()


def test_turns_on_a_device_follow_each_other_whatever_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_event(self, event: Any) -> None:
            done.append((self.name, f"waits for {event.at}"))

    class Event:
        def record(self, stream: Stream) -> None:
            self.at = stream.name
            done.append((stream.name, "is done"))

    current = [Stream("first"), Stream("second"), Stream("third")]
    module = SimpleNamespace(current_stream=lambda device: current[0], Event=Event)
    monkeypatch.setattr(device_module, "accelerator", lambda device: module)
    turns = Turns()
    for fails in (False, True, False):
        try:
            with turns.on(torch.device("cuda", 1)):
                done.append((current[0].name, "works"))
                if fails:
                    raise ValueError  # what it enqueued runs all the same
        except ValueError:
            pass
        current.pop(0)
    assert done == [
        ("first", "works"), ("first", "is done"),
        ("second", "waits for first"), ("second", "works"), ("second", "is done"),
        ("third", "waits for second"), ("third", "works"), ("third", "is done"),
    ]  # fmt: skip


# --- where graphs are not to be had


def ignoring(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return native.attention(q, k, v, scale)


def one_frame_more(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return native.masked_attention(q, k, v, mask | mask.roll(1, 1), scale)


class Refusing(Tape):
    def __call__(self, work: Any) -> Any:
        raise BackendError("cuda: work could not be captured as a graph (no)")


class Forgetful(Tape):
    """Replays nothing: what the first run gave stays."""

    def __call__(self, work: Any) -> Any:
        super().__call__(work)
        return lambda: None


FAULTS = {
    "a mask that is ignored": ({"masked_attention": ignoring}, Tape, "attention under a mask off by"),
    "one frame too many": ({"masked_attention": one_frame_more}, Tape, "attention under a mask off by"),
    "a graph that does nothing": ({}, Forgetful, r"cpu: flow matching of 128 frames as a graph has velocities off by"),
    "a device that refuses": ({}, Refusing, "could not be captured"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_graph_that_is_not_right_is_not_used(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    functions, kind, says = FAULTS[fault]
    with pytest.raises(BackendError, match=says):
        solved(captured(kind(), **functions), 25)
    tape = kind()
    tape.required = False
    networks = captured(tape, **functions)
    for num_codes in (25, 40):  # the second one does not try any more
        assert torch.equal(solved(networks, num_codes), solved(EAGER, num_codes))
    assert tape.captures <= 1 and caplog.text.count("launched operator by operator") == 1


def test_a_model_captures_speech_on_its_device_apart_from_the_llm(
    convert_tiny: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture, and so a memory pool, of its own: the LLM's graphs may run beside those of speech."""
    from covo_npu.runtime import CovoAudio, ground, model

    made: list[Tape] = []

    def tapes(*arguments: Any) -> Tape:
        made.append(optional_tape())
        return made[-1]

    monkeypatch.setattr(ground, "device_capture", tapes)
    monkeypatch.setattr(model, "DeviceCapture", tapes)
    folder: Path = convert_tiny("float32")
    options = {"device": device, "dtype": "float32"}
    loaded = CovoAudio.load(folder, **options)
    assert made == [loaded.capture, loaded.speech_capture] and loaded.capture is not loaded.speech_capture
    codes = [(7 * i) % 64 for i in range(40)]
    found = loaded.token2wav(codes, seed=2, blocks=SpeechBlocks())
    assert made[1].captures and not made[0].captures
    monkeypatch.undo()
    expected = CovoAudio.load(folder, **options, graph="off").token2wav(codes, seed=2, blocks=SpeechBlocks())
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert CovoAudio.load(folder, **options, speech=False).speech_capture is None
