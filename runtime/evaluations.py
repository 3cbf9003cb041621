"""Evaluations of the velocity network: launched operator by operator, or replayed as captured graphs.

A graph serves all lengths up to its own number of frames, a multiple of BUCKET_FRAMES: frames beyond a reply's hold
zeros, as the convolution expects past an edge, and no frame attends to them. What is captured is the network alone;
guidance and the step of the ODE see the frames of the reply and nothing else.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from covo_npu.kernels.device import Capture, Turns
from covo_npu.kernels.errors import BackendError
from covo_npu.kernels.masked import TOLERANCES, masked_keys_error
from covo_npu.runtime.networks.dit import MAX_FRAMES, Conditions, DiT, TimeModulation
from covo_npu.runtime.networks.rotary import rotary_table

# Frames by which graphs differ: 32 graphs at most, and a reply of 1500 frames computes 4 % more, on average.
BUCKET_FRAMES = 128
log = logging.getLogger(__name__)

Evaluate = Callable[[Tensor, TimeModulation], Tensor]  # latents [L, Z] at one time -> velocities [2, L, Z], see DiT


class Evaluations:
    """How one DiT is evaluated. Safe to be called from many threads, each on a stream of its own.

    A graph is captured when the first reply of its length comes. All of them share a memory pool, and the tensors that
    they read, so they take turns.
    """

    def __init__(self, dit: DiT, capture: Capture | None = None) -> None:
        """capture: None launches all; it must be for these graphs alone, or others might run beside them."""
        self._dit, self._capture = dit, capture
        self._turns = Turns()
        self._places: _Places | None = None
        self._graphs: dict[int, _Graph] = {}  # frames: graph

    def under(self, conditions: Conditions) -> Evaluate:
        """Return the velocities of a reply as a function of its latents and the time. conditions: without a mask.

        The function raises BackendError if graphs are required and the device captures none, or one that is not right.
        """

        def launched(latents: Tensor, modulation: TimeModulation) -> Tensor:
            velocities: Tensor = self._dit(latents, conditions, modulation)
            return velocities

        if self._capture is None or (num_frames := conditions.inputs.shape[1]) > MAX_FRAMES:
            return launched
        frames = -(-num_frames // BUCKET_FRAMES) * BUCKET_FRAMES
        inputs = F.pad(conditions.inputs, (0, 0, 0, frames - num_frames))
        mask = self._dit.kernels.key_mask(torch.arange(frames, device=inputs.device) < num_frames, frames)

        def evaluate(latents: Tensor, modulation: TimeModulation) -> Tensor:
            with self._turns.on(latents.device):
                if self._capture and frames not in self._graphs:
                    self._add(self._capture, (latents, inputs, mask, modulation), launched(latents, modulation))
                if graph := self._graphs.get(frames):
                    return graph(latents, inputs, mask, modulation)
            return launched(latents, modulation)

        return evaluate

    def _add(self, capture: Capture, example: _Inputs, expected: Tensor) -> None:
        """Add the graph of an example. If it cannot be had, and need not, nothing is captured any more."""
        try:
            self._places = self._places or _Places.of(self._dit, expected.device)
            graph = _Graph(self._dit, self._places, example, capture)
            self._require_equal(graph(*example), expected, graph.frames)
            self._graphs[graph.frames] = graph
        except BackendError as error:
            if capture.required:
                raise
            log.warning("%s; until then evaluations of flow matching are launched operator by operator", error)
            self._capture = self._places = None
            self._graphs.clear()  # nothing of them is under way: the host has waited for the device

    def _require_equal(self, found: Tensor, expected: Tensor, frames: int) -> None:
        """Raise BackendError if a graph's velocities, or attention under a mask, are not what is launched.

        The velocities are those that will be spoken, but what one row more or less changes in them may be small:
        attention is measured on rows of which each is seen.
        """
        dit, tolerance = self._dit, TOLERANCES[self._dit.dtype]
        heads = dit.config.num_heads, dit.config.hidden_size // dit.config.num_heads
        q = torch.empty(2, frames, *heads, dtype=dit.dtype, device=found.device)
        errors = {
            "velocities": float((found - expected).norm() / expected.norm()),
            "attention under a mask": masked_keys_error(dit.kernels, q),
        }
        wrong = [f"{what} off by {error:.2g}" for what, error in errors.items() if not error <= tolerance]  # NaN is
        if wrong:
            raise BackendError(
                f"{found.device}: flow matching of {frames} frames as a graph has {', '.join(wrong)} (at most "
                f"{tolerance:.2g}): start again with --graph off, and please report it"
            )


_Inputs = tuple[Tensor, Tensor, Tensor, TimeModulation]  # latents [L, Z], inputs [2, frames, C], mask, the time


class _Graph:
    """One evaluation of a number of frames on the places; called in turns."""

    def __init__(self, dit: DiT, places: _Places, example: _Inputs, capture: Capture) -> None:
        latents, inputs, mask, _ = example
        self.frames = inputs.shape[1]
        self._latents = _beginning(places.latents, (self.frames, latents.shape[1]))
        self._inputs, self._mask = _beginning(places.inputs, inputs.shape), _beginning(places.mask, mask.shape)
        self._rows, modulation = places.rows, TimeModulation.of(places.rows)
        cos, sin = places.cos[:, : self.frames], places.sin[:, : self.frames]
        conditions = Conditions(self._inputs, cos, sin, self._mask)
        self._velocities: Tensor

        def work() -> None:
            self._velocities = dit(self._latents, conditions, modulation)

        self._replay = capture(work)

    def __call__(self, latents: Tensor, inputs: Tensor, mask: Tensor, modulation: TimeModulation) -> Tensor:
        """Return the velocities [2, L, Z] of the first L frames."""
        num_frames = latents.shape[0]
        self._latents[:num_frames].copy_(latents)
        self._latents[num_frames:].zero_()
        for place, value in ((self._inputs, inputs), (self._mask, mask), (self._rows, modulation.rows)):
            place.copy_(value)
        self._replay()
        return self._velocities[:, :num_frames].clone()


@dataclass(frozen=True, slots=True)
class _Places:
    """What all graphs read, with room for MAX_FRAMES: one of fewer frames reads the beginning of each memory.

    latents: [L, Z]; inputs: [2, L, C]; mask: of key_mask(); rows: of a TimeModulation; cos, sin: see Conditions.
    """

    latents: Tensor
    inputs: Tensor
    mask: Tensor
    rows: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, dit: DiT, device: torch.device) -> _Places:
        """Return the places of a network."""
        config = dit.config
        head_dim = config.hidden_size // config.num_heads
        cos, sin = rotary_table(MAX_FRAMES, head_dim, config.rope_theta, dit.dtype, device)
        everything = torch.ones(MAX_FRAMES, dtype=torch.bool, device=device)
        return cls(
            torch.zeros(MAX_FRAMES, config.latent_dim, device=device),
            torch.zeros(2, MAX_FRAMES, config.hidden_size, device=device),
            dit.kernels.key_mask(everything, MAX_FRAMES).contiguous(),
            torch.zeros(6 * config.num_layers + 2, config.hidden_size, device=device),
            cos[None, :, None],
            sin[None, :, None],
        )


def _beginning(place: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the beginning of a memory as a contiguous tensor of a shape."""
    return place.view(-1)[: math.prod(shape)].view(*shape)
