"""Flow matching in the open: the time grid, guidance, the ODE steps. Source: arXiv 2210.02747."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor], Tensor]  # of the latents, at one time


# solver: evaluations of the velocity a step
SOLVERS = {"midpoint": 2, "euler": 1}


@dataclass(frozen=True, slots=True)
class Flow:
    """How the ODE is solved: in `steps` of equal length from time 0 to 1.

    Steps are not time points, of which there is one more, and not evaluations of the network: the midpoint rule makes
    two a step. The usual 10 time points are 9 steps and 18 evaluations.

    fixed_context: what new frames go on from, a voice's prompt and what was spoken, is solved once without them and
    reused, an approximation (see context.py); by default every block solves it again.
    """

    steps: int
    solver: str = "midpoint"
    fixed_context: bool = False

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


def integrate(velocities: Iterable[Velocity], latents: Tensor, flow: Flow) -> Iterator[Tensor]:
    """Yield the latents after each evaluation, where the next one looks; the last are those at time 1.

    velocities: one for each of flow.times(); latents: those at time 0, not written.
    """
    at = iter(velocities)
    for start, end in pairwise(flow.grid()):
        step = end - start
        slope = next(at)(latents)
        if flow.solver == "midpoint":
            yield (middle := torch.add(latents, slope, alpha=step / 2))
            slope = next(at)(middle)
        yield (latents := torch.add(latents, slope, alpha=step))


def guided(velocities: Tensor, cfg_alpha: float, rescale: bool) -> Tensor:
    """Return v1 + (v1 - v0) * cfg_alpha: [L, Z]. velocities: [2, L, Z], v0 without and v1 with the codes.

    The usual guidance scale is 1 + cfg_alpha. `rescale` brings the result to v1's standard deviation.
    """
    without, with_codes = velocities
    result = torch.lerp(without, with_codes, 1 + cfg_alpha)
    return result * (with_codes.std() / result.std()) if rescale else result
