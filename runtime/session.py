"""A dialogue: each question is one round; the KV cache keeps the rounds before."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import audio, prompt
from covo_npu.runtime.decode import Decoder, Readback, generate
from covo_npu.runtime.sampling import Sampling

if TYPE_CHECKING:
    from covo_npu.runtime.model import CovoAudio
    from covo_npu.runtime.token2wav import Progress

log = logging.getLogger(__name__)

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


@dataclass(slots=True)
class Round:
    """One round under way: its prompt, the ids generated so far, and when (time.perf_counter) what was done."""

    input_ids: list[int]
    first_placeholder: int
    features: Tensor  # [n, C], for the placeholders
    limit: int  # ids of the reply at most: max_new_tokens, or what the context has left
    started: float
    encoded: float
    tokens: list[int] = field(default_factory=list)
    complete: bool = False
    answered: float = 0.0  # the first id was there
    decoded: float = 0.0  # the last one was


class Session:
    """The state of one dialogue: how many rows of its slot of the KV cache are valid."""

    def __init__(
        self,
        model: CovoAudio,
        mode: str,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        system: str | None,
        decoder: Decoder | None = None,
        slot: int = 0,
    ) -> None:
        """decoder, slot: where the dialogue is decoded if it shares a decoder; by default it has one of its own."""
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, found {mode!r}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        stop_name, self._speech = MODES[mode]
        if self._speech and model.networks.token2wav is None:
            raise CovoError("this checkpoint was converted or loaded without token2wav: use mode a2t")
        self.model, self.mode, self.sampling = model, mode, sampling
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.system = prompt.DEFAULT_SYSTEM_PROMPT if system is None else system
        self.rounds = 0
        self.length = 0  # valid rows of the cache; the last token of a reply is never among them
        self.slot = slot
        self._stop_id = model.manifest.special_tokens[stop_name]
        self._decoder = decoder or model.decoder(sampling)

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
        question = self.listen(source, sample_rate)
        stream = self.model.tokenizer.stream()
        for token in self.tokens(question):
            if on_text and token < self.model.config.audio_token_index and (piece := stream.push(token)):
                on_text(piece)
        if on_text and (rest := stream.finish()):
            on_text(rest)
        return self.finish(question, on_progress)

    @torch.inference_mode()
    def listen(self, source: Any, sample_rate: int | None = None) -> Round:
        """Return the round that a question opens, encoded but not yet in the cache."""
        started = time.perf_counter()
        features, input_ids, first = self._prompt(self._waveform(source, sample_rate))
        limit = min(self.max_new_tokens, self.model.max_context - self.length - len(input_ids) + 1)
        encoded = time.perf_counter()
        heard = f"{features.shape[0]} placeholders, {len(input_ids)} prompt tokens after {self.length} of the dialogue"
        log.info("round %d: heard in %.3f s: %s", self.rounds + 1, encoded - started, heard)
        return Round(input_ids, first, features, limit, started, encoded)

    @torch.inference_mode()
    def begin(self, question: Round) -> Readback:
        """Return the first id of the reply, on its way, after the prompt has been put into the cache."""
        model, llm, start = self.model, self.model.networks.llm, self.length
        input_ids = torch.tensor(question.input_ids, device=model.device)
        first, rest = question.first_placeholder, input_ids
        if start == 0:
            # Up to the first placeholder all dialogues with this system prompt are the same. The prompt is cut there
            # for the first of them too: the same question gets the same answer, bit for bit, whoever came before.
            model.prefixes.fill(self._decoder.cache, self.slot, input_ids[:first])
            start, first, rest = first, 0, input_ids[first:]
        embeddings = llm.embed(rest)
        embeddings[first : first + question.features.shape[0]] = question.features
        return self._decoder.begin(self.slot, input_ids, embeddings, start, self.seed + self.rounds)

    @torch.inference_mode()
    def tokens(self, question: Round) -> Iterator[int]:
        """Yield the ids of the reply as they come. For a dialogue that has its decoder to itself."""
        for token in generate(self._decoder, self.begin(question), self._stop_id, question.limit):
            self.push(question, token)
            yield token

    def push(self, question: Round, token: int) -> None:
        """Add an id to the reply of a round, and note whether it is complete with it."""
        if not question.tokens:
            self.model.weights.wait()  # every weight has been read by now: nothing is shown before all are verified
            question.answered = time.perf_counter()
            log.info("round %d: first token after %.3f s", self.rounds + 1, question.answered - question.started)
        question.tokens.append(token)
        question.decoded = time.perf_counter()
        question.complete = token == self._stop_id or len(question.tokens) == question.limit

    @torch.inference_mode()
    def finish(self, question: Round, on_progress: Progress | None = None) -> Reply:
        """Return the reply of a complete round, which the dialogue remembers from now on."""
        tokens, input_ids = question.tokens, question.input_ids
        begun = time.perf_counter()
        text_ids, codes = self._split(tokens)
        speech = np.zeros(0, np.float32)
        if self._speech:
            speech = self.model.token2wav(codes, seed=self.seed + self.rounds, on_progress=on_progress)
        token2wav_s = time.perf_counter() - begun
        limit = "length" if len(tokens) == self.max_new_tokens else "context"
        decode_s = question.decoded - question.answered
        self.length += len(input_ids) + len(tokens) - 1
        self.rounds += 1
        log.info("round %d: %d tokens decoded in %.3f s", self.rounds, len(tokens), decode_s)
        if self._speech:
            seconds = speech.size / audio.SAMPLE_RATE
            log.info("round %d: %.2f s of speech of %d codes in %.3f s", self.rounds, seconds, len(codes), token2wav_s)
        return Reply(
            text=self.model.tokenizer.decode(text_ids),
            tokens=tokens,
            audio_codes=codes,
            waveform=speech,
            sample_rate=audio.SAMPLE_RATE,
            stop_reason="stop" if tokens[-1] == self._stop_id else limit,
            prompt_tokens=len(input_ids),
            placeholders=question.features.shape[0],
            timing=Timing(
                encode_s=question.encoded - question.started,
                ttft_s=question.answered - question.started,
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

    def _split(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """Return (text ids, audio codes). An id beyond the table of codes is neither."""
        first_code = self.model.config.audio_token_index
        token2wav = self.model.config.token2wav
        end = first_code + token2wav.dit.num_codes if token2wav else first_code
        return (
            [token for token in tokens if token < first_code],
            [token - first_code for token in tokens if first_code <= token < end],
        )
