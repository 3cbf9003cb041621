"""A dialogue: each question is one round; the KV cache keeps the rounds before."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import audio, prompt
from covo_npu.runtime.decode import generate
from covo_npu.runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from covo_npu.runtime.model import CovoAudio
    from covo_npu.runtime.token2wav import Progress

# mode: (special token that ends a reply, whether speech is made)
MODES = {"a2ta": ("im_end", True), "a2t": ("endoftext", False)}


class ContextError(CovoError):
    """A question does not fit into what the dialogue's context has left."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one round. rtf: token2wav seconds a second of speech, 0 without speech."""

    encode_s: float
    ttft_s: float  # from the question to the first token
    decode_s: float  # from the first token to the last
    tokens_per_s: float
    token2wav_s: float
    rtf: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model answered in one round."""

    text: str
    tokens: list[int]  # all generated ids, the stop token included
    audio_codes: list[int]
    waveform: NDArray[np.float32]  # [N] at sample_rate; empty without speech
    sample_rate: int
    stop_reason: str  # "stop", "length" (max_new_tokens) or "context" (the context is full)
    prompt_tokens: int
    placeholders: int
    timing: Timing


class Session:
    """The state of one dialogue: its KV cache and how many of its rows are valid."""

    def __init__(
        self, model: CovoAudio, mode: str, sampling: Sampling, max_new_tokens: int, seed: int, system: str | None
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, found {mode!r}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        stop_name, self._speech = MODES[mode]
        if self._speech and model.networks.token2wav is None:
            raise CovoError("this checkpoint was converted or loaded without token2wav: use mode a2t")
        self.model, self.mode, self.sampling, self.max_new_tokens, self.seed = (
            model,
            mode,
            sampling,
            max_new_tokens,
            seed,
        )
        self.system = prompt.DEFAULT_SYSTEM_PROMPT if system is None else system
        self.rounds = 0
        self.length = 0  # valid rows of the cache; the last token of a reply is never among them
        self._stop_id = model.manifest.special_tokens[stop_name]
        self._cache = model.allocate_cache()

    @torch.inference_mode()
    def say(
        self,
        source: Any,
        sample_rate: int | None = None,
        on_text: Callable[[str], None] | None = None,
        on_progress: Progress | None = None,
    ) -> Reply:
        """Return the reply to one spoken question, and remember the round.

        source: path of an audio file, or samples [N] or [N, channels] with their sample_rate; on_text gets the text as
        it is generated, on_progress (stage, done, total) while speech is made. Raises AudioError or ContextError and
        leaves the dialogue as it was.
        """
        started = time.perf_counter()
        waveform = self._waveform(source, sample_rate)
        features, input_ids, first = self._prompt(waveform)
        encoded = time.perf_counter()
        tokens, first_token = self._generate(features, input_ids, first, on_text)
        decoded = time.perf_counter()
        text_ids, codes = self._split(tokens)
        speech = np.zeros(0, np.float32)
        if self._speech:
            speech = self.model.token2wav(codes, seed=self.seed + self.rounds, on_progress=on_progress)
        finished = time.perf_counter()

        limit = "length" if len(tokens) == self.max_new_tokens else "context"
        decode_s, token2wav_s = decoded - first_token, finished - decoded
        self.length += len(input_ids) + len(tokens) - 1
        self.rounds += 1
        return Reply(
            text=self.model.tokenizer.decode(text_ids),
            tokens=tokens,
            audio_codes=codes,
            waveform=speech,
            sample_rate=audio.SAMPLE_RATE,
            stop_reason="stop" if tokens[-1] == self._stop_id else limit,
            prompt_tokens=len(input_ids),
            placeholders=features.shape[0],
            timing=Timing(
                encode_s=encoded - started,
                ttft_s=first_token - started,
                decode_s=decode_s,
                tokens_per_s=(len(tokens) - 1) / decode_s if len(tokens) > 1 else 0.0,
                token2wav_s=token2wav_s if self._speech else 0.0,
                rtf=token2wav_s * audio.SAMPLE_RATE / speech.size if speech.size else 0.0,
            ),
        )

    def _waveform(self, source: Any, sample_rate: int | None) -> Tensor:
        """Return the prepared waveform [N] at 24 kHz."""
        if isinstance(source, str | os.PathLike):
            layers = self.model.config.adapter.num_layers
            samples, rate = audio.read_audio(source, audio.max_seconds(self.model.max_context, layers))
            return audio.prepare(samples, rate, os.fspath(source))
        if sample_rate is None:
            raise ValueError("samples need their sample_rate")
        return audio.prepare(audio.to_mono(source), sample_rate)

    def _prompt(self, waveform: Tensor) -> tuple[Tensor, list[int], int]:
        """Return (features [n, C], prompt ids, index of the first placeholder). Checks the context before any work."""
        model = self.model
        placeholders = audio.num_placeholders(waveform.shape[0], model.config.adapter.num_layers)
        if self.rounds == 0:
            input_ids = prompt.first_round(model.tokenizer, self.system, placeholders)
        else:
            input_ids = prompt.next_round(model.tokenizer, placeholders)
        if self.length + len(input_ids) > model.max_context:
            raise ContextError(
                f"the question needs {len(input_ids)} tokens, the dialogue has {self.length} of {model.max_context}: "
                "ask something shorter, start a new dialogue, or load with a larger max_context (--max-context)"
            )
        first = input_ids.index(model.manifest.special_tokens["cAUDIO"])
        return model.encode(waveform)[:placeholders], input_ids, first

    def _generate(
        self, features: Tensor, input_ids: list[int], first: int, on_text: Callable[[str], None] | None
    ) -> tuple[list[int], float]:
        """Return (ids of the reply, when the first one was there)."""
        model, llm = self.model, self.model.networks.llm
        embeddings = llm.embed(torch.tensor(input_ids, device=model.device))
        embeddings[first : first + features.shape[0]] = features
        logits = llm.prefill(embeddings, self._cache, 0, self.length)
        vocab_size = model.config.llm.vocab_size
        sampler = Sampler(self.sampling, [input_ids], vocab_size, model.device, self.seed + self.rounds)
        length = self.length + len(input_ids)
        tokens: list[int] = []
        first_token = 0.0
        stream = model.tokenizer.stream()
        for token in generate(llm, self._cache, logits, length, sampler, self._stop_id, self.max_new_tokens):
            if not tokens:
                model.weights.wait()  # every weight has been read by now: nothing is shown before all are verified
                first_token = time.perf_counter()
            tokens.append(token)
            if on_text and token < model.config.audio_token_index and (piece := stream.push(token)):
                on_text(piece)
        if on_text and (rest := stream.finish()):
            on_text(rest)
        return tokens, first_token

    def _split(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """Return (text ids, audio codes). An id beyond the table of codes is neither."""
        first_code = self.model.config.audio_token_index
        token2wav = self.model.config.token2wav
        end = first_code + token2wav.dit.num_codes if token2wav else first_code
        return (
            [token for token in tokens if token < first_code],
            [token - first_code for token in tokens if first_code <= token < end],
        )
