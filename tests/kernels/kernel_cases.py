"""One table of cases for all backends: inputs that a wrong kernel cannot survive, the textbook result, and mutants.

A case names a function of the contract, makes its inputs for a dtype, states the result by a formula of its own in
float64, and lists wrong formulas that the comparison must refuse. Writers of caches return the caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    function: str
    inputs: Callable[[torch.Generator], Inputs]
    expected: Callable[..., Any]
    mutants: tuple[Callable[..., Any], ...]


def rows(generator: torch.Generator, *shape: int) -> Tensor:
    """Return normal values with one tiny, one huge and one shifted row."""
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    flat = x.view(-1, shape[-1])
    flat[0] *= 1e-3
    flat[1 % len(flat)] *= 50
    flat[2 % len(flat)] += 3
    return x


def gelu_rows(generator: torch.Generator) -> Tensor:
    """Return rows, one of them where the erf and tanh forms differ most and the values are small enough to show it."""
    x = rows(generator, 5, 33)
    x[4] = torch.linspace(-3.2, -2.0, 33)
    return x


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def int8_inputs(generator: torch.Generator) -> Inputs:
    """Return 8-bit weights with both ends of their range; scales of very different sizes, one of them 0."""
    weight = torch.randint(-127, 128, (37, 53), generator=generator, dtype=torch.int8)
    weight[0, 0], weight[36, 52] = 127, -127
    scale = torch.rand(37, generator=generator, dtype=torch.float64) / 64 + 1e-3
    scale[5], scale[7], scale[11] = 0.0, 1e-5, 3.0
    return {"x": rows(generator, 5, 53), "weight": weight, "scale": scale, "bias": normal(generator, 37)}


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("tc,oc->to", x, weight.double() * scale[:, None]) + bias


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, attended: Tensor | None = None) -> Tensor:
    """One head, loops over nothing: q [S, D], k, v [T, D], attended [S, T]."""
    scores = q @ k.T * scale
    if attended is not None:
        scores = torch.where(attended, scores, torch.tensor(-torch.inf, dtype=scores.dtype))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights @ v / weights.sum(-1, keepdim=True)


def full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> Tensor:
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril() if causal else None
    heads = [
        torch.stack([sdpa(q[b, :, h], k[b, :, h], v[b, :, h], scale, mask) for h in range(q.shape[2])], 1)
        for b in range(q.shape[0])
    ]
    return torch.stack(heads)


def grouped(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: int, length: int, scale: float,
    shift: int = 0, head: Callable[[int, int, int], int] = lambda h, H, G: h // (H // G),
) -> Tensor:  # fmt: skip
    """Causal grouped-query attention of the last S tokens of a slot. `shift` and `head` exist for the mutants."""
    S, H, _ = q.shape
    G = k_cache.shape[1]
    positions = torch.arange(length - S, length)[:, None]
    attended = torch.arange(length)[None] <= positions + shift
    return torch.stack(
        [
            sdpa(q[:, h], k_cache[slot, head(h, H, G), :length], v_cache[slot, head(h, H, G), :length], scale, attended)
            for h in range(H)
        ],
        1,
    )


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int], scale: float, **options: Any) -> Tensor:
    return torch.cat([grouped(q[b : b + 1], k_cache, v_cache, b, n, scale, **options) for b, n in enumerate(lengths)])


def rms(x: Tensor, weight: Tensor, eps: float, centre: float = 0.0, plus: float = 0.0) -> Tensor:
    x = x - centre * x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * (weight + plus)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, unbiased: bool = False) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=unbiased) + eps) * weight + bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """The two halves are the real and the imaginary part of D / 2 complex numbers."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos[..., :half], sign * sin[..., :half])
    return torch.cat((z.real, z.imag), -1)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    z = torch.complex(x[..., ::2], x[..., 1::2]) * torch.complex(cos[..., :half], sin[..., :half])
    return torch.stack((z.real, z.imag), -1).flatten(-2)


def angles(generator: torch.Generator, *shape: int) -> tuple[Tensor, Tensor]:
    half = torch.rand(*shape[:-1], shape[-1] // 2, generator=generator, dtype=torch.float64) * 2 * math.pi
    both = torch.cat((half, half), -1)
    return both.cos(), both.sin()


def rotary_inputs(generator: torch.Generator) -> Inputs:
    cos, sin = angles(generator, 1, 7, 1, 64)
    # A strided view, as the networks hand it over: the first 5 of 8 heads.
    return {"x": rows(generator, 2, 7, 8, 64)[:, :, :5], "cos": cos, "sin": sin}


def cache_inputs(generator: torch.Generator) -> Inputs:
    B, G, K_max, D, T = 3, 2, 11, 16, 4
    chosen = torch.randperm(B * G * K_max, generator=generator)[: T * G]
    return {
        "k": normal(generator, T, G, D),
        "v": normal(generator, T, G, D),
        "k_cache": normal(generator, B, G, K_max, D),
        "v_cache": normal(generator, B, G, K_max, D),
        "rows": chosen,
    }


def written(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor, swap: bool = False) -> Tensor:
    G, K_max, _ = k_cache.shape[1:]
    caches = torch.stack((k_cache, v_cache)).clone()
    for i, row in enumerate(rows.tolist()):
        b, g, p = row // (G * K_max), row // K_max % G, row % K_max
        t, h = i // G, (i % G if not swap else G - 1 - i % G)
        caches[0, b, g, p], caches[1, b, g, p] = k[t, h], v[t, h]
    return caches


def kv_inputs(generator: torch.Generator, **q_and_rest: Any) -> Inputs:
    caches = {name: normal(generator, 3, 2, 45, 64) for name in ("k_cache", "v_cache")}
    return {**q_and_rest, **caches, "scale": 64**-0.5}


def masked_inputs(generator: torch.Generator) -> Inputs:
    """Lengths of 17, 40 and 1 row under a bound of 40; what lies behind a length differs wildly from what is valid."""
    inputs = kv_inputs(generator, q=normal(generator, 3, 14, 64))
    attended = torch.arange(45) < torch.tensor([17, 40, 1])[:, None]
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.where(attended[:, None, :, None], inputs[name], 30 * inputs[name])
    return {**inputs, "attended": attended, "bound": 40}


def masked_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, attended: Tensor, bound: int, scale: float,
    head: Callable[[int, int, int], int] = lambda h, H, G: h // (H // G),
) -> Tensor:  # fmt: skip
    """Head by head, over the chosen rows alone."""
    H, G = q.shape[1], k_cache.shape[1]
    heads = [
        [sdpa(q[b, h, None], *(c[b, head(h, H, G)][attended[b]] for c in (k_cache, v_cache)), scale) for h in range(H)]
        for b in range(q.shape[0])
    ]
    return torch.stack([torch.cat(row) for row in heads])


def masked_keys_inputs(generator: torch.Generator) -> Inputs:
    """Of 13 keys three stand between others, and the last two, that are not attended to and differ wildly."""
    attended = torch.ones(13, dtype=torch.bool)
    attended[[2, 3, 7, 11, 12]] = False
    inputs = {name: normal(generator, 2, 13, 3, 64) for name in "qkv"}
    for name in "kv":
        inputs[name] = torch.where(attended[:, None, None], inputs[name], 30 * inputs[name])
    return {**inputs, "attended": attended, "scale": 0.125}


def chosen_keys(q: Tensor, k: Tensor, v: Tensor, attended: Tensor, scale: float) -> Tensor:
    """Over the chosen keys alone."""
    k, v = k[:, attended], v[:, attended]
    return torch.stack([torch.stack([sdpa(*each, scale) for each in zip(*row)], 1) for row in heads_of(q, k, v)])


def heads_of(*tensors: Tensor) -> list[list[Tensor]]:
    """Return [B, S, H, D] tensors as pieces [H, S, D], together for each row of the batch."""
    return [[x[b].transpose(0, 1) for x in tensors] for b in range(len(tensors[0]))]


def snake_textbook(
    x: Tensor, alpha: Tensor, inverse_beta: Tensor, up: tuple[float, ...], down: tuple[float, ...],
    gain: float = 2.0, edge: str = "replicate", beta_first: bool = False,
) -> Tensor:  # fmt: skip
    """Zero stuffing and direct sums, sample by sample; edges hold the first and last sample."""
    B, C, L = x.shape

    def at(signal: Tensor, i: int) -> Tensor:
        if edge == "zero" and not 0 <= i < signal.shape[-1]:
            return torch.zeros(B, C, dtype=x.dtype)
        return signal[..., min(max(i, 0), signal.shape[-1] - 1)]

    def upsampled(
        m: int,
    ) -> Tensor:  # sample m of the doubled signal: transposed convolution, cropped by 15, padded by 5
        taps = [(i, m + 15 - 2 * i) for i in range(L + 10) if 0 <= m + 15 - 2 * i < 12]
        return gain * sum((at(x, i - 5) * up[k] for i, k in taps), torch.zeros(B, C, dtype=x.dtype))

    y = torch.stack([upsampled(m) for m in range(2 * L)], -1)
    inner = torch.sin(alpha[:, None] * y) ** 2
    y = y + (
        inner * inverse_beta[:, None] if not beta_first else torch.sin(alpha[:, None] * y * inverse_beta[:, None]) ** 2
    )
    return torch.stack([sum(at(y, 2 * t + k - 5) * down[k] for k in range(12)) for t in range(L)], -1)


def snake_inputs(generator: torch.Generator) -> Inputs:
    taps = lambda: tuple((torch.rand(12, generator=generator) / 6).tolist())  # noqa: E731  asymmetric on purpose
    return {
        "x": rows(generator, 2, 5, 9),
        "alpha": normal(generator, 5).exp(),
        "inverse_beta": normal(generator, 5).exp(),
        "up": taps(),
        "down": taps(),
    }


def conv(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, dilation: int, groups: int, flip: bool = False
) -> Tensor:
    """Direct sum over taps and input channels of the group."""
    B, C, L = x.shape
    out_channels, per_group, K = weight.shape
    padded = torch.zeros(B, C, L + 2 * padding, dtype=x.dtype)
    padded[..., padding : padding + L] = x
    length = (L + 2 * padding - dilation * (K - 1) - 1) // stride + 1
    result = torch.zeros(B, out_channels, length, dtype=x.dtype) + bias[:, None]
    for o in range(out_channels):
        base = o // (out_channels // groups) * per_group
        for i in range(per_group):
            for k in range(K):
                samples = padded[:, base + i, k * dilation : k * dilation + stride * (length - 1) + 1 : stride]
                result[:, o] += samples * weight[o, i, K - 1 - k if flip else k]
    return result


def conv_transpose(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, shift: int = 0) -> Tensor:
    B, _, L = x.shape
    _, out_channels, K = weight.shape
    whole = torch.zeros(B, out_channels, (L - 1) * stride + K, dtype=x.dtype)
    for i in range(L):
        whole[..., i * stride : i * stride + K] += torch.einsum("bc,cok->bok", x[..., i], weight)
    start = padding + shift
    return whole[..., start : start + whole.shape[-1] - 2 * padding] + bias[:, None]


def erf_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def tanh_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


CASES = (
    Case(
        "linear",
        lambda g: {"x": rows(g, 5, 33), "weight": normal(g, 17, 33), "bias": normal(g, 17)},
        lambda x, weight, bias: torch.einsum("tc,oc->to", x, weight) + bias,
        (
            lambda x, weight, bias: torch.einsum("tc,oc->to", x, weight),
            lambda x, weight, bias: torch.einsum("tc,oc->to", x, weight.flip(1)) + bias,
        ),
    ),
    Case(
        "linear_int8",
        int8_inputs,
        int8_product,
        (
            lambda x, weight, scale, bias: int8_product(x, weight, scale, 0 * bias),
            lambda x, weight, scale, bias: int8_product(x, weight, scale.roll(1), bias),
            lambda x, weight, scale, bias: int8_product(x, weight, scale * 0 + scale.mean(), bias),
            lambda x, weight, scale, bias: (torch.einsum("tc,oc->to", x, weight.double()) + bias) * scale,
            lambda x, weight, scale, bias: int8_product(x, weight.to(torch.uint8), scale, bias),
            lambda x, weight, scale, bias: int8_product(x, weight.flip(1), scale, bias),
        ),
    ),
    Case(
        "rms_norm",
        lambda g: {"x": rows(g, 5, 96), "weight": normal(g, 96), "eps": 1e-6},
        rms,
        (
            lambda x, weight, eps: rms(x, torch.ones_like(weight), eps),
            lambda x, weight, eps: rms(x, weight, 1e-5),
            lambda x, weight, eps: rms(x, weight, 0.0),
            lambda x, weight, eps: rms(x, weight, eps, centre=1.0),
            lambda x, weight, eps: rms(x, weight, eps, plus=1.0),
        ),
    ),
    Case(
        "add_rms_norm",
        lambda g: {"x": rows(g, 5, 96), "residual": normal(g, 5, 96), "weight": normal(g, 96), "eps": 1e-6},
        lambda x, residual, weight, eps: (rms(x + residual, weight, eps), x + residual),
        (
            lambda x, residual, weight, eps: (rms(x + residual, weight, eps), residual),
            lambda x, residual, weight, eps: (rms(x, weight, eps), x + residual),
        ),
    ),
    Case(
        "layer_norm",
        lambda g: {"x": rows(g, 2, 3, 40), "weight": normal(g, 40), "bias": normal(g, 40), "eps": 1e-5},
        layer_norm,
        (
            lambda x, weight, bias, eps: layer_norm(x, weight, bias, 0.0),
            lambda x, weight, bias, eps: layer_norm(x, weight, bias, eps, unbiased=True),
            lambda x, weight, bias, eps: rms(x, weight, eps) + bias,
        ),
    ),
    Case(
        "rotary",
        rotary_inputs,
        rotate,
        (lambda x, cos, sin: rotate(x, cos, sin, sign=-1.0), rotate_interleaved),
    ),
    Case(
        "swiglu",
        lambda g: {"gate_up": rows(g, 5, 34)},
        lambda gate_up: gate_up[:, :17] / (1 + torch.exp(-gate_up[:, :17])) * gate_up[:, 17:],
        (lambda gate_up: gate_up[:, 17:] / (1 + torch.exp(-gate_up[:, 17:])) * gate_up[:, :17],),
    ),
    Case("gelu", lambda g: {"x": gelu_rows(g)}, erf_gelu, (tanh_gelu,)),
    Case(
        "linear_gelu_tanh",
        lambda g: {"x": rows(g, 5, 33), "weight": normal(g, 31, 33, scale=0.2), "bias": normal(g, 31)},
        lambda x, weight, bias: tanh_gelu(torch.einsum("tc,oc->to", x, weight) + bias),
        (
            lambda x, weight, bias: tanh_gelu(torch.einsum("tc,oc->to", x, weight)) + bias,
            lambda x, weight, bias: torch.einsum("tc,oc->to", x, weight) + bias,
        ),
    ),
    Case(  # sums that no dtype rounds, so that the form shows in each
        "linear_gelu_tanh",
        lambda g: {"x": gelu_rows(g), "weight": torch.eye(33, dtype=torch.float64)[:31], "bias": torch.zeros(31)},
        lambda x, weight, bias: tanh_gelu(x[:, :31]),
        (lambda x, weight, bias: erf_gelu(x[:, :31]),),
    ),
    Case(
        "attention",
        lambda g: {**{n: normal(g, 2, 13, 3, 64) for n in "qkv"}, "scale": 0.125},
        full_attention,
        (
            lambda q, k, v, scale: full_attention(q, k, v, 1.0),
            lambda q, k, v, scale: full_attention(q, k, v, scale, causal=True),
            lambda q, k, v, scale: full_attention(q, k[:, :-1], v[:, :-1], scale),
        ),
    ),
    Case(  # more keys than queries
        "attention",
        lambda g: {"q": normal(g, 2, 5, 3, 64), **{n: normal(g, 2, 13, 3, 64) for n in "kv"}, "scale": 0.125},
        full_attention,
        (
            lambda q, k, v, scale: full_attention(q, k, v, 1.0),
            lambda q, k, v, scale: full_attention(q, k[:, :5], v[:, :5], scale),
            lambda q, k, v, scale: full_attention(q, k[:, -5:], v[:, -5:], scale),
        ),
    ),
    Case(
        "masked_attention",
        masked_keys_inputs,
        chosen_keys,
        (
            lambda **inputs: chosen_keys(**{**inputs, "attended": inputs["attended"].logical_not()}),
            lambda **inputs: chosen_keys(**{**inputs, "attended": torch.ones_like(inputs["attended"])}),
            lambda **inputs: chosen_keys(**{**inputs, "attended": inputs["attended"].roll(1)}),
            lambda **inputs: chosen_keys(**{**inputs, "scale": 1.0}),
        ),
    ),
    Case("write_kv", cache_inputs, written, (lambda **inputs: written(**inputs, swap=True),)),
    *(
        Case(
            "prefill_attention",
            lambda g, new=new: kv_inputs(g, q=normal(g, new, 14, 64), slot=1, length=37),
            grouped,
            (
                lambda **inputs: grouped(**inputs, shift=-1 if inputs["q"].shape[0] < 37 else 1),
                lambda **inputs: grouped(**inputs, shift=99),
                lambda **inputs: grouped(**inputs, head=lambda h, H, G: h % G),
                lambda **inputs: grouped(**{**inputs, "slot": 0}),
            ),
        )
        for new in (37, 6)
    ),
    Case(
        "decode_attention",
        lambda g: kv_inputs(g, q=normal(g, 3, 14, 64), lengths=[17, 45, 1]),
        decode,
        (
            lambda **inputs: decode(**inputs, head=lambda h, H, G: h % G),
            lambda **inputs: decode(**{**inputs, "lengths": [17, 44, 1]}),
            lambda **inputs: decode(**{**inputs, "scale": 1.0}),
        ),
    ),
    Case(
        "masked_decode_attention",
        masked_inputs,
        masked_decode,
        (
            lambda **inputs: masked_decode(**inputs, head=lambda h, H, G: h % G),
            lambda **inputs: masked_decode(**{**inputs, "attended": inputs["attended"].logical_not()}),
            lambda **inputs: masked_decode(**{**inputs, "attended": torch.ones_like(inputs["attended"])}),
            lambda **inputs: masked_decode(**{**inputs, "scale": 1.0}),
        ),
    ),
    Case(
        "conv1d",
        lambda g: {
            "x": rows(g, 2, 6, 19),
            "weight": normal(g, 4, 3, 5),
            "bias": normal(g, 4),
            "stride": 2,
            "padding": 3,
            "dilation": 2,
            "groups": 2,
        },
        conv,
        (lambda **inputs: conv(**inputs, flip=True), lambda **inputs: conv(**{**inputs, "bias": inputs["bias"] * 0})),
    ),
    Case(
        "conv_transpose1d",
        lambda g: {
            "x": rows(g, 2, 6, 9),
            "weight": normal(g, 6, 4, 8),
            "bias": normal(g, 4),
            "stride": 4,
            "padding": 2,
        },
        conv_transpose,
        (
            lambda **inputs: conv_transpose(**inputs, shift=1),
            lambda **inputs: conv_transpose(**{**inputs, "weight": inputs["weight"].flip(2)}),
        ),
    ),
    Case(
        "anti_aliased_snake",
        snake_inputs,
        snake_textbook,
        (
            lambda **inputs: snake_textbook(**inputs, gain=1.0),
            lambda **inputs: snake_textbook(**inputs, edge="zero"),
            lambda **inputs: snake_textbook(**inputs, beta_first=True),
            lambda **inputs: snake_textbook(**{**inputs, "up": inputs["up"][::-1]}),
            lambda **inputs: snake_textbook(**{**inputs, "down": inputs["down"][::-1]}),
        ),
    ),
)
