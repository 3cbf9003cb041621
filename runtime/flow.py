"""Flow matching in the open: the time grid, guidance, the ODE steps. Source: arXiv 2210.02747."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (latents, index of the evaluation) -> velocity. The index counts the entries of evaluation_times.
Velocity = Callable[[Tensor, int], Tensor]


def time_grid(time_points: int) -> list[float]:
    """Return the grid from 0 to 1 as float32 values. N points make N - 1 intervals.

    Raises ValueError if there are fewer than 2 points.
    """
    if time_points < 2:
        raise ValueError(f"the ODE needs at least 2 time points, found {time_points}")
    return torch.linspace(0, 1, time_points).tolist()


def evaluation_times(grid: Sequence[float], solver: str) -> list[float]:
    """Return the times at which the velocity is evaluated, in order: midpoint two an interval, euler one."""
    starts = list(zip(grid[:-1], grid[1:], strict=True))
    if solver == "midpoint":
        return [time for start, end in starts for time in (start, start + (end - start) / 2)]
    return [start for start, _ in starts]


def integrate(velocity: Velocity, latents: Tensor, grid: Sequence[float], solver: str) -> Tensor:
    """Return the latents at the end of the grid. latents: any shape, those at its start; not written."""
    evaluation = 0
    for start, end in zip(grid[:-1], grid[1:], strict=True):
        step = end - start
        slope = velocity(latents, evaluation)
        evaluation += 1
        if solver == "midpoint":
            slope = velocity(torch.add(latents, slope, alpha=step / 2), evaluation)
            evaluation += 1
        latents = torch.add(latents, slope, alpha=step)
    return latents


def guided(velocities: Tensor, cfg_alpha: float, rescale: bool) -> Tensor:
    """Return v1 + (v1 - v0) * cfg_alpha: [L, Z]. velocities: [2, L, Z], v0 without and v1 with the codes.

    The usual guidance scale is 1 + cfg_alpha. `rescale` brings the result to v1's standard deviation.
    """
    without, with_codes = velocities
    result = torch.lerp(without, with_codes, 1 + cfg_alpha)
    return result * (with_codes.std() / result.std()) if rescale else result
