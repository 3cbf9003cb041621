"""covo-check ckpt: every byte of a converted checkpoint against its manifest, every tensor against its source.

The comparison with the source undoes what conversion did and shares no arithmetic with it: what was exact there must be
exact here, what was computed must come back to the source's values within a few roundings of float32.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
import xxhash
from torch import Tensor

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.checkpoint import BLOCK_BYTES, CheckpointError, Manifest, read_manifest
from covo_npu.runtime.loader import load_tensors
from covo_npu.runtime.model import expected_tensors
from covo_npu.tools.check_result import CheckError, Finding, Result, Subject, json_option, show, verbose_option

if TYPE_CHECKING:
    from covo_npu.convert.plan import Step
    from covo_npu.convert.source import Source, SourceTensor

SHOWN = 10
ROWS_AT_ONCE = 2**22  # values compared at a time where the dtype changed: 16 MB in float32
RTOL, ATOL = 2e-6, 1e-9  # float32 keeps 6e-8; exp and log, norm and quotient add a few of these
FORMAT = "the format, docs of checkpoints/"


def examine_folder(folder: Path, src: Path | None, voice: Path | None) -> Result:
    """Return the findings on a checkpoint. src: the source that it was made of; voice: as for covo-convert."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        problem = Finding(
            "manifest and headers",
            str(error),
            "agree with each other and the files",
            FORMAT,
            False,
            "copy the checkpoint again or convert it again",
        )
        return Result("ckpt", folder.name, (problem,))
    files = list(manifest.files.values())
    size = sum(file.bytes for file in files)
    findings = [
        Finding(
            "manifest and headers",
            f"{len(files)} files, {size / 1e9:.2f} GB, layout {manifest.layout_version}",
            "agree with each other and the files",
            FORMAT,
            True,
        ),
        _checksums(manifest),
        _networks(manifest),
    ]
    findings += _against_source(manifest, src, voice) if src else []
    return Result("ckpt", folder.name + (f" against {src.name}" if src else ""), tuple(findings))


def examine(subject: Subject) -> Result:
    """Return the findings on the subject's checkpoint."""
    if subject.ckpt is None:
        raise CheckError("ckpt needs a checkpoint: give its folder")
    return examine_folder(subject.ckpt, None, None)


def _checksums(manifest: Manifest) -> Finding:
    damaged, blocks = [], 0
    for file in manifest.files.values():
        with file.path.open("rb") as opened:
            for index, expected in enumerate(file.blocks):
                blocks += 1
                if xxhash.xxh3_128_hexdigest(opened.read(BLOCK_BYTES)) != expected:
                    damaged.append(f"{file.name} at {index * BLOCK_BYTES}")
    return _listed("checksums", damaged, f"{blocks} blocks of 16 MiB", "as in the manifest", "copy the files again")


def _networks(manifest: Manifest) -> Finding:
    """Names and shapes as the networks want them, which come from the networks themselves."""
    wanted = {name: shape for part in expected_tensors(manifest.config).values() for name, shape in part.items()}
    listed = {name: t.shape for file in manifest.files.values() for name, t in file.tensors.items()}
    wrong = [
        f"{name}: expected {wanted.get(name)}, found {listed.get(name)}"
        for name in sorted(wanted.keys() | listed.keys())
        if wanted.get(name) != listed.get(name)
    ]
    return _listed("tensors", wrong, f"{len(wanted)} tensors", "as the networks want them", "convert the source again")


# --- against the source


def _against_source(manifest: Manifest, src: Path, voice: Path | None) -> list[Finding]:
    from covo_npu.convert.plan import make_plan
    from covo_npu.convert.source import open_source

    try:
        source = open_source(src, voice, manifest.config.token2wav is not None)
        plan = make_plan(source, getattr(torch, manifest.dtype))
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
        wrong = [f"{step.target}: {says}" for step in plan.steps if (says := compare(step, weights.tensors))]
    equal = _listed(
        "tensors against the source",
        wrong,
        f"{len(plan.steps)} tensors",
        "equal after undoing the conversion",
        "convert the source again; is it the source that this was made of?",
    )
    return [_small_files(source, manifest), config, left, equal]


def _small_files(source: Source, manifest: Manifest) -> Finding:
    """Files of the source that are no tensors, by the digests that the manifest noted."""
    digests = {name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for name, path in source.small_files.items()}
    wrong = [name for name, digest in digests.items() if manifest.source.get(name, {}).get("xxh3_128") != digest]
    return _listed(
        "small files of the source",
        wrong,
        f"{len(source.small_files)} files",
        "as when it was converted",
        "this is another source, or it changed since; convert it again",
    )


def compare(step: Step, tensors: dict[str, Tensor]) -> str:
    """Return how a target tensor differs from its sources, "" if it does not."""
    found = tensors.get(step.target)
    if found is None:
        return "missing"
    sources = [None if tensor is None else _values(tensor) for tensor in step.sources]
    return INVERSES[step.operation](found, sources, step)


def _rows(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> str:
    at = 0
    for need, source in zip(step.needs, sources):
        part = found[at : at + need.shape[0]]
        at += need.shape[0]
        if not all(torch.equal(a, b) for a, b in _pieces(part, source)):
            return f"rows of {need.name or 'zeros'} differ"
    return "" if at == found.shape[0] else f"{found.shape[0] - at} rows too many"


def _pieces(part: Tensor, source: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (target's values, source's values rounded to the target's dtype), a few rows at a time."""
    rows = max(1, ROWS_AT_ONCE // max(1, part[0].numel()))
    for start in range(0, part.shape[0], rows):
        piece = part[start : start + rows]
        yield piece, (torch.zeros_like(piece) if source is None else source[start : start + rows].to(part.dtype))


def _flat(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> str:
    return _exactly(found, _only(sources).reshape(found.shape).to(found.dtype))


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
        for need, source in zip(step.needs, sources)
        if not torch.equal(_only([source]).flatten().float(), found)
    ]
    return f"differs from {len(wrong)} copies: {', '.join(wrong[:3])}" if wrong else ""


def _mel_filters(found: Tensor, sources: Sequence[Tensor | None], step: Step) -> str:
    """Slaney's triangles of equal area, evaluated in float64 here. Source: Auditory Toolbox, report 1998-010."""
    top = 15 + 27 * log(8) / log(6.4)  # 8000 Hz in mel: linear to 1000 Hz, then 27 steps for a factor of 6.4
    mel = torch.linspace(0, top, found.shape[0] + 2, dtype=torch.float64)
    edges = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * log(6.4) / 27))
    hertz = torch.linspace(0, 8000, found.shape[1], dtype=torch.float64)
    left, centre, right = (edges[i : i + found.shape[0], None] for i in range(3))
    bank = torch.minimum((hertz - left) / (centre - left), (right - hertz) / (right - centre)).clamp(min=0)
    return _closely(found.double(), bank * 2 / (right - left), rtol=1e-4, atol=1e-8)


Inverse = Callable[[Tensor, Sequence["Tensor | None"], "Step"], str]
INVERSES: dict[str, Inverse] = {
    "rows": _rows,
    "flat": _flat,
    "fold": _fold,
    "exp": _exp,
    "inverse_beta": _inverse_beta,
    "mean": _mean,
    "std": _std,
    "equal": _equal,
    "mel_filters": _mel_filters,
}


def _values(tensor: SourceTensor) -> Tensor:
    """Return a source tensor, mapped: only what is compared is read."""
    if tensor.values is not None:
        return tensor.values
    if tensor.bytes == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    start = tensor.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with tensor.path.open("rb") as file:
        access = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ | mmap.PROT_WRITE, "offset": start}
        view = mmap.mmap(file.fileno(), tensor.offset - start + tensor.bytes, **access)
    flat = torch.frombuffer(view, dtype=torch.uint8)[tensor.offset - start :]
    if tensor.offset % tensor.dtype.itemsize:
        flat = flat.clone()  # a view wants the alignment of its dtype, which the format does not ask for
    return flat.view(tensor.dtype).view(tensor.shape)


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


def _listed(name: str, wrong: Sequence[str], measured: str, bound: str, fix: str) -> Finding:
    """Return the finding that a list of faults is empty; the first ten and how many more."""
    more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    says = f"{len(wrong)} wrong: {'; '.join(wrong[:SHOWN])}{more}" if wrong else measured
    return Finding(name, says, bound, "", not wrong, fix if wrong else "")


@click.command("ckpt")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--src", type=click.Path(path_type=Path), help="The source checkpoint that it was made of.")
@click.option("--voice", type=click.Path(path_type=Path), help="As given to covo-convert.")
@json_option
@verbose_option
def command(folder: Path, src: Path | None, voice: Path | None, as_json: bool, **options: Any) -> int:
    """Verify a converted checkpoint: checksums, layout and, with --src, every tensor against its source."""
    return show(examine_folder(folder, src, voice), as_json)
