"""What the emulated device computes where it differs from the CPU, and what it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from emulation import device
from emulation.signatures import RUNS_2_9
from torch import Tensor

from covo_npu.kernels.npu import open_device

DEVICE = open_device(0)


def there(x: Tensor) -> Tensor:
    return x.to(DEVICE)


X, W = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.eye(8)
DX, DW = there(X), there(W)
CAST = "npu::_npu_dtype_cast" if RUNS_2_9 else "aten::copy_"


def test_gelu_is_the_tanh_form_whatever_it_is_asked_for() -> None:
    assert torch.equal(F.gelu(DX, approximate="none").cpu(), F.gelu(X, approximate="tanh"))
    assert torch.equal(torch_npu.npu_gelu(DX, approximate="none").cpu(), F.gelu(X))


def test_apply_rotary_writes_its_arguments() -> None:
    q, k = there(torch.randn(1, 3, 2, 128)), there(torch.randn(1, 3, 1, 128))
    before, table = q.clone(), there(torch.full((1, 3, 1, 128), 0.6))
    rotated, _ = torch_npu.npu_apply_rotary_pos_emb(q, k, table, table, layout="BSND", rotary_mode="half")
    assert rotated.data_ptr() == q.data_ptr() and not torch.equal(q, before)


def test_a_scatter_outside_the_tensor_is_an_error_here() -> None:
    with pytest.raises(IndexError):
        torch_npu.npu_scatter_nd_update_(there(torch.ones(8, 4)), there(torch.tensor([[8]])), there(torch.ones(1, 4)))


def test_views_and_memory_are_shared() -> None:
    cache = torch.zeros(1, 4, 16, 8, device=DEVICE)
    cache[:, :, 3:5] = there(torch.ones(1, 4, 2, 8))
    assert cache.sum().item() == 64
    assert torch.equal(DX.T.contiguous().cpu(), X.T) and torch.equal(DX[1:3, ::2].cpu(), X[1:3, ::2])


# call: (launches, synchronisations, copies)
COUNTS: dict[str, tuple[Callable[[], Any], list[str], int, int]] = {
    "matmul with bias": (lambda: F.linear(DX, DW, DW[0]), ["aten::addmm"], 0, 0),
    "views": (lambda: DX.view(2, 2, 8)[0].T.unsqueeze(0).expand(3, 8, 2), [], 0, 0),
    "contiguous": (lambda: DX.T.contiguous(), ["aten::clone"], 0, 0),
    "a cast": (lambda: DX.bfloat16(), [CAST], 0, 0),
    "layer norm": (lambda: F.layer_norm(DX, (8,), DW[0], DW[1]), ["aten::native_layer_norm"], 0, 0),
    "a fused operator": (lambda: torch_npu.npu_rms_norm(DX, DW[0], 1e-6), ["npu::npu_rms_norm"], 0, 0),
    "upload": (lambda: X.to(DEVICE), [], 1, 1),
    "upload of pinned memory": (lambda: X.pin_memory().to(DEVICE, non_blocking=True), [], 0, 1),
    "non_blocking upload of pageable memory": (lambda: X.to(DEVICE, non_blocking=True), [], 1, 1),
    "tensor from a list": (lambda: torch.tensor([1, 2], device=DEVICE), [], 1, 1),
    "cpu": (lambda: DX.cpu(), [], 1, 1),
    "item": (lambda: DX[0, 0].item(), [], 1, 1),
    "nonzero": (lambda: DX.nonzero(), ["aten::nonzero"], 1, 0),
    "boolean index": (lambda: DX[DX > 0], ["aten::gt.Scalar", "aten::index.Tensor"], 1, 0),
    "boolean assignment": (lambda: DX.clone().__setitem__(DX > 99, DX[0, :0]), None, 1, 0),
    "index by numbers": (lambda: DX[there_index], ["aten::index.Tensor"], 0, 0),
    "multinomial": (lambda: torch.multinomial(DW, 1), ["aten::multinomial"], 1, 0),
    "equal": (lambda: torch.equal(DX, DX), ["aten::equal"], 1, 0),
    "synchronize": (lambda: torch.npu.synchronize(), [], 1, 0),
    "argmax": (lambda: DX.argmax(-1), ["aten::argmax.out"], 0, 0),
}
there_index = there(torch.tensor([1, 3]))


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    call, launches, synchronisations, copies = COUNTS[name]
    with device.log.recording() as log:
        call()
    if launches is not None:
        assert [operator for operator, _ in log.launches] == launches
    assert (len(log.synchronisations), len(log.copies)) == (synchronisations, copies)


def test_recordings_nest() -> None:
    with device.log.recording() as outer:
        DX + DX
        with device.log.recording() as inner:
            DX * DX
    assert [name for name, _ in inner.launches] == ["aten::mul.Tensor"]
    assert [name for name, _ in outer.launches] == ["aten::add.Tensor", "aten::mul.Tensor"]
