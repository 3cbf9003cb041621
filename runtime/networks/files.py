"""One file of a checkpoint, one module: which, what they want to find there, and how it is put into them.

The modules are built on the meta device, where tensors have a shape and a dtype and no values, and filled by
assignment: the runtime never initialises a weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from covo_npu.kernels.device import Capture
from covo_npu.kernels.errors import listed
from covo_npu.kernels.interface import Kernels
from covo_npu.kernels.select import select
from covo_npu.runtime.checkpoint.config import ModelConfig
from covo_npu.runtime.checkpoint.format import CheckpointError
from covo_npu.runtime.networks.adapter import Adapter
from covo_npu.runtime.networks.layers import Derived, Int8Linear
from covo_npu.runtime.networks.qwen2 import Qwen2
from covo_npu.runtime.networks.whisper import WhisperEncoder
from covo_npu.runtime.parallel import ALONE, Group
from covo_npu.runtime.token2wav import FLOAT32, SpeechDtypes, Token2Wav
from covo_npu.runtime.voice import stored_shapes

LLM_PREFIX = "llm."  # stands before Qwen2's own names in its file; the other modules' names are those of their files

Shape = tuple[int, ...]


class Encoder(nn.Module):
    """Whisper's encoder and the adapter behind it."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.encoder = WhisperEncoder(config.encoder, kernels)
        self.adapter = Adapter(config.adapter, kernels)

    def forward(self, mel: Tensor) -> Tensor:
        """Return audio features [B, S, C_llm] at 6.25 Hz. mel: [B, M, 16 S] at 100 Hz, in the dtype of the weights."""
        features: Tensor = self.adapter(self.encoder(mel))
        return features


@dataclass(frozen=True, slots=True)
class Networks:
    """The modules of a checkpoint. token2wav: None in one that answers in text only."""

    llm: Qwen2
    encoder: Encoder
    token2wav: Token2Wav | None


class Backends(NamedTuple):
    """The kernels of each network. Another than the LLM's: of a network on another kind of device."""

    llm: Kernels
    encoder: Kernels
    speech: Kernels


def meta_networks(
    config: ModelConfig,
    kernels: Kernels | Backends,
    dtype: torch.dtype = torch.float32,
    speech_dtypes: SpeechDtypes = FLOAT32,
    int8: Collection[str] = (),
    group: Group = ALONE,
    speech_capture: Capture | None = None,
) -> Networks:
    """Return the networks on the meta device.

    dtype: of LLM and encoder; speech_dtypes, speech_capture: see Token2Wav; int8, group: see Qwen2.
    """
    of = kernels if isinstance(kernels, Backends) else Backends(kernels, kernels, kernels)
    with torch.device("meta"):
        return Networks(
            Qwen2(config.llm, of.llm, dtype, int8, group),
            Encoder(config, of.encoder).to(dtype),
            Token2Wav(config.token2wav, of.speech, speech_dtypes, speech_capture) if config.token2wav else None,
        )


def expected_tensors(config: ModelConfig, int8: Collection[str] = (), tp: int = 1) -> dict[str, dict[str, Shape]]:
    """Return {file stem: {tensor: shape}} of a checkpoint for this config: what the networks want, from themselves.

    int8: see Qwen2; tp: ranks that share the LLM. What one of them wants, all want. Raises ConfigError if they cannot
    share it.
    """
    networks = meta_networks(config, select("reference", torch.device("cpu")), int8=int8, group=Group(0, tp))
    files = {"llm": wanted_shapes(networks.llm, LLM_PREFIX), "encoder": wanted_shapes(networks.encoder)}
    if networks.token2wav is not None and config.token2wav is not None:
        files["token2wav"] = wanted_shapes(networks.token2wav) | stored_shapes(config.token2wav)
    return files


def wanted_shapes(network: nn.Module, prefix: str = "") -> dict[str, Shape]:
    """Return the shapes of a module's tensors by their names in its file."""
    return {prefix + name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def require_tensors(wanted: Mapping[str, Shape], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError that lists the tensors of a file that are missing, unexpected or of another shape."""
    both = wanted.keys() & tensors.keys()
    faults = {
        "missing": wanted.keys() - tensors.keys(),
        "unexpected": tensors.keys() - wanted.keys(),
        "of another shape": {name for name in both if wanted[name] != tuple(tensors[name].shape)},
    }
    found = [f"{len(names)} {fault}: {', '.join(sorted(names)[:10])}" for fault, names in faults.items() if names]
    if found:
        says = "; ".join(found)
        raise CheckpointError(f"the tensors of the checkpoint do not fit its config: {says}; convert the source again")


def _require_in_range(lost: Mapping[str, int], network: nn.Module) -> None:
    """Raise CheckpointError that counts the values which a cast made infinite. lost: their number in each tensor."""
    if any(lost.values()):
        floats = {tensor.dtype for tensor in network.state_dict().values() if tensor.is_floating_point()}
        dtype = min(floats, key=lambda one: torch.finfo(one).max)  # scales of 8-bit weights are float32 beside others
        name = str(dtype).removeprefix("torch.")
        counts = listed([f"{count} of {tensor}" for tensor, count in lost.items() if count])
        raise CheckpointError(
            f"values beyond {torch.finfo(dtype).max:g}, the largest of {name}: {counts}; load in another --dtype"
        )


@torch.inference_mode(False)
@torch.no_grad()
def fill(network: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Assign the tensors of its file to a module on the meta device; floats in the dtype that the module asks for.

    Then what derives from them is computed, and from there on nothing of the module changes. Raises CheckpointError if
    the tensors are not those that the module wants, values of theirs are beyond the dtype, or a weight's scale is none.
    """
    require_tensors(wanted_shapes(network, prefix), tensors)
    wanted = network.state_dict()
    _require_kinds({prefix + name: tensor for name, tensor in wanted.items()}, tensors)
    placed, lost = {}, {}
    for name, empty in wanted.items():
        tensor = tensors[prefix + name]
        placed[name] = tensor.to(empty.dtype) if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and torch.finfo(empty.dtype).max < torch.finfo(tensor.dtype).max:
            lost[prefix + name] = placed[name].isinf().sum()
    _require_in_range({name: int(count) for name, count in lost.items()}, network)
    network.load_state_dict(placed, strict=True, assign=True)
    _require_scales(network, prefix)
    for module in network.modules():
        if isinstance(module, Derived):
            module.derive()


def _require_kinds(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError that lists whole numbers where other ones, or fractions, are wanted."""
    wrong = [
        f"{name}: expected {_kind(empty.dtype)}, found {_kind(tensors[name].dtype)}"
        for name, empty in wanted.items()
        if _kind(empty.dtype) != _kind(tensors[name].dtype)
    ]
    if wrong:
        raise CheckpointError(f"the tensors of the checkpoint do not fit its config: {listed(wrong)}; convert again")


def _kind(dtype: torch.dtype) -> str:
    return "floats" if dtype.is_floating_point else str(dtype).removeprefix("torch.")


def _require_scales(network: nn.Module, prefix: str) -> None:
    """Raise CheckpointError that lists the 8-bit weights with a scale that is negative, NaN or infinite."""
    scales = {name: module.scale for name, module in network.named_modules() if isinstance(module, Int8Linear)}
    if scales:
        good = torch.stack([((scale >= 0) & (scale < torch.inf)).all() for scale in scales.values()]).tolist()
        wrong = [f"{prefix}{name}.scale" for name, holds in zip(scales, good, strict=True) if not holds]
        if wrong:
            says = f"scales of weights that are negative or not finite: {listed(wrong)}"
            raise CheckpointError(f"{says}; convert the source again")
