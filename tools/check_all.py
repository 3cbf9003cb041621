"""covo-check all: every check in one report, Markdown for people and JSON for programs, to attach to a bug report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from covo_npu.kernels.errors import CovoError
from covo_npu.tools.check_result import (
    FAULT,
    OK,
    CheckError,
    Finding,
    Result,
    Subject,
    as_dict,
    as_markdown,
    as_text,
    ckpt_option,
    device_option,
    json_option,
    verbose_option,
    wav_argument,
    without_home,
)

# In this order. Each module check_<name> has examine(Subject) -> Result; True: it needs a checkpoint.
PARTS = {"doctor": False, "mel": False, "ckpt": True, "stages": True, "repeat": True, "ops": False}


def results(subject: Subject) -> Iterator[Result]:
    """Yield the result of each part. One that cannot be made is a result that fails: the others are still of use."""
    for name, needs_checkpoint in PARTS.items():
        if needs_checkpoint and subject.ckpt is None:
            yield Result(name, "left out", (Finding(name, "no --ckpt given"),))
            continue
        try:
            yield import_module(f"covo_npu.tools.check_{name}").examine(subject)
        except (CovoError, ImportError, OSError, RuntimeError, ValueError) as error:
            says = f"{type(error).__name__}: {error}"
            yield Result(
                name, "could not be made", (Finding(name, says, "can be made", "", False, "see doctor, above"),)
            )


def write_report(folder: Path, found: list[Result]) -> None:
    """Write report.md and report.json into a folder. No home folder's name is in them. Raises CheckError."""
    from covo_npu.tools.measure import machine_report

    machine = machine_report()
    text = f"# covo-check\n\n{json.dumps(machine, ensure_ascii=False)}\n\n{as_markdown(found)}"
    data = {"machine": machine, "holds": all(result.holds for result in found), "results": [as_dict(r) for r in found]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(without_home(text), "utf-8")
        (folder / "report.json").write_text(
            without_home(json.dumps(data, indent=1, ensure_ascii=False)) + "\n", "utf-8"
        )
    except OSError as error:
        raise CheckError(f"{folder}: the report cannot be written: {error.strerror}; name another --output") from error


@click.command("all")
@wav_argument
@ckpt_option(required=False)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="covo-check",
    show_default=True,
    help="Folder for report.md and report.json.",
)
@device_option
@json_option
@verbose_option
def command(wav: Path | None, ckpt: Path | None, output: Path, device: str, as_json: bool, **options: Any) -> int:
    """Make all checks and write report.md and report.json, to attach to a bug report."""
    found = []
    for result in results(Subject(ckpt, wav, device)):
        found.append(result)
        if not as_json:
            click.echo(as_text(result) + "\n")
    write_report(output, found)
    holds = all(result.holds for result in found)
    if as_json:
        click.echo(json.dumps({"holds": holds, "results": [as_dict(result) for result in found]}, indent=1))
    else:
        click.echo(f"The report is in {output}.")
    return OK if holds else FAULT
