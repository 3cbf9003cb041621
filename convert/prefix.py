"""The rows of the system prompt, computed with the weights as they were written and put beside them."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from covo_npu.convert.errors import ConvertError
from covo_npu.convert.plan import NAMES
from covo_npu.convert.stream import Bytes, ByteStream, Zeros, write_file
from covo_npu.convert.values import bits
from covo_npu.runtime.checkpoint import format as checkpoint
from covo_npu.runtime.checkpoint.format import WrittenFile, read_manifest
from covo_npu.runtime.prefix import Prefix, computed_prefix

log = logging.getLogger(__name__)


def write_prefix(folder: Path, advance: Callable[[int], object]) -> WrittenFile:
    """Return the record of the new file of the prefix, in the dtype of the weights.

    folder: a checkpoint that is complete but for it; what was written is read back and verified by this. advance: told
    of the bytes of each layer when it is done. Raises ConvertError if a row does not fit into the dtype.
    """
    begin = time.perf_counter()
    manifest = read_manifest(folder)
    prefix = computed_prefix(manifest, advance).to(dtype=getattr(torch, manifest.dtype))
    if not (prefix.keys.isfinite().all() and prefix.values.isfinite().all()):
        raise ConvertError(
            f"{folder.parent}: keys or values of the system prompt do not fit into {manifest.dtype}; what was written "
            "is removed. This model would not answer in it: choose another --dtype, or leave the prompt out with "
            "--no-prefix"
        )
    log.info("system prompt: %d tokens in %.1f s", len(prefix.input_ids), time.perf_counter() - begin)
    tensors = prefix.tensors()
    layout = checkpoint.plan_file((name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items())
    written = write_file(folder / checkpoint.PREFIX, _streams(layout, prefix))
    return replace(written, layout=layout)


def _streams(layout: checkpoint.FilePlan, prefix: Prefix) -> Iterator[ByteStream]:
    """Yield the bytes of the file: header, tensors, the pads between them."""
    tensors = prefix.tensors()
    yield Bytes(layout.header)
    for name, entry in layout.entries.items():
        yield Zeros(entry.bytes) if name.startswith(checkpoint.PAD_PREFIX) else Bytes(bits(tensors[name]))
