"""The contract of interface.py on CPUs: decoding, attention, the activation and convolutions in C, all else PyTorch's.

The C code is one shared library, built when covo-npu is installed if there is a C compiler; csrc/covo.h is a good
first read. Without it `native` serves, and library.missing() says why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from covo_npu.kernels import native
from covo_npu.kernels.cpu import decoder, library, winograd
from covo_npu.kernels.cpu.choice import Choice
from covo_npu.kernels.interface import DecodeLayers, Int8Dtypes, LayerWeights


class CPU:
    """The backend `cpu`: a Kernels. choice: which implementation multiplies what, and with which instructions.

    With the same choice a machine gives the same bits, for any number of threads. A row of a product does not depend on
    the other rows: in C it does not even depend on how many there are, up to where Choice goes over to PyTorch. But
    for weights in 8 bits on AMX: from 11 rows on, and beside a row that is not finite, sums are others.
    """

    name = "cpu"
    int8_dtypes: Int8Dtypes = native.int8_dtypes

    linear_gelu_tanh = staticmethod(native.linear_gelu_tanh)
    layer_norm = staticmethod(native.layer_norm)
    gelu = staticmethod(native.gelu)
    key_mask = staticmethod(native.key_mask)
    masked_attention = staticmethod(native.masked_attention)
    write_kv = staticmethod(native.write_kv)
    prefill_attention = staticmethod(native.prefill_attention)
    step_mask = staticmethod(native.step_mask)
    masked_decode_attention = staticmethod(native.masked_decode_attention)
    conv_weight = staticmethod(native.conv_weight)
    transformed_weight = staticmethod(winograd.transformed_weight)
    conv_transpose1d = staticmethod(native.conv_transpose1d)

    def __init__(self, choice: Choice | None = None) -> None:
        self.choice = choice or Choice.unmeasured()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Weights of 16 bits are read where they lie, once for all rows; float32 is PyTorch's."""
        if library.multiplies(x, weight) and self.choice.ours(_num_rows(x), weight):
            return library.linear(self.choice.instructions, x, weight, None, bias)
        return native.linear(x, weight, bias)

    def linear_int8(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        """The weights are read where they lie, once for all rows; where that does not pay, native makes them wider."""
        if self.choice.ours(_num_rows(x), weight):
            return library.linear(self.choice.instructions, x, weight, scale, bias)
        return native.linear_int8(x, weight, scale, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """One pass in C, where PyTorch's operators make nine."""
        return library.rms_norm(self.choice.instructions, x, None, weight, eps)[0]

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return library.rms_norm(self.choice.instructions, x, residual, weight, eps)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return library.rotary(self.choice.instructions, x, cos, sin)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return library.swiglu(self.choice.instructions, gate_up)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Scores never leave the caches, in bfloat16 on an x86-64 that multiplies it; everything else is native's."""
        best = self.choice.instructions
        if library.attends(best, q, k) and scale > 0:
            return library.attention(best, q, k, v, scale)
        return native.attention(q, k, v, scale)

    def decode_attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int], scale: float) -> Tensor:
        """Scores, weights and sums in float32. Each slot reads its own rows alone, in chunks for all threads."""
        if q.shape[-1] % library.HEAD_DIMS:
            return native.decode_attention(q, k_cache, v_cache, lengths, scale)
        return library.decode_attention(self.choice.instructions, q, k_cache, v_cache, lengths, scale)

    def decode_layers(self, layers: Sequence[LayerWeights], eps: float, scale: float) -> DecodeLayers | None:
        """Without Python between the products, where it would find none of its own memory in a cache."""
        return decoder.Layers(self.choice, layers, eps, scale) if decoder.serves(layers) else None

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
        """Float32 by Winograd's way where that gains, with half the products; everything else is native's."""
        length = x.shape[-1] + 2 * padding - dilation * (weight.shape[-1] - 1)
        if transformed is None or not winograd.serves(x, weight, length, dilation):
            return native.conv1d(x, weight, bias, stride, padding, dilation, groups)
        padded = F.pad(x, (padding, 0)) if padding else x  # a copy even by nothing
        return winograd.conv1d(self.choice.instructions, padded, transformed, bias, length, dilation)

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
        """In float32 a channel is read and written once; what is between stays in the first cache."""
        arguments = (x, alpha, inverse_beta, up, down, starts, ends)
        if x.dtype != torch.float32:
            return native.anti_aliased_snake(*arguments)
        return library.anti_aliased_snake(self.choice.instructions, *arguments)


def _num_rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)
