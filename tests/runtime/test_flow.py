"""The ODE solver against torchdiffeq, and what its options count."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from covo_npu.runtime.flow import Flow, guided, integrate


def field(time: Tensor, z: Tensor) -> Tensor:
    """A velocity that depends on time and, not linearly, on the state."""
    return torch.sin(3 * z + time) + time**2 * z.roll(1, 0)


def solved(flow: Flow, start: Tensor) -> tuple[Tensor, int]:
    seen: list[float] = []

    def velocity(time: float, z: Tensor) -> Tensor:
        seen.append(time)
        return field(torch.tensor(time, dtype=z.dtype), z)

    found = list(integrate([partial(velocity, time) for time in flow.times()], start, flow))
    assert seen == flow.times() and len(seen) == len(found) == flow.evaluations
    return found[-1], len(seen)


@pytest.mark.parametrize("solver", ["midpoint", "euler"])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_as_torchdiffeq(solver: str, steps: int) -> None:
    start = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = odeint(field, start, torch.linspace(0, 1, steps + 1), method=solver)[-1]
    found, _ = solved(Flow(steps, solver), start)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    other, _ = solved(Flow(steps + 1, solver), start)
    assert not torch.allclose(other, expected, rtol=1e-6, atol=1e-6)


def test_steps_points_and_evaluations() -> None:
    flow = Flow(9)
    assert len(flow.grid()) == 10 and flow.grid()[0] == 0 and flow.grid()[-1] == 1
    assert flow.evaluations == len(flow.times()) == 18
    assert Flow(9, "euler").evaluations == len(Flow(9, "euler").times()) == 9
    assert Flow(2).times() == [0.0, 0.25, 0.5, 0.75]


def test_the_start_is_not_written() -> None:
    start = torch.ones(3)
    solved(Flow(3), start)
    assert torch.equal(start, torch.ones(3))


@pytest.mark.parametrize(
    ("steps", "solver", "words"), [(0, "midpoint", "at least 1 step"), (9, "heun", "midpoint, euler")]
)
def test_refuses(steps: int, solver: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Flow(steps, solver)


def test_guidance() -> None:
    velocities = torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]]])
    assert torch.equal(guided(velocities, 1.0, rescale=False), torch.tensor([[5.0, 8.0]]))
    assert torch.equal(guided(velocities, 0.0, rescale=False), velocities[1])
    rescaled = guided(velocities, 2.0, rescale=True)
    assert torch.allclose(rescaled.std(), velocities[1].std())
    assert torch.allclose(rescaled[0, 0] / rescaled[0, 1], torch.tensor(7 / 11))
