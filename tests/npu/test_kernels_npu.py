"""The npu backend on the device against the textbook cases of all backends, and against faults of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from emulation import device as emulated
from kernels.kernel_cases import CASES, Case
from kernels.test_kernels import DTYPES, as_tensor, bounds, prepared, run, within
from torch import Tensor

from covo_npu.kernels import device, npu, select

DEVICE = device.open_device("npu:0")


def to_device(value: Any) -> Any:
    """Return a tensor on the device with the strides that it has on the host; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    storage = torch.empty(value.untyped_storage().nbytes() // value.element_size(), dtype=value.dtype)
    storage.copy_(torch.as_strided(value, (storage.numel(),), (1,), 0))
    return storage.to(DEVICE).as_strided(value.size(), value.stride(), value.storage_offset())


def on_device(backend: Any) -> SimpleNamespace:
    """Return a backend that takes and gives host tensors and computes on the device."""

    def wrapped(name: str) -> Any:
        def call(**inputs: Any) -> Any:
            there = {key: to_device(value) for key, value in inputs.items()}
            result = getattr(backend, name)(**there)
            for key, value in inputs.items():  # what was written there is written here: run() looks for it
                if isinstance(value, Tensor) and value.numel():
                    value.copy_(there[key].cpu())
            if isinstance(result, tuple):
                return tuple(part.cpu() for part in result)
            return None if result is None else result.cpu()

        return call

    return SimpleNamespace(**{name: wrapped(name) for name in select.FUNCTIONS})


def meets_the_textbook(backend: Any, case: Case, dtype: torch.dtype) -> bool:
    inputs, exact = prepared(case, dtype)
    expected = as_tensor(case.expected(**exact))
    found = run(on_device(backend), case, inputs)
    assert found.dtype == dtype and found.shape == expected.shape
    return within(found, expected, bounds(case, dtype, inputs, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.function)
def test_npu_computes_the_textbook(case: Case, dtype: torch.dtype) -> None:
    assert meets_the_textbook(npu, case, dtype)


def mutated(**functions: Any) -> SimpleNamespace:
    return SimpleNamespace(**{name: getattr(npu, name) for name in select.FUNCTIONS} | functions)


def swapped_halves(gate_up: Tensor) -> Tensor:
    return torch_npu.npu_swiglu(torch.cat(gate_up.chunk(2, -1)[::-1], -1), dim=-1)


def sum_second(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, _, summed = torch_npu.npu_add_rms_norm(x, residual, weight, eps)
    return summed, normed


def anchored_top_left(q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: int, length: int, scale: float) -> Tensor:
    attend = torch_npu.npu_fused_infer_attention_score
    k, v = k_cache[slot : slot + 1], v_cache[slot : slot + 1]
    out = attend(
        q.transpose(0, 1)[None].contiguous(), k, v, input_layout="BNSD_BSND", scale=scale, num_heads=q.shape[1],
        num_key_value_heads=k.shape[1], actual_seq_lengths_kv=[length], sparse_mode=2,
        atten_mask=npu._compressed_mask(q.device),
    )  # fmt: skip
    return out[0][0]


def all_rows(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int], scale: float) -> Tensor:
    return npu.decode_attention(q, k_cache, v_cache, [k_cache.shape[2]] * len(lengths), scale)


def swapped_caches(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
    npu.write_kv(v, k, k_cache, v_cache, rows)


MUTANTS = {
    "linear_int8": lambda x, weight, scale, bias: npu.linear_int8(x, weight, scale.roll(1), bias),
    "gelu": F.gelu,  # the tanh form on the device
    "swiglu": swapped_halves,
    "add_rms_norm": sum_second,
    "prefill_attention": anchored_top_left,
    "decode_attention": all_rows,
    "write_kv": swapped_caches,
    "rotary": lambda x, cos, sin: npu.rotary(x, cos, -sin),
    "rms_norm": lambda x, weight, eps: npu.rms_norm(x, weight, 1e-3),
    "layer_norm": lambda x, weight, bias, eps: npu.layer_norm(x, 1 + weight, bias, eps),
    "attention": lambda q, k, v, scale: npu.attention(q, k, v, 1.1 * scale),
    "masked_attention": lambda q, k, v, mask, scale: npu.masked_attention(q, k, v, ~mask, scale),
    "anti_aliased_snake": lambda x, alpha, inverse_beta, up, down: npu.anti_aliased_snake(
        x, alpha, inverse_beta, up[::-1], down
    ),
}


@pytest.mark.parametrize("function", MUTANTS)
def test_faults_that_the_device_makes_easy_are_caught(function: str) -> None:
    case = [case for case in CASES if case.function == function][-1]  # of the two prefills that with a longer cache
    dtype = torch.float16 if function in ("gelu", "prefill_attention", "decode_attention") else torch.bfloat16
    assert not meets_the_textbook(mutated(**{function: MUTANTS[function]}), case, dtype)


@pytest.mark.parametrize(("channels", "products"), [(65535, 1), (65536, 2), (168055, 3)])
@torch.inference_mode()
def test_more_channels_than_one_product_takes_are_several(channels: int, products: int) -> None:
    """Channel by channel: x is one, so that each result is a number times its scale, both exact in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (channels, 32), generator=generator, dtype=torch.int8)
    scale = 2.0 ** torch.randint(-9, 3, (channels,), generator=generator)
    bias = torch.arange(channels).remainder(7).float()
    x = torch.eye(3, 32, dtype=torch.bfloat16)  # picks the first three numbers of each channel
    there = [tensor.to(DEVICE) for tensor in (x, weight, scale.bfloat16())]
    with emulated.log.recording() as log:
        found = npu.linear_int8(*there).cpu()
        with_bias = npu.linear_int8(*there, bias.to(DEVICE)).cpu()
    assert torch.equal(found.float(), weight[:, :3].T * scale)
    assert torch.equal(with_bias, (weight[:, :3].T * scale + bias).bfloat16())
    assert sum("weight_quant" in operator for operator, _ in log.launches) == 2 * products


def test_one_product_of_all_channels_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu, "MOST_INT8_CHANNELS", 10**6)
    x, weight, scale = (torch.ones(*shape, device=DEVICE) for shape in ((1, 32), (65536, 32), (65536,)))
    with pytest.raises(RuntimeError, match=r"K and N 1\.\.65535"):
        npu.linear_int8(x.bfloat16(), weight.to(torch.int8), scale.bfloat16())


def test_every_function_is_there() -> None:
    assert all(callable(getattr(npu, name)) for name in select.FUNCTIONS)
    assert select.select(None, DEVICE) is npu
    assert select.describe(npu) == f"npu ({len(select.FUNCTIONS) - 1} npu, 1 native)"
