"""The contract between the networks and the hardware: what every backend computes, with fixed layouts.

Letters, here and in runtime/: B batch or slots, S query length, T flat tokens, K key length, H heads (of queries, where
G are those of keys and values), D head_dim, C channels, F feed-forward, V vocabulary, M mels, N samples, L frames or
samples, Z latent channels. Functions are pure unless the docstring names what they write. A backend never changes a
dtype beyond what is said here. `reference.py` is the contract as plain float32 PyTorch; a backend that lacks a fused
version names another backend's function, so that gaps can be counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# dtype of x: those of scale and bias that a backend's linear_int8 takes as they are. Networks hold them like that.
Int8Dtypes = Mapping[torch.dtype, tuple[torch.dtype, torch.dtype]]

SNAKE_CONTEXT = 5  # inputs on each side of a sample of anti_aliased_snake that it depends on


@dataclass(frozen=True, slots=True)
class ProductWeights:
    """What linear, or with a scale linear_int8, multiplies with."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of a decoder layer, q, k and v in one, gate and up in one; its caches [B_max, G, K_max, D]."""

    input_norm: Tensor
    qkv: ProductWeights
    o: ProductWeights
    post_norm: Tensor
    gate_up: ProductWeights
    down: ProductWeights
    keys: Tensor
    values: Tensor


# (x [B, C], cos [B, D], sin [B, D], lengths of B) -> (feed-forward output, residual), both [B, C]: see decode_layers.
DecodeLayers = Callable[[Tensor, Tensor, Tensor, Sequence[int]], tuple[Tensor, Tensor] | None]


class Kernels(Protocol):
    """One backend. Passed to the constructors of the networks, never looked up."""

    name: str
    int8_dtypes: Int8Dtypes

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias: [..., C_out]. x: [..., C_in]; weight: [C_out, C_in]; bias: [C_out]. One dtype."""
        ...

    def linear_int8(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return (x @ weight.T) * scale + bias in x.dtype: [..., C_out]. Weights in 8 bits, a scale an output channel.

        x: [..., C_in]; weight: [C_out, C_in] int8; scale, bias: [C_out], of any floating dtype; they may be
        rounded to those of int8_dtypes, which cost nothing. Sums run in float32; bfloat16 may round them once before
        the scale. Weights are never held in another form for longer than the call.
        """
        ...

    def linear_gelu_tanh(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return GELU(linear(x, weight, bias)) in the tanh form; whether the sum is rounded before is the backend's."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return RMSNorm(x) * weight, like x. x: [T, C]; weight: [C].

        The mean of squares runs in float32; the normed value is cast to x.dtype before the weight.
        Source: transformers Qwen2RMSNorm; arXiv 1910.07467.
        """
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return (normed, summed): summed = x + residual rounded to x.dtype, normed = rms_norm(summed, weight, eps)."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return LayerNorm(x) * weight + bias, like x. x: [..., C]; weight, bias: [C] in x.dtype or float32.

        An adaptive norm of a DiT is this function with weight = 1 + scale and bias = shift.
        """
        ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return x rotated in the half form: x * cos + rotate_half(x) * sin, contiguous. Does not write x.

        x: [B, S, H + G, D], q and k heads together, may be a strided view; cos, sin: [B or 1, S, 1, D] in x.dtype, both
        halves filled.
        """
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up: [T, F]. gate_up: [T, 2F], gate first, contiguous."""
        ...

    def gelu(self, x: Tensor) -> Tensor:
        """Return GELU(x) in the erf form, like x."""
        ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return softmax(scale * q k^T) v without a mask: [B, S, H, D].

        q: [B, S, H, D]; k, v: [B, K, H, D], of as many rows as q or of more. All may be strided views.
        """
        ...

    def key_mask(self, attended: Tensor, num_queries: int) -> Tensor:
        """Return the mask that masked_attention takes, in the backend's own form: once for all layers.

        attended: [K] bool on the device, True for the keys that all S = num_queries queries attend to, at least one.
        """
        ...

    def masked_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """Return attention() over the keys of a mask alone: [B, S, H, D]. q, k, v: as for attention; mask: of key_mask.

        For work that is captured once and replayed: takes nothing else from the host and never waits for the device.
        Keys that are not attended to must be finite, and so must their values.
        """
        ...

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
        """Write k and v into the caches. k, v: [T, G, D]; caches: [B, G, K_max, D], written in place.

        rows: [T * G] int64 on the device, the row of (token, kv head) in the cache seen as [B * G * K_max, D]; none
        stands twice.
        """
        ...

    def prefill_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: int, length: int, scale: float
    ) -> Tensor:
        """Return causal grouped-query attention of the last S tokens of one slot: [S, H, D].

        q: [S, H, D], the queries of positions length - S .. length - 1; caches: [B, G, K_max, D], of which slot's first
        `length` rows are read. Query head h reads kv head h // (H // G). The mask is anchored bottom-right.
        """
        ...

    def decode_attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int], scale: float) -> Tensor:
        """Return grouped-query attention of one token a slot: [B, H, D].

        q: [B, H, D] for slots 0 .. B - 1; caches: [B_max, G, K_max, D]; lengths: valid rows of each slot, the new
        token's own included, so at least 1. Rows past a length are not read. scale: above 0.
        """
        ...

    def decode_layers(self, layers: Sequence[LayerWeights], eps: float, scale: float) -> DecodeLayers | None:
        """Return a function that computes all layers of a decoder for one token a slot in one call, None without one.

        eps: of the norms; scale: of attention. The function takes embeddings, the rotary tables at the tokens'
        positions and lengths as decode_attention does, writes keys and values of the tokens into row length - 1 of the
        caches, and returns the last layer's feed-forward output and the residual stream, whose sum goes on. To the bit
        it is what the functions above give, one after the other. It returns None for a number of slots that it does
        not serve.
        """
        ...

    def step_mask(self, attended: Tensor) -> Tensor:
        """Return the mask that masked_decode_attention takes, in the backend's own form: once a step for all layers.

        attended: [B, K_max] bool on the device, True for the valid rows of each slot, at least one.
        """
        ...

    def masked_decode_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, bound: int, scale: float
    ) -> Tensor:
        """Return decode_attention for a step that is captured once and replayed: its lengths are a tensor.

        mask: from step_mask; bound: no row from `bound` on is attended, so none need be read. Takes nothing else from
        the host and never waits for the device.
        """
        ...

    def conv_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight or bias as this backend's conv1d reads it fastest: called once, after loading.

        dtype: that the products may run in; those of a backend that has none in it run in a wider one.
        """
        ...

    def transformed_weight(self, weight: Tensor, stride: int, groups: int) -> Tensor | None:
        """Return a second form of a weight from conv_weight, with which conv1d needs fewer products, None without one.

        Called once, after loading.
        """
        ...

    def conv1d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        transformed: Tensor | None = None,
    ) -> Tensor:
        """Return the 1-D convolution as torch.nn.functional.conv1d, in x's dtype: [B, C_out, L_out]. x: [B, C_in, L].

        The products run in the dtype of the weight, or in a wider one. transformed: what transformed_weight returned.
        """
        ...

    def conv_transpose1d(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int = 0) -> Tensor:
        """Return the transposed 1-D convolution: [B, C_out, (L - 1) * stride - 2 * padding + kernel].

        x: [B, C_in, L]; weight: [C_in, C_out, kernel]; bias: [C_out].
        """
        ...

    def anti_aliased_snake(
        self,
        x: Tensor,
        alpha: Tensor,
        inverse_beta: Tensor,
        up: tuple[float, ...],
        down: tuple[float, ...],
        starts: bool = True,
        ends: bool = True,
    ) -> Tensor:
        """Return SnakeBeta computed at twice the rate: [B, C, L].

        x: [B, C, L]; alpha, inverse_beta: [C]; up, down: 12 taps each, host constants.
        Upsample by 2 (replicate-pad 5 and 5, transposed convolution with `up`, times 2, crop 15 and 15), then
        x + sin(alpha * x)^2 * inverse_beta, then downsample by 2 (replicate-pad 5 and 6, convolution with `down`,
        stride 2).
        A sample depends on SNAKE_CONTEXT inputs on both sides. Where x is a piece from inside a signal (not `starts`,
        not `ends`), that many of its samples are context: the result is shorter by them and independent of the cut.
        Source: arXiv 2206.04658 (BigVGAN), section 3.2.
        """
        ...
