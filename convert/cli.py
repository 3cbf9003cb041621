"""covo-convert: the published checkpoint to the folder that covo-run loads."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import click

from covo_npu.convert.errors import ConvertError
from covo_npu.convert.folder import check_space, new_folder
from covo_npu.kernels.errors import listed
from covo_npu.runtime.checkpoint.format import FILE_NAMES, INT8, MANIFEST, is_checkpoint
from covo_npu.runtime.cli import console, options
from covo_npu.runtime.options import DTYPES

log = logging.getLogger(__name__)


@click.command(context_settings={"show_default": True})
@click.option("--src", required=True, type=options.PATH, help="Folder of the published weights.")
@click.option("--dst", required=True, type=options.PATH, help="Folder to make.")
@click.option(
    "--voice",
    type=options.PATH,
    help="Folder of the voice's three .npy files. Default: SRC/token2wav/prompt, then SRC/../token2wav/prompt.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", help="Of LLM and encoder; speech is float32.")
@click.option(
    "--weights",
    type=click.Choice(tuple(INT8)),
    help="int8: the LLM's layers in 8 bits and a scale a channel, half the bytes of bfloat16; int8+head: "
    "the layers and the head. Default: --dtype.",
)
@click.option("--token2wav/--no-token2wav", default=True, help="Speech; without it the checkpoint answers in text.")
@click.option("--prefix/--no-prefix", default=True, help="The KV cache's rows of the default system prompt.")
@click.option("--tp", type=click.IntRange(min=1), default=1, help="Tensor-parallel ranks: each gets a file of its own.")
@click.option("--allow-zeros", is_flag=True, help="Accept matrices that are all zeros, which a cut download leaves.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing; with -v every tensor.")
@click.option("--force", is_flag=True, help="Replace an existing converted checkpoint, once the new one is complete.")
@options.common
def command(
    src: Path,
    dst: Path,
    voice: Path | None,
    dtype: str,
    weights: str | None,
    token2wav: bool,
    prefix: bool,
    tp: int,
    allow_zeros: bool,
    dry_run: bool,
    force: bool,
    json_file: str | None,
) -> None:
    """Convert a checkpoint into the layout that covo-run loads.

    Every tensor is checked before anything is written. DST appears only when it is complete.

    \b
    covo-convert --src Covo-Audio-Chat --dst npu_ckpt --voice Covo-Audio/token2wav/prompt
    """
    start = time.perf_counter()
    _check_places(src, dst, force, dry_run)

    import torch  # these take seconds to import, which a wrong option should not cost

    from covo_npu.convert.plan import make_plan
    from covo_npu.convert.report import plan_report, plan_text, summary_text, tensor_rows
    from covo_npu.convert.source import open_source
    from covo_npu.convert.write import write_checkpoint
    from covo_npu.runtime.checkpoint.format import read_manifest

    source = open_source(src, voice, token2wav)
    log.info("source: %d tensors in %s", len(source.tensors), src.name)
    plan = make_plan(source, getattr(torch, dtype), weights, tp)
    log.info("plan: %d tensors, %.2f GB", len(plan.steps), plan.bytes / 1e9)
    for warning in source.warnings:
        click.echo(f"covo-convert: warning: {warning}", err=True)
    report: dict[str, Any] = {"src": str(source.folder), "dst": str(dst), **plan_report(plan, source), "prefix": prefix}
    if dry_run:
        report |= {"tensors": tensor_rows(plan)} if log.isEnabledFor(logging.INFO) else {}  # -v
        console.show(plan_text(report), report, json_file)
        return
    check_space(dst.resolve().parent, plan.bytes)
    dst.resolve().parent.mkdir(parents=True, exist_ok=True)
    work = plan.bytes + prefix * plan.layer_bytes  # each is written; through the layers the system prompt goes, too
    with new_folder(dst, replace=force) as folder, console.progress(work, "B", "convert") as bar:
        warnings = write_checkpoint(plan, source, folder, bar.update, allow_zeros, prefix)
        written = sum(file.bytes for file in read_manifest(folder).files.values())  # read back before it appears
        written += (folder / MANIFEST).stat().st_size
        log.info("written and on the disk: %.2f GB", written / 1e9)
    for warning in warnings:
        click.echo(f"covo-convert: warning: {warning}", err=True)
    report["warnings"] += warnings
    report |= {"bytes_written": written, "seconds": round(time.perf_counter() - start, 3)}
    console.show(summary_text(report), report, json_file)


def _check_places(src: Path, dst: Path, force: bool, dry_run: bool) -> None:
    """Refuse a destination that is inside the source, holds it, exists already, or is no checkpoint of ours."""
    source, target = src.resolve(), dst.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ConvertError(f"--dst {dst} and --src {src} overlap; choose a folder beside the source")
    if not target.exists() or dry_run:
        return
    if not target.is_dir():
        raise ConvertError(f"--dst {dst} exists and is not a folder")
    if os.path.ismount(target):  # an empty volume of a container, for one: known at the end only, by the rename
        raise ConvertError(f"--dst {dst} is where a file system is mounted: name a folder in it")
    if not any(target.iterdir()):
        return
    if not force:
        raise ConvertError(f"--dst {dst} exists; --force replaces it once the new checkpoint is complete")
    others = sorted(path.name for path in target.iterdir() if not FILE_NAMES.fullmatch(path.name))
    if others or not is_checkpoint(target):
        named = f": {listed(others)}" if others else ""
        raise ConvertError(
            f"--dst {dst} holds something else than a converted checkpoint{named}; --force does not remove that"
        )
    if not os.access(target, os.W_OK):
        raise ConvertError(f"--dst {dst} is not writable")


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of covo-convert."""
    return console.run(command, "covo-convert", argv)
