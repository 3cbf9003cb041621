"""The detector's probabilities against the published network itself, and turns against the rules of server_vad."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from covo_npu.runtime.audio import read_audio
from covo_npu.runtime.resampling import resample
from covo_npu.serve import vad
from covo_npu.serve.vad import SpeechProbability, SpeechStarted, SpeechStopped, TurnDetector

ROOT = Path(__file__).parents[2]
RECORDINGS = ("question_en_48k_24bit", "question_zh_44k_stereo", "long_16k_over30s")
PUBLISHED = {  # ours: theirs
    "stft.basis": "stft.forward_basis_buffer",
    **{f"conv{i + 1}.{p}": f"encoder.{i}.reparam_conv.{p}" for i in range(4) for p in ("weight", "bias")},
    **{f"lstm.{p}": f"decoder.rnn.{p}" for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    **{f"out.{p}": f"decoder.decoder.2.{p}" for p in ("weight", "bias")},
}


def recording(name):
    samples, rate = read_audio(ROOT / "tests/data/audio" / f"{name}.wav")
    return resample(samples, rate, vad.RATE, torch.float64).numpy()


def synthetic():
    rng = np.random.default_rng(5)
    seconds = np.arange(3 * vad.RATE) / vad.RATE
    clicks = np.zeros(seconds.size)
    clicks[:: vad.RATE // 7] = 1.0
    return {
        "silence": np.zeros(seconds.size),
        "noise": rng.normal(0, 0.1, seconds.size),
        "full scale square": np.sign(np.sin(2 * np.pi * 130 * seconds)),
        "glide": 0.3 * np.sin(2 * np.pi * (100 + 700 * seconds) * seconds),
        "clicks": clicks,
        "1e-4 of a glide": 1e-4 * np.sin(2 * np.pi * (100 + 700 * seconds) * seconds),
        "noise that is switched": rng.normal(0, 0.2, seconds.size) * (np.floor(seconds * 3) % 2),
    }


SYNTHETIC = {name: signal.astype(np.float32) for name, signal in synthetic().items()}


@pytest.fixture(scope="module")
def published():
    """The network of the silero-vad wheel; the package itself is not imported: it sets torch's thread count."""
    (folder,) = importlib.util.find_spec("silero_vad").submodule_search_locations
    return torch.jit.load(Path(folder) / "data/silero_vad.jit")


def test_the_weights_are_the_published_ones(published):
    theirs = published._model.state_dict()
    ours = load_file(ROOT / "serve/data/silero_vad_16k.safetensors")
    assert set(PUBLISHED) == set(ours) and set(PUBLISHED.values()) == set(theirs)
    for name, value in ours.items():
        assert np.array_equal(value, theirs[PUBLISHED[name]].numpy()), name
    assert "silero_vad" not in sys.modules


@pytest.mark.parametrize("name", [*RECORDINGS, *SYNTHETIC])
def test_probabilities_are_those_of_the_published_network(published, name):
    signal = SYNTHETIC[name] if name in SYNTHETIC else recording(name)
    windows = signal[: signal.size // 512 * 512].reshape(-1, 512)
    published.reset_states()
    with torch.no_grad():
        expected = np.array([published(torch.from_numpy(window.copy()), 16_000).item() for window in windows])
    found = np.array(list(SpeechProbability().feed(signal)))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4
    if name in RECORDINGS:  # speech and pauses are told apart at all
        assert (found > 0.9).any() and (found < 0.1).any()


def cut(signal, rng, largest):
    begin = 0
    while begin < signal.size:
        end = begin + int(rng.integers(0, largest))
        yield signal[begin:end]
        begin = end


@pytest.mark.parametrize("largest", [40, 700, 5000])
def test_cutting_changes_nothing(largest):
    signal, rng = recording("question_en_48k_24bit"), np.random.default_rng(largest)
    whole = list(SpeechProbability().feed(signal))
    network = SpeechProbability()
    assert [p for piece in cut(signal, rng, largest) for p in network.feed(piece)] == whole
    detector = TurnDetector()
    assert [event for piece in cut(signal, rng, largest) for event in detector.feed(piece)] == TurnDetector().feed(
        signal
    )


def test_a_question_between_silences_is_one_turn():
    question = recording("question_zh_44k_stereo")
    silence = np.zeros(vad.RATE, np.float32)
    started, stopped = TurnDetector(silence_duration_ms=800).feed(np.concatenate([silence, question, silence]))
    # The recording begins with speech within 100 ms and ends with less than half a second of silence.
    assert isinstance(started, SpeechStarted) and 1000 - 300 <= started.at_ms <= 1100 - 300
    spoken_ms = 1000 + 1000 * question.size // vad.RATE
    assert isinstance(stopped, SpeechStopped) and spoken_ms - 500 + 800 <= stopped.at_ms <= spoken_ms + 800 + 64


def test_detectors_share_nothing_but_the_weights():
    first, second = recording("question_en_48k_24bit"), recording("question_zh_44k_stereo")
    alone = TurnDetector().feed(first), TurnDetector().feed(second)
    a, b, events = TurnDetector(), TurnDetector(), ([], [])
    for begin in range(0, max(first.size, second.size), 999):
        events[0].extend(a.feed(first[begin : begin + 999]))
        events[1].extend(b.feed(second[begin : begin + 999]))
    assert events == alone


def turns(monkeypatch, probabilities, **settings):
    """Events of a detector whose network says these probabilities, a window each."""
    told = iter(probabilities)
    monkeypatch.setattr(SpeechProbability, "_step", lambda self, window: next(told))
    return TurnDetector(**settings).feed(np.zeros(512 * len(probabilities), np.float32))


@pytest.mark.parametrize(
    ("probabilities", "settings", "expected"),
    [
        # Windows are 32 ms. Speech from the 12th on (352 ms); the 300 ms before it belong to the turn.
        ([0.0] * 11 + [0.5], {}, [SpeechStarted(52)]),
        ([0.0] * 11 + [0.49], {}, []),
        ([0.6], {}, [SpeechStarted(0)]),  # padding ends at the beginning of all audio
        # 500 ms of silence are over in the 16th silent window.
        ([0.9] + [0.1] * 15, {}, [SpeechStarted(0)]),
        ([0.9] + [0.1] * 16, {}, [SpeechStarted(0), SpeechStopped(544)]),
        # Between 0.35 and 0.5: neither the beginning of silence nor its end.
        ([0.9] + [0.36] * 40, {}, [SpeechStarted(0)]),
        ([0.9] + [0.1] + [0.4] * 15, {}, [SpeechStarted(0), SpeechStopped(544)]),
        # Speech within the silence starts it anew.
        ([0.9] + [0.1] * 15 + [0.9] + [0.1] * 15, {}, [SpeechStarted(0)]),
        # The padding never reaches into the turn before.
        (
            [0.9] + [0.1] * 16 + [0.1] * 3 + [0.9],
            {},
            [SpeechStarted(0), SpeechStopped(544), SpeechStarted(544)],
        ),
        ([0.0] * 20 + [0.9], {"prefix_padding_ms": 0}, [SpeechStarted(640)]),
        ([0.8, 0.7] + [0.5] * 2, {"threshold": 0.6, "silence_duration_ms": 64}, [SpeechStarted(0)]),
        ([0.8, 0.7] + [0.4] * 2, {"threshold": 0.6, "silence_duration_ms": 64}, [SpeechStarted(0), SpeechStopped(128)]),
    ],
)
def test_rules_of_turns(monkeypatch, probabilities, settings, expected):
    assert turns(monkeypatch, probabilities, **settings) == expected


def test_reset_ends_the_turn_and_keeps_the_clock(monkeypatch):
    told = iter([0.9] * 3 + [0.9])
    monkeypatch.setattr(SpeechProbability, "_step", lambda self, window: next(told))
    detector = TurnDetector()
    assert detector.feed(np.zeros(3 * 512 + 100, np.float32)) == [SpeechStarted(0)] and detector.speaking
    detector.reset()
    assert not detector.speaking
    assert detector.feed(np.zeros(411, np.float32)) == []  # 100 + 411: not yet a window
    assert detector.feed(np.zeros(1, np.float32)) == [SpeechStarted(96)]


def test_reset_forgets_what_was_heard():
    signal = recording("question_en_48k_24bit")[: 512 * 60]
    detector = TurnDetector()
    detector.feed(signal)
    detector.reset()
    assert list(detector._speech.feed(signal)) == list(SpeechProbability().feed(signal))
