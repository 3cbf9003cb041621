"""The networks of speech: flow matching from audio codes to latents under a voice, statistics, vocoder."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from covo_npu.kernels.device import Capture
from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.checkpoint.config import Token2WavConfig
from covo_npu.runtime.context import NOTHING, Context, Prompts
from covo_npu.runtime.evaluations import Evaluations
from covo_npu.runtime.flow import Flow, guided, integrate
from covo_npu.runtime.networks.bigvgan import BigVGAN
from covo_npu.runtime.networks.dit import DiT, Rows, TimeModulation
from covo_npu.runtime.networks.layers import parameter
from covo_npu.runtime.voice import Voice


class Statistics(nn.Module):
    """Mean and standard deviation of the latents, both [Z]."""

    def __init__(self, config: Token2WavConfig) -> None:
        super().__init__()
        self.mean = parameter(config.dit.latent_dim)
        self.std = parameter(config.dit.latent_dim)

    def forward(self, latents: Tensor) -> Tensor:
        """Return normalised latents [L, Z] as the vocoder wants them."""
        return self.mean + latents * self.std


class SpeechDtypes(NamedTuple):
    """The dtypes of the products; all else is float32.

    flow: of those in the transformer's blocks and of the convolution before them; vocoder: of those in its residual
    blocks.
    """

    flow: torch.dtype = torch.float32
    vocoder: torch.dtype = torch.float32


FLOAT32 = SpeechDtypes()


class Token2Wav(nn.Module):
    """The networks of speech. Voices and ways to solve the ODE are arguments: calls with others may run side by side.

    Tensors of a call are on one device with the weights, a voice's too. flow None is the checkpoint's own.
    """

    def __init__(
        self,
        config: Token2WavConfig,
        kernels: Kernels,
        dtypes: SpeechDtypes = FLOAT32,
        capture: Capture | None = None,
    ) -> None:
        """capture: makes graphs of the transformer's evaluations; it is for nothing else, as Evaluations says."""
        super().__init__()
        self.config = config
        self.flow = Flow(config.flow.time_points - 1)
        self.statistics = Statistics(config)
        self.dit = DiT(config.dit, kernels, dtypes.flow)
        self.evaluations = Evaluations(self.dit, capture)
        self.prompts = Prompts()  # as fixed contexts
        self.vocoder = BigVGAN(config.vocoder, kernels, dtypes.vocoder)

    def num_frames(self, num_codes: int, voice: Voice) -> int:
        """Return L, the latent frames of prompt and reply together, for a reply of num_codes codes."""
        return (voice.num_codes + num_codes) * self.config.dit.upsample_factor

    def solve(
        self,
        codes: Tensor,
        known_latents: Tensor,
        noise: Tensor,
        voice: Voice,
        flow: Flow | None = None,
        context: Context = NOTHING,
        kept: list[Rows] | None = None,
    ) -> Iterator[Tensor]:
        """Yield after each evaluation of the network the normalised latents [L - K, Z] float32 that follow the known.

        The last ones are the solution. codes: [n] int64, all of them, a prompt's first; known_latents: [K, Z] of the
        first K frames, K <= L, those of a prompt or any that were solved before: they condition the others. noise:
        [L, Z], L = upsample_factor * n, where the ODE starts. voice: whose speaker it is; its prompt is not read.

        context: fixed frames of the same voice and flow that come before all these; kept: gets the Rows of these at
        each evaluation, for a context. With either of them evaluations are launched and not captured.
        """
        flow = flow or self.flow
        conditions = self.dit.conditions(codes, known_latents, context.last_code, context.num_frames)
        captured = self.evaluations.under(conditions) if kept is None and context is NOTHING else None
        modulations = self.dit.modulations(flow.times(), voice.speaker_embedding)

        def velocity(number: int, modulation: TimeModulation, latents: Tensor) -> Tensor:
            if captured:
                velocities = captured(latents, modulation)
            else:
                velocities = self.dit(latents, conditions, modulation, context.at(number), kept)
            return guided(velocities, self.config.flow.cfg_alpha, self.config.flow.rescale)

        at_times = [partial(velocity, *each) for each in enumerate(modulations)]
        for latents in integrate(at_times, noise, flow):
            yield latents[known_latents.shape[0] :]
