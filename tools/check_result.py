"""What a check says: findings, each with what was measured, what it is held to and where that bound comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from covo_npu.kernels.errors import CovoError

OK, FAULT = 0, 1
MARKS = {True: "ok", False: "FAIL", None: "--"}


class CheckError(CovoError):
    """A check cannot be made: it lacks an input, or two things that it compares do not belong together."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One statement. holds: None where nothing is promised and the figure is for information."""

    name: str
    measured: str
    bound: str = ""
    source: str = ""
    holds: bool | None = None
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """The findings of one check. subject: what was examined, for people and for comparisons."""

    check: str
    subject: str
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing that is promised fails."""
        return all(finding.holds is not False for finding in self.findings)


@dataclass(frozen=True, slots=True)
class Subject:
    """What `covo-check all` examines. ckpt: None without a checkpoint; wav: None for the question that is made up."""

    ckpt: Path | None
    wav: Path | None
    device: str


def below(name: str, measured: float, bound: float, source: str, form: str = ".3e") -> Finding:
    """Return the finding that a figure is at most its bound. NaN is above every bound."""
    return Finding(name, format(measured, form), f"at most {bound:{form}}", source, bool(measured <= bound))


def as_dict(result: Result) -> dict[str, Any]:
    """Return a result as a JSON object."""
    return {**asdict(result), "holds": result.holds}


def as_text(result: Result) -> str:
    """Return a result for a terminal."""
    width = max((len(finding.name) for finding in result.findings), default=0)
    lines = [f"{result.check}: {result.subject}"]
    for finding in result.findings:
        bound = f" ({finding.bound}{'; ' + finding.source if finding.source else ''})" if finding.bound else ""
        lines.append(f"  {MARKS[finding.holds]:<4}  {finding.name:<{width}}  {finding.measured}{bound}")
        if finding.fix:
            lines.append(f"  {'':<4}  {'':<{width}}  -> {finding.fix}")
    failed = sum(finding.holds is False for finding in result.findings)
    held = sum(finding.holds is True for finding in result.findings)
    lines.append(f"{result.check}: {f'{failed} of {held + failed} do not hold' if failed else f'all {held} hold'}")
    return "\n".join(lines)


def as_markdown(results: Sequence[Result]) -> str:
    """Return results as sections with tables."""
    parts = []
    for result in results:
        rows = [
            "| " + " | ".join(_cell(text) for text in (MARKS[f.holds], f.name, f.measured, f.bound, f.source)) + " |"
            for f in result.findings
        ]
        fixes = [f"- {f.name}: {f.fix}" for f in result.findings if f.fix]
        title = f"## {result.check}: {'holds' if result.holds else 'does not hold'}\n\n{result.subject}\n"
        head = "| | what | measured | bound | source of the bound |\n|---|---|---|---|---|"
        parts.append("\n".join([title, head, *rows, *(["", *fixes] if fixes else [])]))
    return "\n\n".join(parts) + "\n"


def show(result: Result, as_json: bool) -> int:
    """Print a result and return the exit code: 0 only if all holds."""
    click.echo(json.dumps(as_dict(result), indent=1, ensure_ascii=False) if as_json else as_text(result))
    return OK if result.holds else FAULT


def without_home(text: str) -> str:
    """Return a text in which the home folder reads ~: a report is for strangers' eyes."""
    home = str(Path.home())
    return text if home == "/" else re.sub(re.escape(home) + r"(?![\w.-])", "~", text)


# --- options that several checks share

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

wav_argument: Decorator = click.argument("wav", required=False, type=click.Path(path_type=Path))
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
device_option: Decorator = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:N, npu:N.")
verbose_option: Decorator = click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error.")


def ckpt_option(required: bool = True) -> Decorator:
    """Return the option --ckpt."""
    return click.option(
        "--ckpt", required=required, type=click.Path(path_type=Path), help="Folder of a converted checkpoint."
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
