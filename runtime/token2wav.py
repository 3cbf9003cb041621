"""Audio codes to a waveform: flow matching under the voice prompt, statistics, vocoder."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.bigvgan import BigVGAN
from covo_npu.runtime.config import Token2WavConfig, VoiceConfig
from covo_npu.runtime.dit import DiT, Modulation
from covo_npu.runtime.flow import Flow, guided, integrate
from covo_npu.runtime.layers import parameter

Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all)


class Voice(nn.Module):
    """The voice prompt. prompt_codes: [P] int64; prompt_latents: [L_prompt, Z]; speaker_embedding: [C_speaker]."""

    def __init__(self, config: Token2WavConfig) -> None:
        super().__init__()
        self.prompt_codes = parameter(config.voice.num_codes, dtype=torch.int64)
        self.prompt_latents = parameter(config.voice.num_frames, config.dit.latent_dim)
        self.speaker_embedding = parameter(config.dit.speaker_dim)


class Statistics(nn.Module):
    """Mean and standard deviation of the latents, both [Z]."""

    def __init__(self, config: Token2WavConfig) -> None:
        super().__init__()
        self.mean = parameter(config.dit.latent_dim)
        self.std = parameter(config.dit.latent_dim)


class Token2Wav(nn.Module):
    """The networks of speech and their voice."""

    def __init__(self, config: Token2WavConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config = config
        self.voice = Voice(config)
        self.statistics = Statistics(config)
        self.dit = DiT(config.dit, kernels)
        self.vocoder = BigVGAN(config.vocoder, kernels)
        self.flow = Flow(config.flow.time_points - 1)
        self.dtype = torch.float32
        self._modulations: list[Modulation] = []

    def configure(self, dtype: torch.dtype, flow: Flow | None = None) -> None:
        """Set the dtype of the transformer's matrix products and, if given, how the ODE is solved.

        The weights are cast when they are first needed; from a narrower dtype there is no way back.
        """
        self.dtype = dtype
        if flow is not None:
            self.flow = flow
            self._modulations.clear()

    def num_frames(self, num_codes: int) -> int:
        """Return L, the latent frames of prompt and reply together, for a reply of num_codes codes."""
        return (self.config.voice.num_codes + num_codes) * self.config.dit.upsample_factor

    def set_voice(self, voice: Mapping[str, Tensor]) -> None:
        """Speak with another voice: the tensors of Voice by name, in its dtypes."""
        device = self.statistics.mean.device
        for name, tensor in voice.items():
            setattr(self.voice, name, nn.Parameter(tensor.to(device), requires_grad=False))
        sizes = VoiceConfig(num_codes=voice["prompt_codes"].shape[0], num_frames=voice["prompt_latents"].shape[0])
        self.config = replace(self.config, voice=sizes)
        self._modulations.clear()

    def forward(self, codes: Tensor, noise: Tensor, on_progress: Progress | None = None) -> Tensor:
        """Return the waveform [N] at 24 kHz. codes: [n] int64, n >= 1; noise: [L, Z] float32, L = num_frames(n)."""
        latents = self.latents(codes, noise, on_progress)
        return self.vocoder(latents.T[None], partial(on_progress, "vocoder") if on_progress else None)[0]

    def latents(self, codes: Tensor, noise: Tensor, on_progress: Progress | None = None) -> Tensor:
        """Return the reply's latents [frames, Z], ready for the vocoder.

        The prompt's frames are cut off. They reach beyond the prompt's codes (1167 > 4 * 291), so the reply loses its
        first frames: n codes give 4 n - 3 frames with the default voice.
        """
        latents = self.normalised_latents(codes, noise, on_progress)[self.config.voice.num_frames :]
        return self.statistics.mean + latents * self.statistics.std

    def normalised_latents(self, codes: Tensor, noise: Tensor, on_progress: Progress | None = None) -> Tensor:
        """Return the solution of the ODE from the noise, prompt included: [L, Z] float32."""
        flow = self.flow
        if not self._modulations:  # they depend on time and voice only
            self._modulations = [self.dit.modulation(time, self.voice.speaker_embedding) for time in flow.times()]
        self.dit.multiply_in(self.dtype)
        conditions = self.dit.conditions(torch.cat((self.voice.prompt_codes, codes)), self.voice.prompt_latents)

        def velocity(latents: Tensor, evaluation: int) -> Tensor:
            velocities = self.dit(latents, conditions, self._modulations[evaluation])
            if on_progress:
                on_progress("flow matching", evaluation + 1, flow.evaluations)
            return guided(velocities, self.config.flow.cfg_alpha, self.config.flow.rescale)

        return integrate(velocity, noise, flow)
