"""Group: the tensor-parallel ranks that compute one network together, and what they tell each other about tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until PyTorch 2.12
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}  # device: whose collectives torch.distributed takes


@dataclass(frozen=True, slots=True)
class Group:
    """Rank `rank` of `size`. This one moves nothing: of one rank it is all that is needed, of more it has the sizes.

    Every method but part is called by all ranks, in the same order.
    """

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' x, the same bits on each. May write x."""
        return x

    def join(self, x: Tensor, axis: int, length: int) -> Tensor:
        """Return all ranks' x one after another along an axis, cut to `length` there: the same bits on each."""
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Return rank 0's x. Of the others only shape and dtype count. May write x."""
        return x

    def part(self, x: Tensor, axis: int) -> Tensor:
        """Return this rank's part of x along an axis, of equal parts."""
        length = x.shape[axis] // self.size
        return x.narrow(axis, self.rank * length, length)


ALONE = Group()


@dataclass(slots=True)
class Tally:
    """How many collectives a rank has begun."""

    collectives: int = 0


@dataclass(frozen=True, slots=True)
class Collectives(Group):
    """A group over the default process group of torch.distributed: one collective a call.

    Raises RuntimeError if another rank is gone: from then on the ranks are out of step.
    """

    tally: Tally = field(default_factory=Tally)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.tally.collectives += 1
        dist.all_reduce(x)
        return x

    def join(self, x: Tensor, axis: int, length: int) -> Tensor:
        self.tally.collectives += 1
        parts = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        _all_gather(parts, x.contiguous())
        return parts.view(self.size, *x.shape).movedim(0, axis).flatten(axis, axis + 1).narrow(axis, 0, length)

    def broadcast(self, x: Tensor) -> Tensor:
        self.tally.collectives += 1
        dist.broadcast(x, 0)
        return x
