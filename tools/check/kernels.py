"""covo-check kernels: every kernel of a backend on its device, at sizes of the real model, against plain float32.

The largest error is shown whatever the verdict. The bounds are a device's: they let pass what vector units approximate
and in which order sums are taken, and no fault of a layout, a mask, a scale or an index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from covo_npu.kernels import reference
from covo_npu.kernels.device import open_device
from covo_npu.kernels.errors import first_line
from covo_npu.kernels.interface import Kernels
from covo_npu.kernels.masked import TOLERANCES, masked_attention_error, masked_keys_error
from covo_npu.kernels.select import describe, select
from covo_npu.runtime.checkpoint.config import LLMConfig
from covo_npu.runtime.networks.cache import allocate
from covo_npu.runtime.networks.files import fill
from covo_npu.runtime.networks.qwen2 import Qwen2
from covo_npu.tools.check.result import Finding, Result, Subject, below, check

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 28, 4, 128, 3584  # the decoder's
ENCODER, DIT = (1, 1500, 20, 64), (2, 700, 16, 64)  # [B, S, H, D] of attention: 30 s, and 7 s of speech
MAX_LENGTH = 8192
LENGTHS = (1, 511, 513, 1500, 4097, 8000)  # around and far beyond the tiles of attention kernels
BOUNDS = (512, 1024, 2048, 4096, 8192)  # of captured steps
FRAMES = (1280, 1536, 2048)  # of captured evaluations of flow matching: usual blocks after the published prompt
TAPS = tuple(0.02 * (k + 1) for k in range(12))
# Relative to the largest value of a row of the result. float32: what torch_npu's own tests accept (assertRtolEqual); 16
# bits: four roundings.
ALLOWED = {torch.float32: 1e-4, torch.float16: 4 * 2**-11, torch.bfloat16: 4 * 2**-8}
HALF, ALL = (torch.bfloat16,), (torch.float32, torch.bfloat16)

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a kernel. inputs: tensors in float32, cast to each of dtypes; integers stay."""

    name: str
    function: str
    inputs: Callable[[Callable[..., Tensor]], Inputs]
    dtypes: tuple[torch.dtype, ...] = ALL


def _cases() -> Iterator[Case]:
    yield Case("linear", "linear", lambda r: {"x": r(5, HIDDEN), "weight": r(4608, HIDDEN) / 60, "bias": r(4608)})
    for rows in (1, 300):
        yield Case(f"linear_int8, {rows} rows", "linear_int8", partial(_int8, rows=rows))
    yield Case("rms_norm", "rms_norm", lambda r: {"x": 3 * r(5, HIDDEN), "weight": r(HIDDEN), "eps": 1e-6})
    yield Case(
        "add_rms_norm", "add_rms_norm",
        lambda r: {"x": r(5, HIDDEN), "residual": r(5, HIDDEN), "weight": r(HIDDEN), "eps": 1e-6},
    )  # fmt: skip
    yield Case(
        "layer_norm", "layer_norm",
        lambda r: {"x": 2 + r(2, 300, 1024), "weight": r(1024), "bias": r(1024), "eps": 1e-6},
    )  # fmt: skip
    for name, heads, dim in (("decoder", HEADS + KV_HEADS, HEAD_DIM), ("DiT", 16, 64)):
        yield Case(f"rotary, {name}", "rotary", partial(_rotary, heads=heads, dim=dim))
    yield Case("swiglu", "swiglu", lambda r: {"gate_up": r(5, 2 * 18944)})
    yield Case("gelu", "gelu", lambda r: {"x": 2 * r(1500, 1280)})
    yield Case(
        "linear_gelu_tanh", "linear_gelu_tanh",
        lambda r: {"x": r(300, 1024), "weight": r(4096, 1024) / 32, "bias": r(4096)},
    )  # fmt: skip
    for name, shape in (("encoder", ENCODER), ("DiT", DIT)):
        yield Case(f"attention, {name}", "attention", partial(_attention, shape=shape))
    yield Case("write_kv", "write_kv", lambda r: {**_caches(r, 2), **_rows(r)})
    for queries, length in ((600, 600), (40, 1500)):
        inputs = partial(_prefill, queries=queries, length=length)
        yield Case(f"prefill_attention, {queries} of {length}", "prefill_attention", inputs)
    yield Case(
        f"decode_attention, {', '.join(map(str, LENGTHS))}", "decode_attention",
        lambda r: {**_caches(r, len(LENGTHS)), "q": r(len(LENGTHS), HEADS, HEAD_DIM), "lengths": list(LENGTHS),
                   "scale": HEAD_DIM**-0.5},
    )  # fmt: skip
    yield Case(
        "conv1d",
        "conv1d",
        lambda r: {"x": r(1, 128, 3000), "weight": r(1280, 128, 3) / 20, "bias": r(1280), "padding": 1},
    )
    for batch, channels, frames, rate in ((1, 1536, 128, 5), (2, 768, 640, 3), (1, 768, 5120, 3)):
        inputs = partial(_transposed, batch=batch, channels=channels, frames=frames, rate=rate)
        name = f"conv_transpose1d, {batch} of {channels} channels, {frames} frames"
        yield Case(name, "conv_transpose1d", inputs, (torch.float32,))
    yield Case(
        "anti_aliased_snake", "anti_aliased_snake",
        lambda r: {"x": r(2, 24, 3000), "alpha": r(24).exp(), "inverse_beta": r(24).exp(), "up": TAPS,
                   "down": TAPS[::-1]},
        (torch.float32,),
    )  # fmt: skip


def _int8(random: Callable[..., Tensor], rows: int) -> Inputs:
    weight = (40 * random(4608, HIDDEN)).clamp(-127, 127).to(torch.int8)
    scale = (1 + random(4608).abs()) / (40 * 60)
    return {"x": random(rows, HIDDEN), "weight": weight, "scale": scale, "bias": random(4608)}


def _rotary(random: Callable[..., Tensor], heads: int, dim: int) -> Inputs:
    angle = 10 * random(1, 7, 1, dim // 2)
    angle = torch.cat((angle, angle), -1)
    return {"x": random(1, 7, heads, dim), "cos": angle.cos(), "sin": angle.sin()}


def _attention(random: Callable[..., Tensor], shape: tuple[int, ...]) -> Inputs:
    return {**{name: random(*shape) for name in "qkv"}, "scale": shape[-1] ** -0.5}


def _prefill(random: Callable[..., Tensor], queries: int, length: int) -> Inputs:
    q = random(queries, HEADS, HEAD_DIM)
    return {**_caches(random, 2), "q": q, "slot": 1, "length": length, "scale": HEAD_DIM**-0.5}


def _transposed(random: Callable[..., Tensor], batch: int, channels: int, frames: int, rate: int) -> Inputs:
    weight = random(channels, 64, 2 * rate) / 50
    return {"x": random(batch, channels, frames), "weight": weight, "bias": random(64), "stride": rate}


def _caches(random: Callable[..., Tensor], slots: int) -> Inputs:
    return {name: random(slots, KV_HEADS, MAX_LENGTH, HEAD_DIM) for name in ("k_cache", "v_cache")}


def _rows(random: Callable[..., Tensor]) -> Inputs:
    positions = torch.arange(100, 107)[:, None] + MAX_LENGTH * torch.arange(KV_HEADS)
    return {"k": random(7, KV_HEADS, HEAD_DIM), "v": random(7, KV_HEADS, HEAD_DIM), "rows": positions.view(-1)}


def findings(kernels: Kernels, device: torch.device) -> Iterator[Finding]:
    """Yield one finding for each case and dtype, one for each size of a mask that captured work has, one for layers."""
    for case in _cases():
        for dtype in case.dtypes:
            name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
            try:
                error = _error(kernels, device, case, dtype)
            except RuntimeError as refusal:
                yield Finding(name, f"refused: {first_line(refusal)}", "runs", "", False)
                continue
            yield below(name, error, ALLOWED[dtype], "of the row's largest value", ".1e")
    cache = torch.empty(1, KV_HEADS, MAX_LENGTH, HEAD_DIM, dtype=torch.bfloat16, device=device)
    q = torch.empty(1, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    for bound in BOUNDS:
        error = masked_attention_error(kernels, q, cache, bound)
        yield below(f"masked_decode_attention, {bound} rows", error, TOLERANCES[q.dtype], "against lengths", ".1e")
    for frames in FRAMES:
        q = torch.empty(2, frames, *DIT[2:], dtype=torch.bfloat16, device=device)
        error = masked_keys_error(kernels, q)
        yield below(f"masked_attention, {frames} frames", error, TOLERANCES[q.dtype], "against lengths", ".1e")
    if (differs := _layers_differ(kernels, device)) is not None:
        found = "another result" if differs else "the same bits"
        yield Finding("decode_layers in one call", found, "the same bits", "as one after the other", not differs)


def _layers_differ(kernels: Kernels, device: torch.device) -> bool | None:
    """Return whether a layer in one call gives other bits than its kernels one after the other; None without the call.

    Sizes are the decoder's, but for a narrow feed-forward part.
    """
    config = LLMConfig(1, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, 2048, 64, 1e-6, 1e6, MAX_LENGTH)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        llm = Qwen2(config, kernels, torch.bfloat16)
    tensors = {name: torch.randn(t.shape, generator=generator) / 60 for name, t in llm.state_dict().items()}
    fill(llm, {name: tensor.to(device) for name, tensor in tensors.items()})
    ids, lengths = torch.arange(len(LENGTHS), device=device), list(LENGTHS)
    positions = torch.tensor(lengths, device=device) - 1
    found = []
    for at_once in (True, False):
        cache = allocate(config, len(lengths), MAX_LENGTH, torch.bfloat16, device)
        layers = llm.in_one_call(cache) if at_once else None
        if at_once and not layers:
            return None
        logits = llm.decode(ids, positions, lengths, cache, layers)
        found.append((logits, *cache.keys, *cache.values))
    return not all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def _error(kernels: Kernels, device: torch.device, case: Case, dtype: torch.dtype) -> float:
    """Return the largest error of a case, relative to its row's largest value. Both get the same rounded inputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = case.inputs(random)
    rounded = {name: x.to(dtype) if _floats(x) else x for name, x in inputs.items()}
    there = {name: x.to(device, copy=True) if isinstance(x, Tensor) else x for name, x in rounded.items()}
    wide = {name: x.float() if _floats(x) else x for name, x in rounded.items()}
    if case.function == "conv1d":  # as layers have it
        there["transformed"] = kernels.transformed_weight(there["weight"], 1, 1)
    expected = _results(getattr(reference, case.function)(**wide), wide)
    found = _results(getattr(kernels, case.function)(**there), there)
    errors = [_relative(a.float().cpu(), b) for a, b in zip(found, expected, strict=True)]
    return float(torch.tensor(errors).max())  # NaN, if there is one: Python's max may pass over it


def _relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value of the same row of the first dimension."""
    error, value = ((x.flatten(1).abs().amax(1)) for x in (found - expected, expected))
    return float((error / value).max())


def _floats(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _results(result: Tensor | tuple[Tensor, ...] | None, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return what a kernel gives as a tuple; a writer of caches gives the caches."""
    if result is None:
        return inputs["k_cache"], inputs["v_cache"]
    return result if isinstance(result, tuple) else (result,)


@torch.inference_mode()
def examine(subject: Subject) -> Result:
    """Return the findings of all cases."""
    device = open_device(subject.options.device)
    kernels = select(subject.options.backend, device)
    return Result("kernels", f"{device}, {describe(kernels)}", tuple(findings(kernels, device)))


@check("kernels", ckpt=None, loading=("device", "backend"))
def command(subject: Subject) -> Result:
    """Compare every kernel on the device with plain float32, at sizes of the real model; needs no checkpoint."""
    return examine(subject)
