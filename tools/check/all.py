"""covo-check all: every check in one report, Markdown for people and JSON for programs, to attach to a bug report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import output
from covo_npu.runtime.cli import console, options
from covo_npu.runtime.options import LoadOptions
from covo_npu.tools.check.cli import CHECKS
from covo_npu.tools.check.result import (
    CheckError,
    Finding,
    Result,
    Subject,
    as_dict,
    as_markdown,
    as_text,
    without_home,
)
from covo_npu.tools.report import machine_report

WITHOUT_CKPT = (
    "doctor",
    "ops",
    "kernels",
    "stages",
    "launches",
    "graphs",
    "transfer",
)  # what can be checked without a checkpoint


def results(subject: Subject) -> Iterator[Result]:
    """Yield the result of each check. One that cannot be made is a result that fails: the others are still of use."""
    for name in CHECKS:
        if name == "all":
            continue
        if subject.ckpt is None and name not in WITHOUT_CKPT:
            yield Result(name, "left out", (Finding(name, "no --ckpt given"),))
            continue
        try:
            yield import_module(f"covo_npu.tools.check.{name}").examine(subject)
        except (CovoError, ImportError, OSError, RuntimeError, ValueError) as error:
            says = f"{type(error).__name__}: {error}"
            failed = Finding(name, says, "can be made", "", False, "see doctor, above")
            yield Result(name, "could not be made", (failed,))


def write_report(folder: Path, found: list[Result]) -> dict[str, object]:
    """Return the report, after writing it as report.md and report.json, in which no home folder is named.

    Files of these names that no covo-check wrote are left alone. Raises CheckError if they cannot be written.
    """
    machine = machine_report()
    data = {"machine": machine, "holds": all(result.holds for result in found), "results": [as_dict(r) for r in found]}
    texts = {
        "report.md": "\n".join(
            ["# covo-check", "", json.dumps(machine, ensure_ascii=False), "", *(as_markdown(r) for r in found)]
        ),
        "report.json": json.dumps(data, indent=1, ensure_ascii=False) + "\n",
    }
    try:
        for name in texts:
            output.require_writable(folder / name, _ours)
        for name, text in texts.items():
            output.write(folder / name, without_home(text).encode("utf-8", "backslashreplace"))
    except output.OutputError as error:
        raise CheckError(f"the report cannot be written; name another --output: {error}") from error
    return data


def _ours(content: bytes) -> bool:
    return content.startswith((b"# covo-check\n", b'{\n "machine": '))


@click.command("all")
@click.argument("wav", required=False, type=options.PATH)
@options.ckpt(required=False)
@options.loading("device")
@options.common
@click.option(
    "--output", "folder", type=options.PATH, default="covo-check", show_default=True,
    help="Folder for report.md and report.json.",
)  # fmt: skip
def command(wav: Path | None, ckpt: Path | None, options: LoadOptions, folder: Path, json_file: str | None) -> int:
    """Make all checks and write report.md and report.json, to attach to a bug report."""
    found = []
    for result in results(Subject(ckpt, wav, options)):
        found.append(result)
        click.echo(as_text(result) + "\n", err=json_file == "-")
    report = write_report(folder, found)
    console.show(f"The report is in {folder}.", report, json_file)
    return console.OK if report["holds"] else console.FAULT
