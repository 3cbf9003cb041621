"""covo-synth: a checkpoint with random weights, for demonstrations, tests and measurements."""

import time
from pathlib import Path

import click

from covo_npu.convert.folder import check_space, new_folder
from covo_npu.runtime.cli import console, options
from covo_npu.tools.synth.checkpoint import size_of, write_source
from covo_npu.tools.synth.config import PRESETS

TOKENIZER_NOTE = "its tokenizer is made up: a text has another number of tokens than with the published one"


@click.command(context_settings={"show_default": True})
@click.argument("dst", type=options.PATH)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="tiny", help="Sizes of the model.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0)
@options.common
def command(dst: Path, preset: str, seed: int, json_file: str | None) -> None:
    """Write a checkpoint with random weights into the new folder DST, in the layout of the published one.

    \b
    tiny   6 MB + 6 MB, for tests
    small  about 0.5 GB: real heads, few layers
    full   16.80 GB + 1.47 GB, the real sizes
    """
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise click.ClickException(f"{dst} exists and is not an empty folder; choose another one")
    start, chosen = time.perf_counter(), PRESETS[preset]
    total = size_of(chosen)
    check_space(dst.resolve().parent, total)
    dst.resolve().parent.mkdir(parents=True, exist_ok=True)
    with new_folder(dst) as folder, console.progress(total, "B", "synth") as bar:
        write_source(chosen, seed, folder, bar.update)
    seconds = time.perf_counter() - start
    text = f"{dst}: {preset}, seed {seed}, {total / 1e9:.2f} GB in {seconds:.1f} s; {TOKENIZER_NOTE}"
    report = {"dst": str(dst), "preset": preset, "seed": seed, "bytes": total, "seconds": round(seconds, 3)}
    console.show(text, report, json_file)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of covo-synth."""
    return console.run(command, "covo-synth", argv)
