"""What all dialogues begin with, the system prompt: its rows of the KV cache, computed once for a checkpoint.

The rows in a checkpoint are those of float32 arithmetic on the stored weights, rounded once to the weights' dtype: as
near to the exact ones as that dtype allows. A model that runs in it starts from them. Rows that a network computes in
half precision have been rounded after every operator, and differ from device to device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from covo_npu.kernels.select import select
from covo_npu.runtime import prompt
from covo_npu.runtime.checkpoint.config import LLMConfig
from covo_npu.runtime.checkpoint.format import PREFIX, TOKENIZER, CheckpointError, Manifest
from covo_npu.runtime.checkpoint.loader import load_tensors
from covo_npu.runtime.networks.cache import allocate
from covo_npu.runtime.networks.files import LLM_PREFIX, fill, meta_networks
from covo_npu.runtime.networks.qwen2 import DecoderLayer, joined_layer
from covo_npu.runtime.tokenizer import Tokenizer

INPUT_IDS, KEYS, VALUES = "prefix.input_ids", "prefix.keys", "prefix.values"  # the tensors of the file
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """The first ids of a dialogue, P of them, and their rows: keys, values [layers, G, P, D], of one dtype."""

    input_ids: tuple[int, ...]
    keys: Tensor
    values: Tensor

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """The rows as KVCache.read() gives them."""
        return *self.keys.unbind(), *self.values.unbind()

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Prefix:
        """Return the prefix on a device and in a dtype; None: as it is."""
        keys, values = (rows.to(device=device, dtype=dtype) for rows in (self.keys, self.values))
        return Prefix(self.input_ids, keys, values)

    def tensors(self) -> dict[str, Tensor]:
        """Return what the file of a checkpoint holds."""
        return {INPUT_IDS: torch.tensor(self.input_ids), KEYS: self.keys, VALUES: self.values}


@torch.inference_mode()
def computed_prefix(manifest: Manifest, advance: Callable[[int], object] = lambda count: None) -> Prefix:
    """Return the prefix with the default system prompt, in float32: weights, products, sums.

    The weights are mapped, and become float32 for the length of their product: that of the largest is the memory it
    takes, 0.54 GB at the real size, and 0.47 GB more for a layer that ranks share. How many they are makes no
    difference to the rows. advance: told of the bytes of each layer when it is done. Raises CheckpointError if the
    weights are damaged.
    """
    tokenizer = Tokenizer.from_file(manifest.folder / TOKENIZER, manifest.special_tokens)
    input_ids = prompt.shared(tokenizer, prompt.DEFAULT_SYSTEM_PROMPT)
    reference = select("reference", CPU)
    config, dtype = replace(manifest.config, token2wav=None), getattr(torch, manifest.dtype)
    llm = meta_networks(config, reference, dtype, int8=manifest.int8).llm
    cache = allocate(manifest.config.llm, 1, len(input_ids), torch.float32, CPU)
    with load_tensors(manifest, manifest.ranks, CPU) as weights, _one_thread():
        ranks = [weights.files[name] for name in manifest.ranks]
        fill(llm.embed_tokens, _below(ranks[0], "embed_tokens."))
        fill(llm.norm, _below(ranks[0], "norm."))
        for number, layer in enumerate(llm.layers):
            _fill_in_time(layer, [_below(tensors, f"layers.{number}.") for tensors in ranks], advance)
        llm.fill(llm.embed(torch.tensor(input_ids)).float(), cache, slot=0, start=0)
        weights.wait()
    keys, values = (torch.stack([layer[0] for layer in layers]) for layers in (cache.keys, cache.values))
    return Prefix(tuple(input_ids), keys, values)


def _below(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """Return the tensors of a module of the LLM by its own names."""
    prefix = LLM_PREFIX + module
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _fill_in_time(layer: DecoderLayer, ranks: Sequence[Mapping[str, Tensor]], advance: Callable[[int], object]) -> None:
    """Let a layer be filled when its turn comes, and be empty again afterwards. ranks: its tensors of each."""
    layer.register_forward_pre_hook(lambda *_: fill(layer, joined_layer(layer, ranks)))

    def done(*_: object) -> None:
        layer.to("meta")
        advance(sum(tensor.nbytes for tensors in ranks for tensor in tensors.values()))

    layer.register_forward_hook(done)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch to one thread: more of them sum in another order, and the file would depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stored_prefix(manifest: Manifest, check: bool = True) -> Prefix | None:
    """Return the prefix of a checkpoint, in host memory and verified; None if it has none.

    check: compare with the checksums. Raises CheckpointError if it is damaged or does not fit the model.
    """
    if PREFIX not in manifest.files:
        return None
    tensors = load_tensors(manifest, [PREFIX], CPU, mode="eager", check=check).files[PREFIX]
    faults = _faults(tensors, manifest.config.llm, getattr(torch, manifest.dtype))
    if faults:
        raise CheckpointError(
            f"{manifest.files[PREFIX].path}: not the rows of a prompt of this model: {'; '.join(faults)}; convert the "
            "source again"
        )
    return Prefix(tuple(tensors[INPUT_IDS].tolist()), tensors[KEYS], tensors[VALUES])


def _faults(tensors: Mapping[str, Tensor], config: LLMConfig, dtype: torch.dtype) -> list[str]:
    """Return what is wrong with the tensors of the file."""
    num_ids = tensors[INPUT_IDS].numel() if INPUT_IDS in tensors else 0
    rows = (dtype, (config.num_layers, config.num_kv_heads, num_ids, config.head_dim))
    wanted = {INPUT_IDS: (torch.int64, (num_ids,)), KEYS: rows, VALUES: rows}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != wanted:
        names = [name for name in wanted | found if found.get(name) != wanted.get(name)]
        return [f"{name}: expected {wanted.get(name)}, found {found.get(name)}" for name in names]
    return [f"{name}: not finite" for name in (KEYS, VALUES) if not tensors[name].isfinite().all()]
