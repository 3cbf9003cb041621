"""A plan to a folder on disk: steps streamed into aligned safetensors files, the manifest last.

No more than a few blocks of 16 MiB are in memory, whatever the sizes: rows are copied byte for byte from their files,
only what must be computed (at most one convolution of the vocoder at a time) becomes a tensor. The rows of the system
prompt take more: see runtime/prefix.py.
"""

import errno
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash

from covo_npu.convert import rules
from covo_npu.convert.errors import ConvertError
from covo_npu.convert.plan import Plan, Step
from covo_npu.convert.prefix import write_prefix
from covo_npu.convert.quantize import QuantisedReader
from covo_npu.convert.reading import CastReader, Columns, Reading, Rest, count_of, load
from covo_npu.convert.shards import SourceTensor
from covo_npu.convert.source import SourceCheckpoint
from covo_npu.convert.stream import Bytes, ByteStream, Zeros, let_others_read, write_file
from covo_npu.convert.values import Values, bits
from covo_npu.kernels.errors import listed
from covo_npu.runtime.checkpoint import format as checkpoint
from covo_npu.runtime.checkpoint.config import to_dict
from covo_npu.runtime.checkpoint.format import WrittenFile

Advance = Callable[[int], object]


def write_checkpoint(
    plan: Plan,
    source: SourceCheckpoint,
    folder: Path,
    advance: Advance = lambda count: None,
    allow_zeros: bool = False,
    prefix: bool = True,
) -> list[str]:
    """Write all files of a plan into an empty folder, the manifest last, and return warnings on the values.

    advance: told of bytes as they are written, then of those of the LLM's layers as the prefix is computed.
    allow_zeros: whether a matrix of the source may be all zeros. prefix: whether the rows of the system prompt are
    computed and written, too.
    Raises ConvertError that names all tensors with a value that cannot be used, or if the disk is full.
    """
    reading = Reading()
    files: dict[str, WrittenFile] = {}
    try:
        for name, steps in plan.files().items():
            layout = checkpoint.plan_file((step.recipe.target, step.dtype, step.shape) for step in steps)
            written = write_file(folder / name, _streams(layout, steps, reading), advance)
            files[name] = replace(written, layout=layout)
        reading.refuse(str(source.folder), allow_zeros)
        tokenizer = [Bytes(source.tokenizer.text)]
        files[checkpoint.TOKENIZER] = write_file(folder / checkpoint.TOKENIZER, tokenizer, advance)
        checkpoint.write_manifest(folder, manifest_body(plan, source, files, reading.digests))
        if prefix:
            files[checkpoint.PREFIX] = write_prefix(folder, advance)
            checkpoint.write_manifest(folder, manifest_body(plan, source, files, reading.digests))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ConvertError(
            f"{folder.parent}: {error.strerror}; what was written is removed; make room and try again"
        ) from error
    let_others_read(folder / checkpoint.MANIFEST)
    let_others_read(folder, 0o755)
    return reading.warnings


def manifest_body(
    plan: Plan,
    source: SourceCheckpoint,
    files: Mapping[str, WrittenFile],
    digests: Mapping[SourceTensor, str],
) -> dict[str, Any]:
    """Return the manifest without its own hash. No times and no paths: the same source gives the same bytes."""
    return {
        "producer": f"covo-npu {version('covo-npu')}",
        "dtype": str(plan.dtype).removeprefix("torch."),
        "weights": plan.weights,
        "tensor_parallel": {"size": plan.tp, "ranks": plan.ranks},
        "config": to_dict(plan.config),
        "special_tokens": dict(source.tokenizer.special_tokens),
        **checkpoint.manifest_files(files),
        "left_out": {
            prefix: {"tensors": group.tensors, "bytes": group.bytes, "reason": group.reason}
            for prefix, group in plan.left_out.items()
        },
        "source": source_record(source, digests),
    }


def source_record(source: SourceCheckpoint, digests: Mapping[SourceTensor, str]) -> dict[str, dict[str, object]]:
    """Return name -> size and xxh3-128 of every source file: what the checkpoint was made of.

    A small file has the digest of its bytes. That of a file of tensors is over a line "name digest" of each tensor that
    was used, in order of the names: the tensors are read once, and in another order than they lie in the file.
    """
    record: dict[str, dict[str, object]] = {}
    for name, path in source.small_files.items():
        data = path.read_bytes()
        record[name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    groups: dict[str, list[SourceTensor]] = defaultdict(list)
    for tensor in digests:
        if tensor.file:
            groups[tensor.file].append(tensor)
    for name, tensors in groups.items():
        digest = xxhash.xxh3_128()
        for tensor in sorted(tensors, key=lambda tensor: tensor.name):
            digest.update(f"{tensor.name} {digests[tensor]}\n".encode())
        record[name] = {"bytes": tensors[0].path.stat().st_size, "xxh3_128": digest.hexdigest()}
    return dict(sorted(record.items()))


# --- steps to streams


def _streams(layout: checkpoint.FilePlan, steps: list[Step], reading: Reading) -> Iterator[ByteStream]:
    """Yield the bytes of a file: header, tensors, the pads between them."""
    yield Bytes(layout.header)
    by_name = {step.recipe.target: step for step in steps}
    for name, entry in layout.entries.items():
        if name.startswith(checkpoint.PAD_PREFIX):
            yield Zeros(entry.bytes)
        else:
            yield from _step_streams(by_name[name], reading)


def _step_streams(step: Step, reading: Reading) -> Iterator[ByteStream]:
    """Yield the bytes of one target tensor. Each stream is read to its end before the next one is asked for."""
    operation = step.recipe.operation
    if operation is rules.SCALES:
        yield from _scales(step, reading)
    elif operation in (rules.ROWS, rules.INT8):
        for need, tensor in zip(step.recipe.needs, step.sources, strict=True):
            if tensor is None:
                yield Zeros(prod(need.shape) * step.torch_dtype.itemsize)
            else:
                yield from _rows(tensor, step, reading)
    else:
        yield _computed(step, reading)


def _rows(tensor: SourceTensor, step: Step, reading: Reading) -> Iterator[ByteStream]:
    """Yield the bytes of a source tensor, or of a rank's share. The ranks' files are written one after another."""

    def whole() -> ByteStream:
        if step.recipe.operation is rules.INT8:
            return QuantisedReader(tensor, reading)
        return CastReader(tensor, step.dtype, reading)

    entry, share = step.torch_dtype.itemsize, step.share(tensor.shape)
    row = prod(tensor.shape[1:]) * entry
    if share is None:
        yield whole()
    elif share.axis == 0:
        yield Rest(reading.reader(tensor, whole), (share.stop - share.start) * row)
        yield Zeros(share.zeros * row)
    else:
        assert not share.zeros, "columns are shared evenly"
        yield Columns(whole(), row, share.start * entry, share.stop * entry)


def _scales(step: Step, reading: Reading) -> Iterator[ByteStream]:
    """Yield the scales of the 8-bit weight that was written last."""
    for tensor in step.sources:
        assert tensor is not None
        scales, share = torch.cat(reading.scales[tensor]), step.share(tensor.shape)
        yield Bytes(bits(scales if share is None else scales[share.start : share.stop].contiguous()))
        yield Zeros(share.zeros * scales.itemsize if share else 0)


def _computed(step: Step, reading: Reading) -> ByteStream:
    recipe, inputs = step.recipe, [tensor for tensor in step.sources if tensor is not None]
    assert recipe.operation.compute is not None
    before = reading.unusable
    values = [load(tensor, "F32", reading) for tensor in inputs]
    if reading.unusable > before:
        return Zeros(step.bytes)  # nothing of it will stay
    origin = f"{recipe.operation.name} of {listed([tensor.name for tensor in inputs], 2, ' and ')}"
    try:
        result = recipe.operation.compute(*values)
    except ValueError as error:
        reading.computed.append(f"{recipe.target}, {origin}: {error}")
        return Zeros(step.bytes)
    assert tuple(result.shape) == step.shape, f"{recipe.target}: {tuple(result.shape)} for {step.shape}"
    data, seen = bits(result.to(step.torch_dtype)), Values(step.dtype)
    seen.see(data)
    if seen.not_finite:
        reading.computed.append(f"{recipe.target}, {origin}: {count_of(seen, step.shape)}")
    return Bytes(data)
