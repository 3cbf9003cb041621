"""covo-check ckpt: every byte of a converted checkpoint against its manifest, every tensor against its source.

The comparison with the source undoes what conversion did and shares no arithmetic with it: what was exact there must be
exact here, what was computed must come back to the source's values within a few roundings of float32.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
import xxhash
from torch import Tensor

from covo_npu.convert import rules
from covo_npu.kernels.errors import CovoError, listed
from covo_npu.runtime.checkpoint.format import (
    BLOCK_BYTES,
    ENCODER,
    PREFIX,
    RETIRED,
    TOKEN2WAV,
    CheckpointError,
    Manifest,
    read_manifest,
)
from covo_npu.runtime.checkpoint.loader import load_tensors
from covo_npu.runtime.cli import options
from covo_npu.runtime.networks.files import expected_tensors
from covo_npu.runtime.prefix import computed_prefix, stored_prefix
from covo_npu.tools.check.result import Finding, Result, Subject, below, check

if TYPE_CHECKING:
    from covo_npu.convert.plan import Plan, Step
    from covo_npu.convert.shards import SourceTensor
    from covo_npu.convert.source import SourceCheckpoint

ROWS_AT_ONCE = 2**22  # values compared at a time where the dtype changed: 16 MB in float32
RTOL, ATOL = 2e-6, 1e-9  # float32 keeps 6e-8; exp and log, norm and quotient add a few of these
QUOTIENT = 2.0**-16  # of a scale: a quotient of up to 127, and the scale itself, are each rounded to float32
TINY = 2.0**-119  # 127 times what float32 has for its smallest normal number: rows below count as zeros
FORMAT = "the format, docs of checkpoints/"


def examine_folder(folder: Path, src: Path | None, voice: Path | None) -> Result:
    """Return the findings on a checkpoint. src: the source that it was made of; voice: as for covo-convert."""
    bound = "agree with each other and the files"
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        fix = "copy the checkpoint again or convert it again"
        return Result("ckpt", folder.name, (Finding("manifest and headers", str(error), bound, FORMAT, False, fix),))
    files = list(manifest.files.values())
    size = sum(file.bytes for file in files)
    found = f"{len(files)} files, {size / 1e9:.2f} GB, layout {manifest.layout_version}"
    findings = [
        Finding("manifest and headers", found, bound, FORMAT, True),
        _checksums(manifest),
        _networks(manifest),
        _prefix(manifest),
    ]
    findings += _against_source(manifest, src, voice) if src else []
    return Result("ckpt", folder.name + (f" against {src.name}" if src else ""), tuple(findings))


def examine(subject: Subject) -> Result:
    """Return the findings on the subject's checkpoint."""
    return examine_folder(subject.require_ckpt(), None, None)


def _checksums(manifest: Manifest) -> Finding:
    damaged, blocks = [], 0
    for file in manifest.files.values():
        with file.path.open("rb") as opened:
            for index, expected in enumerate(file.blocks):
                blocks += 1
                if xxhash.xxh3_128_hexdigest(opened.read(BLOCK_BYTES)) != expected:
                    damaged.append(f"{file.name} at {index * BLOCK_BYTES}")
    return _none_wrong("checksums", damaged, f"{blocks} blocks of 16 MiB", "as in the manifest", "copy the files again")


def _networks(manifest: Manifest) -> Finding:
    """Names and shapes as the networks want them, which come from the networks themselves. The prefix is no network."""
    shapes = expected_tensors(manifest.config, manifest.int8, len(manifest.ranks))
    stems = {ENCODER: "encoder", TOKEN2WAV: "token2wav", **dict.fromkeys(manifest.ranks, "llm")}
    wanted = {(file, name): shape for file, stem in stems.items() for name, shape in shapes.get(stem, {}).items()}
    networks = [file for file in manifest.files.values() if file.name != PREFIX]
    listed = {
        (file.name, name): t.shape for file in networks for name, t in file.tensors.items() if name not in RETIRED
    }
    wrong = [
        f"{name} in {file}: expected {wanted.get((file, name))}, found {listed.get((file, name))}"
        for file, name in sorted(wanted.keys() | listed.keys())
        if wanted.get((file, name)) != listed.get((file, name))
    ]
    count = f"{len(wanted)} tensors"
    return _none_wrong("tensors", wrong, count, "as the networks want them", "convert the source again")


def _prefix(manifest: Manifest) -> Finding:
    """The rows of the system prompt, computed again.

    Both were summed in float32, in whatever order the machines chose, and the stored ones were rounded once more: by at
    most the unit roundoff of their dtype. A float32 sum of K products is off by about sqrt(K) roundings of 2^-24 where
    these fall at random; a row of the last layer has been through four products in each layer. The angle of a rotation
    is a position times a float32 frequency, of which machines may differ in the last place.
    """
    name, advice = "system prompt", "convert the source again"
    if PREFIX not in manifest.files:
        return Finding(name, "not in this checkpoint: the first dialogue of a process computes it")
    try:
        stored, computed = stored_prefix(manifest), computed_prefix(manifest)
    except CovoError as error:
        return Finding(name, str(error), "can be read, and computed", "", False, advice)
    assert stored is not None
    if stored.input_ids != computed.input_ids:
        found = f"{len(stored.input_ids)} ids, of another text or tokenizer"
        return Finding(name, found, f"the {len(computed.input_ids)} ids of the default prompt", "", False, advice)
    llm, stored_dtype = manifest.config.llm, stored.keys.dtype
    summed = 2**-24 * sqrt(4 * llm.num_layers * max(llm.intermediate_size, llm.hidden_size))
    summed += 2**-23 * len(stored.input_ids)
    bound = torch.finfo(stored_dtype).eps / 2 + summed
    distances = [_distance(a, b) for a, b in zip(stored.rows, computed.rows, strict=True)]
    distance = float(torch.tensor(distances, dtype=torch.float64).max())  # NaN, if there is one
    source = f"relative L2 of a layer's rows; one rounding to {manifest.dtype}, and the order of float32 sums"
    return replace(below(name, distance, bound, source), fix="" if distance <= bound else advice)


def _distance(found: Tensor, expected: Tensor) -> float:
    distance, norm = (found.double() - expected.double()).norm(), expected.double().norm()
    return float(distance / norm if norm else distance)


# --- against the source


def _against_source(manifest: Manifest, src: Path, voice: Path | None) -> list[Finding]:
    from covo_npu.convert.plan import make_plan
    from covo_npu.convert.source import open_source

    try:
        source = open_source(src, voice, manifest.config.token2wav is not None)
        plan = make_plan(source, getattr(torch, manifest.dtype), manifest.weights, len(manifest.ranks))
    except CovoError as error:
        return [Finding("source", str(error), "can be converted", "", False, "name the source that it was made of")]
    config = Finding(
        "config",
        "equal" if plan.config == manifest.config else "differs",
        "as the source gives it",
        "",
        plan.config == manifest.config,
    )
    left_out = {prefix: (group.tensors, group.bytes) for prefix, group in plan.left_out.items()}
    noted = {prefix: (note.get("tensors"), note.get("bytes")) for prefix, note in manifest.left_out.items()}
    left = Finding(
        "left out",
        f"{sum(count for count, _ in left_out.values())} tensors",
        "as the manifest notes",
        "",
        left_out == noted,
    )
    files = [file.name for file in manifest.files.values() if file.data_start is not None]
    with load_tensors(manifest, files, torch.device("cpu"), check=False) as weights:
        found = {**weights.files, **{ours: weights.files[name] for ours, name in zip(plan.ranks, manifest.ranks)}}
        wrong = [f"{steps[0].recipe.target}: {says}" for steps in by_target(plan) if (says := compare(steps, found))]
    equal = _none_wrong(
        "tensors against the source",
        wrong,
        f"{len(plan.steps)} tensors",
        "equal after undoing the conversion",
        "convert the source again; is it the source that this was made of?",
    )
    return [_small_files(source, manifest), config, left, equal]


def _small_files(source: SourceCheckpoint, manifest: Manifest) -> Finding:
    """Files of the source that are no tensors, by the digests that the manifest noted."""
    digests = {name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for name, path in source.small_files.items()}
    wrong = [name for name, digest in digests.items() if manifest.source.get(name, {}).get("xxh3_128") != digest]
    return _none_wrong(
        "small files of the source",
        wrong,
        f"{len(source.small_files)} files",
        "as when it was converted",
        "this is another source, or it changed since; convert it again",
    )


def by_target(plan: Plan) -> Iterable[list[Step]]:
    """Return the steps that make one target: several if ranks share it, in their order."""
    steps: dict[str, list[Step]] = {}
    for step in plan.steps:
        steps.setdefault(step.recipe.target, []).append(step)
    return steps.values()


def compare(steps: Sequence[Step], files: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Return how a target tensor differs from its sources, "" if it does not. files: tensors by file and name."""
    parts = [files.get(step.file, {}).get(step.recipe.target) for step in steps]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return "missing"
    step = steps[0]
    sources = [None if tensor is None else _values(tensor) for tensor in step.sources]
    if step.recipe.split.axis is None or len(found) == 1:
        says = [INVERSES[step.recipe.operation](part, sources, step) for part in found]
        return next(filter(None, says), "")
    return _shared(found, sources, step)


def _shared(parts: Sequence[Tensor], sources: Sequence[Tensor | None], step: Step) -> str:
    """Ranks undone: the parts of each source, put together again, and the zeros behind them."""
    axis, at = step.recipe.split.axis, 0
    for need, source in zip(step.recipe.needs, sources):
        if axis == 0:
            length = -(-need.shape[0] // len(parts))
            whole = torch.cat([part[at : at + length] for part in parts])
            at += length
        else:
            whole = torch.cat(list(parts), dim=1)
        if whole[need.shape[0] :].any():
            return f"the rows behind {need.name} are not zeros"
        one = replace(step, recipe=replace(step.recipe, needs=(need,)))
        if says := INVERSES[step.recipe.operation](whole[: need.shape[0]], [source], one):
            return says
    return ""


def _rows(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> str:
    at = 0
    for need, source in zip(step.recipe.needs, sources):
        part = found[at : at + need.shape[0]]
        at += need.shape[0]
        if not all(torch.equal(a, b) for a, b in _pieces(part, source)):
            return f"rows of {need.name or 'zeros'} differ"
    return "" if at == found.shape[0] else f"{found.shape[0] - at} rows too many"


def _pieces(part: Tensor, source: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (target's values, source's values rounded to the target's dtype), a few rows at a time."""
    rows = max(1, ROWS_AT_ONCE // max(1, part[:1].numel()))
    for start in range(0, part.shape[0], rows):
        piece = part[start : start + rows]
        yield piece, (torch.zeros_like(piece) if source is None else source[start : start + rows].to(part.dtype))


def _fold(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> str:
    """Weight norm undone: the norm of each row is |g|, its direction that of v, turned if g is negative."""
    g, v = (source.double() for source in sources if source is not None)
    rows, directions = found.double().flatten(1), v.flatten(1)
    norms = rows.norm(dim=1)
    along = (rows * directions).sum(1) / directions.norm(dim=1)
    across = rows - along[:, None] * directions / directions.norm(dim=1)[:, None]
    off = float(across.norm(dim=1).div(norms.clamp(min=1e-30)).max())
    return (
        _closely(norms, g.flatten().abs())
        or _closely(along, g.flatten())
        or ("" if off < RTOL else f"off by {off:.1e}")
    )


def _exp(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> str:
    return _closely(found.double().log(), _only(sources).double().flatten(), atol=1e-6)


def _inverse_beta(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> str:
    return _closely((1 / found.double() - 1e-9).log(), _only(sources).double().flatten(), atol=1e-6)


def _mean(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> str:
    return _exactly(found, _only(sources).flatten()[: found.numel()].float())


def _std(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> str:
    return _closely(found.double().square(), _only(sources).double().flatten()[-found.numel() :])


def _equal(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> str:
    wrong = [
        need.name
        for need, source in zip(step.recipe.needs, sources)
        if not torch.equal(_only([source]).flatten().float(), found)
    ]
    return f"differs from {len(wrong)} copies: {', '.join(wrong[:3])}" if wrong else ""


def _int8(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> str:
    """Each number times its row's scale is within half a scale of the source. The scale here is the source's own."""
    for numbers, rows, name in _matched_rows(found, sources, step):
        scale = _scales_of(rows)[:, None]
        off = (rows - numbers.double() * scale).abs()
        if not bool((off <= scale * (0.5 + QUOTIENT) + TINY).all()):
            return f"rows of {name} are off by up to {float((off / scale.clamp(min=TINY)).max()):.3f} of their scale"
    return ""


def _scales(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> str:
    for scales, rows, name in _matched_rows(found, sources, step):
        if says := _closely(scales.double(), _scales_of(rows), rtol=2**-23, atol=TINY):
            return f"scales of {name}: {says}"
    return ""


def _scales_of(rows: Tensor) -> Tensor:
    return rows.abs().amax(1) / 127


def _matched_rows(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Yield (rows of the target, rows of the source in float64, its name), a few at a time."""
    at = 0
    for need, source in zip(step.recipe.needs, sources, strict=True):
        whole = _only([source])
        count = max(1, ROWS_AT_ONCE // 2 // need.shape[1])
        for start in range(0, need.shape[0], count):
            piece = whole[start : start + count].double()
            yield found[at + start : at + start + len(piece)], piece, need.name
        at += need.shape[0]


Inverse = Callable[[Tensor, Sequence["Tensor | None"], "Step"], str]
INVERSES: dict[rules.Operation, Inverse] = {
    rules.ROWS: _rows,
    rules.FOLD: _fold,
    rules.EXP: _exp,
    rules.INVERSE_BETA: _inverse_beta,
    rules.MEAN: _mean,
    rules.STD: _std,
    rules.EQUAL: _equal,
    rules.INT8: _int8,
    rules.SCALES: _scales,
}


def _values(tensor: SourceTensor) -> Tensor:
    """Return a source tensor, mapped: only what is compared is read."""
    if tensor.values is not None:
        return tensor.values
    if tensor.bytes == 0:
        return torch.empty(tensor.shape, dtype=tensor.torch_dtype)
    start = tensor.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with tensor.path.open("rb") as file:
        access = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ | mmap.PROT_WRITE, "offset": start}
        view = mmap.mmap(file.fileno(), tensor.offset - start + tensor.bytes, **access)
    flat = torch.frombuffer(view, dtype=torch.uint8)[tensor.offset - start :]
    if tensor.offset % tensor.torch_dtype.itemsize:
        flat = flat.clone()  # a view wants the alignment of its dtype, which the format does not ask for
    return flat.view(tensor.torch_dtype).view(tensor.shape)


def _only(sources: Sequence[Tensor | None]) -> Tensor:
    (source,) = sources
    assert source is not None
    return source


def _exactly(found: Tensor, expected: Tensor) -> str:
    return "" if torch.equal(found, expected) else "differs"


def _closely(found: Tensor, expected: Tensor, rtol: float = RTOL, atol: float = ATOL) -> str:
    if torch.allclose(found, expected, rtol=rtol, atol=atol):
        return ""
    return f"differs by up to {float((found - expected).abs().max()):.1e}"


def _none_wrong(name: str, wrong: Sequence[str], measured: str, bound: str, fix: str) -> Finding:
    """Return the finding that a list of faults is empty."""
    says = f"{len(wrong)} wrong: {listed(wrong)}" if wrong else measured
    return Finding(name, says, bound, "", not wrong, fix if wrong else "")


@check("ckpt", loading=())
@click.option("--src", type=options.PATH, help="The source checkpoint that it was made of.")
@click.option("--voice", type=options.PATH, help="As given to covo-convert.")
def command(subject: Subject, src: Path | None, voice: Path | None) -> Result:
    """Verify a converted checkpoint: checksums, layout and, with --src, every tensor against its source."""
    return examine_folder(subject.require_ckpt(), src, voice)
