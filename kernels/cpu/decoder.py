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
        library.require_contiguous(*(cache for layer in layers for cache in (layer.keys, layer.values)))
        self._layers = (library.Layer * len(layers))(*map(self._layer, layers))
        first = layers[0]
        self._type, self._weights = library.TYPES[first.keys.dtype], _weights(first)
        _, kv_heads, max_length, head_dim = first.keys.shape
        hidden, wide = first.down.weight.shape
        self._sizes = (hidden, first.o.weight.shape[1] // head_dim, kv_heads, head_dim, wide, max_length)
        self._ours: dict[int, bool] = {}  # by numbers of rows

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Return the last layer's feed-forward output and the residual stream, None if PyTorch multiplies so many."""
        if not self._multiplies(len(lengths)):
            return None
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out, residual = torch.empty_like(x), torch.empty_like(x)
        pointers = (tensor.data_ptr() for tensor in (x, cos, sin))
        slots = library.valid_rows(lengths, self._sizes[-1])
        results = out.data_ptr(), residual.data_ptr()
        job = library.Decoder(
            self._layers, *pointers, slots, *results, len(self._layers), len(lengths), *self._sizes,
            self.eps, self.scale, self._type,
        )  # fmt: skip
        library.decoder(self.choice.instructions, job)
        return out, residual

    def _multiplies(self, rows: int) -> bool:
        """Return whether C multiplies that many rows in every product of a layer."""
        if rows not in self._ours:
            self._ours[rows] = all(self.choice.ours(rows, weight) for weight in self._weights)
        return self._ours[rows]

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
    """Return whether the library computes such layers: all their products, and attention with their heads."""
    first = layers[0]
    return first.keys.shape[-1] % library.HEAD_DIMS == 0 and all(
        library.multiplies(first.keys, weight) for weight in _weights(first)
    )


def _weights(layer: LayerWeights) -> list[Tensor]:
    return [product.weight for product in (layer.qkv, layer.o, layer.gate_up, layer.down)]
