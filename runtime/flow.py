"""Flow matching in the open: the time grid, guidance, the ODE steps. Source: arXiv 2210.02747."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# (latents, index of the evaluation) -> velocity. The index counts the entries of Flow.times.
Velocity = Callable[[Tensor, int], Tensor]


# solver: evaluations of the velocity a step
SOLVERS = {"midpoint": 2, "euler": 1}


@dataclass(frozen=True, slots=True)
class Flow:
    """How the ODE is solved: in `steps` of equal length from time 0 to 1.

    Steps are not time points, of which there is one more, and not evaluations of the network: the midpoint rule makes
    two a step. The usual 10 time points are 9 steps and 18 evaluations.
    """

    steps: int
    solver: str = "midpoint"

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown solver {self.solver!r}; there are {', '.join(SOLVERS)}")
        if self.steps < 1:
            raise ValueError(f"the ODE needs at least 1 step, found {self.steps}")

    @property
    def evaluations(self) -> int:
        """How often the network runs."""
        return self.steps * SOLVERS[self.solver]

    def grid(self) -> list[float]:
        """Return the ends of the steps, from 0 to 1, as float32 values."""
        return torch.linspace(0, 1, self.steps + 1).tolist()

    def times(self) -> list[float]:
        """Return the times at which the velocity is evaluated, in order."""
        parts = range(SOLVERS[self.solver])
        return [start + (end - start) * part / len(parts) for start, end in pairwise(self.grid()) for part in parts]


def integrate(velocity: Velocity, latents: Tensor, flow: Flow) -> Tensor:
    """Return the latents at time 1. latents: any shape, those at time 0; not written."""
    evaluation = 0
    for start, end in pairwise(flow.grid()):
        step = end - start
        slope = velocity(latents, evaluation)
        if flow.solver == "midpoint":
            slope = velocity(torch.add(latents, slope, alpha=step / 2), evaluation + 1)
        latents = torch.add(latents, slope, alpha=step)
        evaluation += SOLVERS[flow.solver]
    return latents


def guided(velocities: Tensor, cfg_alpha: float, rescale: bool) -> Tensor:
    """Return v1 + (v1 - v0) * cfg_alpha: [L, Z]. velocities: [2, L, Z], v0 without and v1 with the codes.

    The usual guidance scale is 1 + cfg_alpha. `rescale` brings the result to v1's standard deviation.
    """
    without, with_codes = velocities
    result = torch.lerp(without, with_codes, 1 + cfg_alpha)
    return result * (with_codes.std() / result.std()) if rescale else result
