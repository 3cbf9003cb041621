"""All layers of a decode step in one call of the C library: to the bit what its functions give one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from covo_npu.kernels.cpu import library
from covo_npu.kernels.cpu.choice import Choice
from covo_npu.kernels.interface import LayerWeights, ProductWeights


class Layers:
    """A DecodeLayers of interface.py. Holds the weights and caches that the library is given the addresses of."""

    def __init__(self, choice: Choice, layers: Sequence[LayerWeights], eps: float, scale: float) -> None:
        self.choice, self.eps, self.scale = choice, eps, scale
        self._held: list[Tensor] = []
        self._layers = (library.Layer * len(layers))(*map(self._layer, layers))
        first = layers[0]
        self.dtype, self._products = first.keys.dtype, (first.qkv, first.o, first.gate_up, first.down)
        _, kv_heads, max_length, head_dim = first.keys.shape
        hidden, wide = first.down.weight.shape
        self._sizes = (hidden, first.o.weight.shape[1] // head_dim, kv_heads, head_dim, wide, max_length)
        self._served: dict[int, bool] = {}

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor] | None:
        """Return the last layer's feed-forward output and the residual stream, None if PyTorch multiplies so many."""
        if not self._serves(len(lengths)):
            return None
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out, residual = torch.empty_like(x), torch.empty_like(x)
        pointers = (tensor.data_ptr() for tensor in (x, cos, sin))
        slots = (library.Long * len(lengths))(*lengths)
        results = out.data_ptr(), residual.data_ptr()
        job = library.Decoder(
            self._layers, *pointers, slots, *results, len(self._layers), len(lengths), *self._sizes,
            self.eps, self.scale, library.TYPES[self.dtype],
        )  # fmt: skip
        library.decoder(self.choice.instructions, job)
        return out, residual

    def _serves(self, rows: int) -> bool:
        """Return whether C multiplies that many rows in every product of a layer."""
        if rows not in self._served:
            self._served[rows] = all(self.choice.ours(rows, product.weight) for product in self._products)
        return self._served[rows]

    def _layer(self, layer: LayerWeights) -> library.Layer:
        products = (self._product(p, layer.keys.dtype) for p in (layer.qkv, layer.o, layer.gate_up, layer.down))
        norms = (self._address(norm.to(layer.keys.dtype)) for norm in (layer.input_norm, layer.post_norm))
        return library.Layer(*norms, *products, self._address(layer.keys), self._address(layer.values))

    def _product(self, product: ProductWeights, dtype: torch.dtype) -> library.ProductWeights:
        weight, scale, bias = product.weight, product.scale, product.bias
        addresses = [
            self._address(weight),
            None if bias is None else self._address(bias.to(dtype)),
            None if scale is None else self._address(scale.float()),
        ]
        return library.ProductWeights(*addresses, library.TYPES[weight.dtype])

    def _address(self, tensor: Tensor) -> int:
        self._held.append(tensor.contiguous())
        return self._held[-1].data_ptr()


def serves(layers: Sequence[LayerWeights]) -> bool:
    """Return whether the library computes such layers: weights of 16 or 8 bits, heads that its attention takes."""
    dtype, head_dim = layers[0].keys.dtype, layers[0].keys.shape[-1]
    types = {getattr(layers[0], name).weight.dtype for name in ("qkv", "o", "gate_up", "down")}
    return (
        dtype in (torch.bfloat16, torch.float16) and head_dim % library.HEAD_DIMS == 0 and types <= {dtype, torch.int8}
    )
