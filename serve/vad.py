"""Where speech starts and stops in a stream of samples: Silero's voice activity detector, in numpy.

Plain numpy, because a window of 32 ms costs 0.15 ms of one core and torch's thread count is the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[np.float32]

RATE = 16_000  # Hz
WINDOW_SAMPLES = 512
WINDOW_MS = 32
CONTEXT_SAMPLES = 64  # of the window before, put in front of each window
HYSTERESIS = 0.15  # speech ends this far below the threshold, as in Silero's own iterator
N_FFT = 256
HOP = 128
BINS = N_FFT // 2 + 1
CONV_STRIDES = (1, 2, 2, 1)
HIDDEN = 128


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """Speech began. at_ms: its start less the padding, in ms of all samples that were fed."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class SpeechStopped:
    """Speech ended. at_ms: the end of the silence that showed it, in ms of all samples that were fed."""

    at_ms: int


class TurnDetector:
    """The turns of one speaker, as OpenAI's server_vad tells them. For one thread at a time.

    threshold: probability from which a window counts as speech; silence_duration_ms: silence that ends a turn;
    prefix_padding_ms: audio before the first window of speech that belongs to the turn, as far as there is any since
    the last turn.
    """

    def __init__(self, threshold: float = 0.5, silence_duration_ms: int = 500, prefix_padding_ms: int = 300) -> None:
        self.threshold = threshold
        self.silence_duration_ms = silence_duration_ms
        self.prefix_padding_ms = prefix_padding_ms
        self._speech = SpeechProbability()
        self._fed_ms = 0  # whole windows only
        self._free_ms = 0  # before it everything belongs to an earlier turn
        self._silent_since_ms: int | None = None
        self.speaking = False

    def feed(self, samples: Array) -> list[SpeechStarted | SpeechStopped]:
        """Return what more samples [n] at 16 kHz told, in order. n may be anything; whole windows are judged.

        Events do not depend on how the samples are cut. About 5 ms of one core for a second of audio.
        """
        events: list[SpeechStarted | SpeechStopped] = []
        for probability in self._speech.feed(samples):
            begin_ms, self._fed_ms = self._fed_ms, self._fed_ms + WINDOW_MS
            if probability >= self.threshold:
                self._silent_since_ms = None
                if not self.speaking:
                    self.speaking = True
                    events.append(SpeechStarted(max(self._free_ms, begin_ms - self.prefix_padding_ms)))
            elif self.speaking and probability < self.threshold - HYSTERESIS and self._silent_since_ms is None:
                self._silent_since_ms = begin_ms
            if self._silent_since_ms is not None and self._fed_ms - self._silent_since_ms >= self.silence_duration_ms:
                events.append(SpeechStopped(self._fed_ms))
                self._end_turn()
        return events

    def reset(self) -> None:
        """Forget the turn that is going on, as after a commit or a clear by the client. The clock goes on."""
        self._speech = SpeechProbability(self._speech.pending)
        self._end_turn()

    def _end_turn(self) -> None:
        self.speaking, self._silent_since_ms, self._free_ms = False, None, self._fed_ms


class SpeechProbability:
    """The probability of speech in each window of a stream; its state goes from window to window."""

    def __init__(self, pending: Array | None = None) -> None:
        self.pending = np.zeros(0, np.float32) if pending is None else pending  # less than a window
        self._context = np.zeros(CONTEXT_SAMPLES, np.float32)
        self._hidden = np.zeros(HIDDEN, np.float32)
        self._cell = np.zeros(HIDDEN, np.float32)

    def feed(self, samples: Array) -> Iterator[float]:
        """Yield the probability of every window that more samples [n] at 16 kHz complete."""
        samples = np.concatenate([self.pending, samples])
        whole = samples.size // WINDOW_SAMPLES * WINDOW_SAMPLES
        self.pending = samples[whole:]
        for window in samples[:whole].reshape(-1, WINDOW_SAMPLES):
            yield self._step(window)

    def _step(self, window: Array) -> float:
        w = _weights()
        padded = np.concatenate([self._context, window, window[-2 : -2 - CONTEXT_SAMPLES : -1]])  # right: reflected
        self._context = window[-CONTEXT_SAMPLES:]
        spectrum = sliding_window_view(padded, N_FFT)[::HOP] @ w.basis  # [4, 258]: cosines, then sines
        x = np.sqrt(np.square(spectrum[:, :BINS]) + np.square(spectrum[:, BINS:]))
        for weight, bias, stride in w.convs:
            x = np.maximum(_columns(x, stride) @ weight + bias, 0.0)
        gates = np.concatenate([x[0], self._hidden]) @ w.gates + w.gates_bias
        take, keep, new, show = gates.reshape(4, HIDDEN)
        self._cell = _sigmoid(keep) * self._cell + _sigmoid(take) * np.tanh(new)
        self._hidden = _sigmoid(show) * np.tanh(self._cell)
        return float(_sigmoid(np.maximum(self._hidden, 0.0) @ w.out + w.out_bias))


@dataclass(frozen=True, slots=True)
class _Weights:
    """The network's weights as the products take them: inputs by outputs."""

    basis: Array  # [256, 258], windowed DFT
    convs: tuple[tuple[Array, Array, int], ...]  # weight [3 * in, out], bias [out], stride
    gates: Array  # [256, 512]: input and hidden state; gates in the order input, forget, cell, output
    gates_bias: Array  # [512]
    out: Array  # [128]
    out_bias: Array  # []


@lru_cache(maxsize=1)
def _weights() -> _Weights:
    """Return the weights of data/silero_vad_16k.safetensors: silero-vad 6.2.3's silero_vad.jit, MIT licence."""
    with as_file(files("covo_npu.serve").joinpath("data/silero_vad_16k.safetensors")) as path:
        t = load_file(path)
    convs = tuple(
        (
            np.ascontiguousarray(t[f"conv{i}.weight"].transpose(2, 1, 0).reshape(-1, t[f"conv{i}.bias"].size)),
            t[f"conv{i}.bias"],
            stride,
        )
        for i, stride in enumerate(CONV_STRIDES, start=1)
    )
    return _Weights(
        basis=np.ascontiguousarray(t["stft.basis"][:, 0].T),
        convs=convs,
        gates=np.ascontiguousarray(np.concatenate([t["lstm.weight_ih"], t["lstm.weight_hh"]], axis=1).T),
        gates_bias=t["lstm.bias_ih"] + t["lstm.bias_hh"],
        out=t["out.weight"][0, :, 0],
        out_bias=t["out.bias"][0],
    )


def _columns(x: Array, stride: int) -> Array:
    """Return [ceil(frames / stride), 3 * channels] of x [frames, channels]: frames beside neighbours, 0 outside."""
    padded = np.pad(x, ((1, 1), (0, 0)))
    return np.concatenate([padded[tap : tap + len(x) : stride] for tap in range(3)], axis=1)


def _sigmoid(x: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(0.5 * x)
