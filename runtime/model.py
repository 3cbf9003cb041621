"""CovoAudio: the networks of a converted checkpoint on one device, and what they compute. Here the API starts."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covo_npu.kernels.device import GRAPHS, DeviceCapture, Replayed, device_capture, fast_dtype, open_device
from covo_npu.kernels.errors import CovoError
from covo_npu.kernels.select import describe
from covo_npu.runtime import audio, rank
from covo_npu.runtime.checkpoint.format import ENCODER, TOKEN2WAV, TOKENIZER, Manifest
from covo_npu.runtime.checkpoint.loader import Weights
from covo_npu.runtime.decode import Decoder
from covo_npu.runtime.flow import Flow
from covo_npu.runtime.ground import Ground, kernels_of, load_weights, open_manifest, prepare
from covo_npu.runtime.mirror import LeadingDecoder
from covo_npu.runtime.networks.cache import SharedPrefixes, allocate
from covo_npu.runtime.networks.files import (
    LLM_PREFIX,
    Backends,
    Networks,
    fill,
    meta_networks,
    require_tensors,
    wanted_shapes,
)
from covo_npu.runtime.options import WHOLE, LoadOptions, SpeechBlocks
from covo_npu.runtime.parallel import ALONE
from covo_npu.runtime.prefix import Prefix, stored_prefix
from covo_npu.runtime.ranks import Leader, RankError, collectives, follows
from covo_npu.runtime.speech import Noise, Progress, SpeechStream, drawn_noise, given_noise
from covo_npu.runtime.token2wav import SpeechDtypes, Token2Wav
from covo_npu.runtime.tokenizer import Tokenizer
from covo_npu.runtime.voice import STORED, Voice, stored_shapes, stored_voice


@dataclass(frozen=True, slots=True)
class Placed:
    """Bytes of weight files on a device, and of which rank. On a CPU ranks share the device, not the bytes."""

    rank: int
    device: str
    bytes: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How the model became ready."""

    device: str
    backend: str
    dtype: str
    weights: str  # of the LLM's products: that dtype, or the manifest's word for 8 bits
    token2wav_dtype: str  # of the matrix products of flow matching, "" without speech
    vocoder_dtype: str  # of the products of the vocoder's residual blocks, "" without speech
    placed: tuple[Placed, ...]
    load_s: float

    @property
    def bytes(self) -> int:
        """Of the weight files in use, all ranks together."""
        return sum(placed.bytes for placed in self.placed)

    @property
    def places(self) -> str:
        """What lies where, in lines for people; "" if it is all on one device."""
        lines = [f"\n  rank {place.rank}, {place.device}: {place.bytes / 1e9:.2f} GB" for place in self.placed]
        return "".join(lines) if len(lines) > 1 else ""


class Devices(NamedTuple):
    """Where the networks are. The LLM's is that of rank 0."""

    llm: torch.device
    encoder: torch.device
    speech: torch.device


class CovoAudio:
    """The model on its device. Build it with `load`; talk to it through a Session, or an Engine for many.

    Several threads may call all of it at once, and have Sessions of it or one Engine together: weights do not change,
    what a dialogue remembers is its own. A Session belongs to one thread at a time; an Engine locks for itself.
    """

    def __init__(
        self,
        manifest: Manifest,
        networks: Networks,
        weights: Weights,
        tokenizer: Tokenizer,
        ground: Ground,
        devices: Devices,
        max_context: int,
        report: LoadReport,
        voice: Voice | None = None,
        prefix: Prefix | None = None,
        leader: Leader | None = None,
        speech_capture: DeviceCapture | None = None,
    ) -> None:
        """voice: whose speech is made unless a call names another; None in a model that does not speak.

        prefix: what dialogues begin with, in the dtype and on the device of the LLM; leader: of the other ranks, if
        there are any; speech_capture: which the networks of speech have.
        """
        self.manifest, self.config, self.networks, self.weights = manifest, manifest.config, networks, weights
        self.tokenizer, self.report, self.devices = tokenizer, report, devices
        self.device, self.dtype, self.kernels, self.capture = devices.llm, ground.dtype, ground.kernels, ground.capture
        self.speech_capture = speech_capture
        self.max_context, self.voice, self.leader = max_context, voice, leader
        self._speech_lock, self._speech_filled = threading.Lock(), False
        # A capture is that of the LLM's device: an encoder on another one is launched operator by operator.
        captured = ground.capture if devices.encoder == devices.llm else None
        self._encoder = Replayed(networks.encoder, captured) if captured else networks.encoder
        self.prefixes = SharedPrefixes({prefix.input_ids: prefix.rows} if prefix else None)

    @classmethod
    def load(cls, path: str | os.PathLike[str], options: LoadOptions | None = None, **fields: Any) -> CovoAudio:
        """Return the model of the converted checkpoint in folder `path`, ready to answer.

        options: by the fields of LoadOptions or as a whole. With tp > 1 the other ranks are started; the model ends
        them when it is closed. In a process that torchrun has started as another rank than 0 this does what rank 0
        asks for, and ends the process when rank 0 does. Raises CheckpointError, ConfigError, BackendError or RankError;
        ValueError for an option out of its range.
        """
        options = replace(options or LoadOptions(), **fields)
        if follows(options.tp):
            rank.serve(path, options)
            sys.exit(0)
        start = time.perf_counter()
        manifest = open_manifest(path, options.tp)
        device = open_device(options.device)
        devices = Devices(
            device, *(open_device(name or str(device)) for name in (options.encoder_device, options.speech_device))
        )
        ground = prepare(manifest, options, device)
        leader = None
        if options.tp > 1:
            leader = Leader(options.tp, rank.command(path, options, device), share_cores=device.type == "cpu")
        try:
            return cls._load(manifest, options, ground, devices, start, leader)
        except BaseException:
            if leader:
                leader.close()
            raise

    @classmethod
    def _load(
        cls,
        manifest: Manifest,
        options: LoadOptions,
        ground: Ground,
        devices: Devices,
        start: float,
        leader: Leader | None,
    ) -> CovoAudio:
        llm_file = manifest.ranks[0]
        files = {ENCODER: devices.encoder, llm_file: devices.llm}
        files |= {TOKEN2WAV: devices.speech} if options.speech and TOKEN2WAV in manifest.files else {}
        # Rows of another dtype are those of other weights, or less exact than the model's own.
        prefix = stored_prefix(manifest, options.check) if _name(ground.dtype) == manifest.dtype else None
        config = manifest.config if TOKEN2WAV in files else replace(manifest.config, token2wav=None)
        dtypes = speech_dtypes(options, devices.speech)
        kernels = Backends(*(kernels_of(device, ground) for device in devices))
        group = collectives(leader) if leader else ALONE
        captures = graphs_of_speech(options, ground, devices.speech) if TOKEN2WAV in files else None
        networks = meta_networks(config, kernels, ground.dtype, dtypes, manifest.int8, group, captures)
        weights = load_weights(manifest, files, options)
        fill(networks.llm, weights.files[llm_file], LLM_PREFIX)
        fill(networks.encoder, weights.files[ENCODER])
        ground.cast_nz(networks.llm, weights, llm_file)
        if devices.encoder.type == devices.llm.type:
            ground.cast_nz(networks.encoder, weights, ENCODER)
        voice = None
        if networks.token2wav is not None and config.token2wav is not None:
            tensors = weights.files[TOKEN2WAV]
            require_tensors(wanted_shapes(networks.token2wav) | stored_shapes(config.token2wav), tensors)
            voice = stored_voice(tensors, config.token2wav.dit, str(manifest.files[TOKEN2WAV].path))
        if leader:
            leader.ready(devices.llm)
        sizes: Counter[torch.device] = Counter()
        for name, device in files.items():
            sizes[device] += manifest.files[name].bytes
        placed = [Placed(0, str(device), size) for device, size in sizes.items()]
        placed += [Placed(number, **place) for number, place in sorted(leader.placed.items())] if leader else []
        report = LoadReport(
            device=str(devices.llm),
            backend=describe(ground.kernels),
            dtype=_name(ground.dtype),
            weights=manifest.weights if manifest.int8 else _name(ground.dtype),
            token2wav_dtype=_name(dtypes.flow) if networks.token2wav is not None else "",
            vocoder_dtype=_name(dtypes.vocoder) if networks.token2wav is not None else "",
            placed=tuple(placed),
            load_s=time.perf_counter() - start,
        )
        tokenizer = Tokenizer.from_file(manifest.folder / TOKENIZER, manifest.special_tokens)
        return cls(
            manifest, networks, weights, tokenizer, ground, devices, options.max_context, report, voice,
            prefix.to(devices.llm) if prefix else None, leader, captures,
        )  # fmt: skip

    def decoder(self, num_slots: int) -> Decoder:
        """Return slots of max_context rows each. With several ranks, each has its heads of them."""
        llm = self.networks.llm
        cache = allocate(llm.sizes, num_slots, self.max_context, self.dtype, self.device)
        if self.leader:
            return LeadingDecoder(self.leader, llm, cache, self.capture)
        return Decoder(llm, cache, self.capture)

    def when_lost(self, tell: Callable[[RankError], object]) -> None:
        """Let a function be called, in any thread, as soon as another rank is gone, or hangs, and nothing goes on."""
        if self.leader:
            self.leader.when_lost(tell)

    def close(self) -> None:
        """End the other ranks, if there are any. The model cannot be used afterwards."""
        if self.leader:
            self.leader.close()

    def __enter__(self) -> CovoAudio:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_codes(self) -> int:
        """Audio codes that it can speak, 0 without token2wav."""
        return self.config.token2wav.dit.num_codes if self.config.token2wav else 0

    @property
    def can_speak(self) -> bool:
        """Whether token2wav is there: the checkpoint has it, and it was loaded."""
        return self.networks.token2wav is not None

    def require_speech(self) -> None:
        """Raise CovoError if the model has no networks of speech."""
        if not self.can_speak:
            raise CovoError("this checkpoint was converted or loaded without token2wav: use mode a2t")

    def verify_text(self) -> None:
        """Return when all bytes that text rests on are known to be right. Raises CheckpointError or RankError."""
        self.weights.wait(ENCODER, self.manifest.ranks[0])
        if self.leader:
            self.leader.verified()

    @property
    def speech(self) -> Token2Wav:
        """The networks of speech. The first use fills them, which reads all of their weights: a start need not wait.

        Raises CovoError if the model has none.
        """
        self.require_speech()
        token2wav = self.networks.token2wav
        assert token2wav is not None
        with self._speech_lock:
            if not self._speech_filled:
                stored = self.weights.files[TOKEN2WAV].items()
                fill(token2wav, {name: tensor for name, tensor in stored if not name.startswith(STORED)})
                self._speech_filled = True
        return token2wav

    def verify(self) -> None:
        """Return when every byte of every file in use is known to be right. Raises CheckpointError or RankError."""
        self.weights.wait()
        self.verify_text()

    def waveform(self, source: Any, sample_rate: int | None = None, warn: audio.Warn = audio.log.warning) -> Tensor:
        """Return a question as the model hears it: [N] at 24 kHz, prepared.

        source: path of an audio file, an open one, its bytes, or samples [N] or [N, channels] with their sample_rate.
        warn gets a line for everything that is odd. Raises AudioError, also for a file longer than the context.
        """
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else getattr(source, "name", "audio")
        longest = audio.max_seconds(self.max_context, self.config.adapter.num_layers)
        try:
            if isinstance(source, str | os.PathLike):
                samples, rate = audio.read_audio(source, longest, warn)
            elif isinstance(source, bytes | bytearray | memoryview):
                samples, rate = audio.decode_audio(io.BytesIO(source), name, longest, warn=warn)
            elif hasattr(source, "read"):
                samples, rate = audio.decode_audio(source, str(name), longest, warn=warn)
            elif sample_rate is None:
                raise ValueError("samples need their sample_rate")
            else:
                samples, rate = audio.to_mono(source, warn=warn), sample_rate
        except audio.TooLongError as error:
            raise audio.TooLongError(f"{error}: cut it, or load with a larger max_context (--max-context)") from None
        return audio.prepare(samples, rate, str(name))

    @torch.inference_mode()
    def encode(self, waveform: Tensor) -> Tensor:
        """Return audio features [frames, C_llm] at 6.25 Hz for all 30 s segments. waveform: [N] at 24 kHz, prepared."""
        mels, place = audio.features(waveform, self.config.encoder.num_mels), self.devices.encoder
        return torch.cat([self._encoder(mel[None].to(place, self.dtype))[0] for mel in mels]).to(self.device)

    def speech_stream(
        self,
        blocks: SpeechBlocks = WHOLE,
        seed: int = 0,
        noise: Noise | None = None,
        on_progress: Progress | None = None,
        voice: Voice | None = None,
        flow: Flow | None = None,
    ) -> SpeechStream:
        """Return a stream that speaks codes while they come.

        noise: by default drawn on the host from `seed`; on_progress gets (stage, steps done, steps in all) of each
        block; voice, flow: by default the checkpoint's. Raises CovoError if the checkpoint has no token2wav.
        """
        networks, chosen = self.speech, voice or self.voice
        assert chosen is not None, "a model that speaks has a voice"
        noise = noise or drawn_noise(seed, networks.config.dit.latent_dim)
        voice = chosen.to(self.devices.speech)
        return SpeechStream(networks, voice, noise, blocks, flow, on_progress, before_sound=self.weights.wait)

    def token2wav(
        self,
        codes: Sequence[int],
        noise: Any = None,
        seed: int = 0,
        on_progress: Progress | None = None,
        voice: Voice | None = None,
        flow: Flow | None = None,
        blocks: SpeechBlocks = WHOLE,
    ) -> NDArray[np.float32]:
        """Return the waveform float32 [N] at 24 kHz of audio codes; empty for no codes.

        noise: [1, L, Z], L = latent frames of voice prompt and reply; the rest as speech_stream takes it. Raises
        CovoError if the checkpoint has no token2wav or a code is outside the table.
        """
        self.require_speech()
        if not len(codes):
            return np.zeros(0, dtype=np.float32)
        given = None
        if noise is not None:
            noise, chosen = torch.as_tensor(noise, dtype=torch.float32), voice or self.voice
            assert chosen is not None, "a model that speaks has a voice"
            shape = (1, self.speech.num_frames(len(codes), chosen), self.speech.config.dit.latent_dim)
            if noise.shape != shape:
                found = list(noise.shape)
                raise CovoError(f"noise must have shape {list(shape)} for {len(codes)} codes, found {found}")
            given = given_noise(noise[0])
        stream = self.speech_stream(blocks, seed, given, on_progress, voice, flow)
        return np.concatenate((stream.push(codes), stream.finish()))


def graphs_of_speech(options: LoadOptions, ground: Ground, device: torch.device) -> DeviceCapture | None:
    """Return how flow matching is captured on its device, or None for not at all.

    A capture of its own, and so a memory pool: speech has a stream of its own, and graphs of one pool may not run
    beside each other. On a device that has no graphs nothing is captured, whatever is asked for on the LLM's.
    """
    if device == ground.device:
        return DeviceCapture(device, ground.capture.required) if ground.capture else None
    return device_capture(options.graph, device) if device.type in GRAPHS else None


def speech_dtypes(options: LoadOptions, device: torch.device) -> SpeechDtypes:
    """Return the dtypes of the products of speech on a device.

    Flow matching's auto follows options.dtype if that was chosen, too; if nothing was, it is the device's fast one.
    """
    chosen = options.dtype if options.token2wav_dtype == "auto" else options.token2wav_dtype
    return SpeechDtypes(_dtype(chosen) if chosen else fast_dtype(device), _dtype(options.vocoder_dtype))


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
