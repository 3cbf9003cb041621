"""CovoAudio: the networks of a converted checkpoint on one device, and what they compute. Here the API starts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from covo_npu.kernels.errors import BackendError, CovoError
from covo_npu.kernels.interface import Kernels
from covo_npu.kernels.select import describe, fast_dtype, open_device, select
from covo_npu.runtime import audio
from covo_npu.runtime.adapter import Adapter
from covo_npu.runtime.cache import allocate
from covo_npu.runtime.checkpoint import (
    ENCODER,
    GENERATION_CONFIG,
    TOKEN2WAV,
    TOKENIZER,
    CheckpointError,
    Manifest,
    read_manifest,
)
from covo_npu.runtime.config import ModelConfig
from covo_npu.runtime.decode import Decoder, SharedPrefixes
from covo_npu.runtime.flow import Flow
from covo_npu.runtime.generation import read_generation
from covo_npu.runtime.graph import DeviceCapture, device_capture
from covo_npu.runtime.layers import parameter
from covo_npu.runtime.loader import Mode, Weights, load_tensors
from covo_npu.runtime.qwen2 import Qwen2
from covo_npu.runtime.sampling import Sampling
from covo_npu.runtime.token2wav import Progress, Token2Wav
from covo_npu.runtime.tokenizer import Tokenizer
from covo_npu.runtime.voice import read_voice
from covo_npu.runtime.whisper import WhisperEncoder

if TYPE_CHECKING:
    from covo_npu.runtime.session import Session

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_CONTEXT = 8192  # tokens of a dialogue: 0.47 GB of KV cache at the real size in bfloat16

# The file of a checkpoint in which the tensors of a part lie; all other parts are token2wav's.
FILE_STEMS = {"llm": "llm", "frontend": "encoder", "encoder": "encoder", "adapter": "encoder"}


class FrontEnd(nn.Module):
    """The mel filter bank, [M, frequencies]: a table of the host."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mel_filters = parameter(config.encoder.num_mels, audio.N_FFT // 2 + 1)


class Networks(nn.Module):
    """All networks; the names of its tensors are those of the checkpoint. token2wav's parts stand at the top level."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.llm = Qwen2(config.llm, kernels)
        self.frontend = FrontEnd(config)
        self.encoder = WhisperEncoder(config.encoder, kernels)
        self.adapter = Adapter(config.adapter, kernels)
        self.token2wav = None if config.token2wav is None else Token2Wav(config.token2wav, kernels)


def expected_tensors(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return {file stem: {tensor: shape}} of a checkpoint for this config: what the networks want, from themselves."""
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in meta_networks(config, select("reference", torch.device("cpu"))).state_dict().items():
        name = name.removeprefix("token2wav.")
        stem = FILE_STEMS.get(name.partition(".")[0], "token2wav")
        files.setdefault(stem, {})[name] = tuple(tensor.shape)
    return files


def meta_networks(config: ModelConfig, kernels: Kernels) -> Networks:
    """Return the networks on the meta device: shapes and names, no memory, no values."""
    with torch.device("meta"):
        return Networks(config, kernels)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How the model became ready."""

    device: str
    backend: str
    dtype: str
    token2wav_dtype: str  # of the matrix products of flow matching
    bytes: int  # of the weight files in use
    load_s: float


class CovoAudio:
    """The model on its device. Build it with `load`; talk to it through `session`."""

    def __init__(
        self,
        manifest: Manifest,
        networks: Networks,
        weights: Weights,
        tokenizer: Tokenizer,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        max_context: int,
        report: LoadReport,
        capture: DeviceCapture | None = None,
    ) -> None:
        self.manifest, self.config, self.networks, self.weights = manifest, manifest.config, networks, weights
        self.tokenizer, self.kernels, self.report = tokenizer, kernels, report
        self.device, self.dtype, self.max_context = device, dtype, max_context
        self.capture = capture
        self.prefixes = SharedPrefixes(networks.llm)
        self.generation = read_generation(manifest.folder / GENERATION_CONFIG)
        self._mel_filters = networks.frontend.mel_filters.cpu()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str = "auto",
        dtype: str | None = None,
        *,
        backend: str | None = None,
        mode: Mode = "mmap",
        check: bool = True,
        pinned: bool = True,
        speech: bool = True,
        max_context: int = MAX_CONTEXT,
        graph: str = "auto",
        token2wav_dtype: str = "auto",
        flow_steps: int | None = None,
        flow_solver: str = "midpoint",
        nz: bool = False,
    ) -> CovoAudio:
        """Return the model of the converted checkpoint in folder `path`, ready to answer.

        device: cpu, cuda:N, npu:N or auto; dtype: of LLM and encoder, by default the checkpoint's (another one costs a
        converted copy in memory); mode, check, pinned: see loader.load_tensors; speech: load token2wav too;
        max_context: tokens that a dialogue may hold; graph: auto, on or off, whether decode steps are captured;
        token2wav_dtype: of the matrix products of flow matching, auto is bfloat16 where the device is faster in it;
        flow_steps, flow_solver: how the ODE of speech is solved, midpoint or euler; by default the checkpoint's 9
        steps, which with the midpoint rule are 18 evaluations of the network; nz: on an NPU, hold 16-bit weights in its
        private format FRACTAL_NZ.
        Raises CheckpointError, ConfigError or BackendError; ValueError if the ODE cannot be solved so.
        """
        start = time.perf_counter()
        torch_device = open_device(device)
        kernels = select(backend, torch_device)
        capture = device_capture(graph, torch_device)
        cast_nz = getattr(kernels, "cast_weights_nz", None)
        if nz and cast_nz is None:
            raise BackendError(f"weights in the format NZ are for device npu, found {torch_device}: leave out --nz")
        manifest = read_manifest(path)
        torch_dtype = _dtype(dtype or manifest.dtype)
        speech_dtype = fast_dtype(torch_device) if token2wav_dtype == "auto" else _dtype(token2wav_dtype)
        files = [ENCODER, *manifest.ranks, *([TOKEN2WAV] if speech and TOKEN2WAV in manifest.files else [])]
        config = manifest.config if TOKEN2WAV in files else replace(manifest.config, token2wav=None)
        networks = meta_networks(config, kernels)
        if networks.token2wav is not None:
            steps = flow_steps if flow_steps is not None else networks.token2wav.flow.steps
            networks.token2wav.configure(speech_dtype, Flow(steps, flow_solver))
        weights = load_tensors(manifest, files, torch_device, mode=mode, check=check, pinned=pinned)
        fill(networks, weights.tensors, torch_dtype)
        if nz and cast_nz:
            cast_nz(networks)
        report = LoadReport(
            device=str(torch_device),
            backend=describe(kernels),
            dtype=_name(torch_dtype),
            token2wav_dtype=_name(speech_dtype),
            bytes=sum(manifest.files[name].bytes for name in files),
            load_s=time.perf_counter() - start,
        )
        tokenizer = Tokenizer.from_file(Path(path) / TOKENIZER, manifest.special_tokens)
        return cls(
            manifest, networks, weights, tokenizer, kernels, torch_device, torch_dtype, max_context, report, capture
        )

    def session(
        self,
        mode: str = "a2ta",
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        system: str | None = None,
    ) -> Session:
        """Return a new dialogue.

        mode: "a2ta" answers in text and speech, "a2t" in text; sampling, max_new_tokens: by default the checkpoint's;
        system: text instead of the default system prompt.
        """
        from covo_npu.runtime.session import Session

        defaults = self.generation
        limit = defaults.max_new_tokens if max_new_tokens is None else max_new_tokens
        return Session(self, mode, sampling or defaults.sampling, limit, seed, system)

    def use_voice(self, folder: str | os.PathLike[str]) -> None:
        """Speak with the voice in a folder, see voice.read_voice, instead of the checkpoint's. Raises ConfigError."""
        if self.networks.token2wav is None:
            raise CovoError("a model without token2wav has no voice; leave out the voice, or load a model that speaks")
        self.networks.token2wav.set_voice(read_voice(folder, self.networks.token2wav.config.dit))

    @torch.inference_mode()
    def encode(self, waveform: Tensor) -> Tensor:
        """Return audio features [frames, C_llm] at 6.25 Hz for all 30 s segments. waveform: [N] at 24 kHz, prepared."""
        networks, features = self.networks, []
        for mel in audio.features(waveform, self._mel_filters):
            states = networks.encoder(mel[None].to(self.device, self.dtype))
            features.append(networks.adapter(states)[0])
        return torch.cat(features)

    @torch.inference_mode()
    def token2wav(
        self, codes: Sequence[int], noise: Any = None, seed: int = 0, on_progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Return the waveform float32 [N] at 24 kHz of audio codes; empty for no codes.

        noise: [1, L, Z], L = latent frames of voice prompt and reply; by default drawn on the host from `seed`;
        on_progress gets (stage, steps done, steps in all).
        Raises CovoError if the checkpoint has no token2wav or a code is outside the table.
        """
        token2wav = self.networks.token2wav
        if token2wav is None:
            raise CovoError("this model was loaded without token2wav: it answers in text only (mode a2t)")
        num_codes = token2wav.config.dit.num_codes
        if wrong := sorted({code for code in codes if not 0 <= code < num_codes}):
            raise CovoError(f"audio codes must be in 0..{num_codes - 1}, found {wrong[:10]}")
        if not len(codes):
            return np.zeros(0, dtype=np.float32)
        shape = (1, token2wav.num_frames(len(codes)), token2wav.config.dit.latent_dim)
        if noise is None:
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        noise = torch.as_tensor(noise, dtype=torch.float32)
        if noise.shape != shape:
            raise CovoError(f"noise must have shape {list(shape)} for {len(codes)} codes, found {list(noise.shape)}")
        waveform = token2wav(torch.tensor(codes, device=self.device), noise[0].to(self.device), on_progress)
        self.weights.wait()  # nothing is heard before all weights are verified
        return waveform.cpu().numpy()

    def decoder(self, sampling: Sampling, num_slots: int = 1) -> Decoder:
        """Return a decoder with an empty KV cache for dialogues of at most max_context tokens."""
        cache = allocate(self.config.llm, num_slots, self.max_context, self.dtype, self.device)
        return Decoder(self.networks.llm, cache, sampling, self.capture)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise BackendError(f"unknown dtype {name!r}; there are {', '.join(DTYPES)}")
    return DTYPES[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fill(networks: Networks, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Assign every tensor of the checkpoint to its place in networks that stand on the meta device.

    The parts in FILE_STEMS compute in `dtype`, but for the front end's table; token2wav stays as it is stored. Raises
    CheckpointError with both lists if tensors are missing or unexpected. Afterwards nothing is left on meta.
    """
    placed = {}
    for name, tensor in tensors.items():
        part = name.partition(".")[0]
        target = name if part in FILE_STEMS else f"token2wav.{name}"
        placed[target] = tensor.to(dtype) if part in FILE_STEMS and part != "frontend" else tensor
    wanted = networks.state_dict()
    missing, unexpected = sorted(wanted.keys() - placed.keys()), sorted(placed.keys() - wanted.keys())
    misshapen = sorted(name for name in wanted.keys() & placed.keys() if wanted[name].shape != placed[name].shape)
    if missing or unexpected or misshapen:
        lists = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        found = "; ".join(f"{len(names)} {label}: {', '.join(names[:10])}" for label, names in lists if names)
        raise CheckpointError(f"the tensors of the checkpoint do not fit its config: {found}; convert the source again")
    networks.load_state_dict(placed, strict=True, assign=True)
    networks.eval()
