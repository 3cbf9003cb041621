"""What a check says: findings, each with what was measured, what it is held to and where that bound comes from."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.cli import console, options
from covo_npu.runtime.options import LoadOptions
from covo_npu.tools.report import table

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
    """What a check examines. ckpt: None without a checkpoint; wav: None for the question that is made up."""

    ckpt: Path | None = None
    wav: Path | None = None
    options: LoadOptions = field(default_factory=LoadOptions)

    def require_ckpt(self) -> Path:
        """Return the checkpoint's folder. Raises CheckError if there is none."""
        if self.ckpt is None:
            raise CheckError("this check needs a checkpoint: give --ckpt")
        return self.ckpt


def check(
    name: str,
    *,
    wav: bool = False,
    ckpt: bool | None = True,
    judges_ckpt: bool = False,
    loading: Sequence[str] = ("device",),
) -> Callable[[Callable[..., Result]], click.Command]:
    """Return a decorator: from a function of a Subject, and of its own options, to a command that shows the Result.

    The command's exit code is 0 only if the Result holds. wav: whether it takes a WAV; ckpt: whether --ckpt must be
    given, None: there is no such option; judges_ckpt: whether what is wrong with it is a finding; loading: its options
    of loading, see options.loading.
    """

    def decorate(examine: Callable[..., Result]) -> click.Command:
        @functools.wraps(examine)
        def command(json_file: str | None, **values: Any) -> int:
            subject = Subject(**{part: values.pop(part) for part in ("ckpt", "wav", "options") if part in values})
            if subject.ckpt is not None and not judges_ckpt:
                from covo_npu.runtime.checkpoint.format import read_manifest  # here: doctor runs without its packages

                read_manifest(subject.ckpt)  # one that is not there is refused, whatever the check looks at
            result = examine(subject, **values)
            console.show(as_text(result), as_dict(result), json_file)
            return console.OK if result.holds else console.FAULT

        parts: list[options.Decorator] = [options.common]
        parts += [options.loading(*loading)] if loading else []
        parts += [] if ckpt is None else [options.ckpt(required=ckpt)]
        parts += [click.argument("wav", required=False, type=options.PATH)] if wav else []
        decorated: Callable[..., Any] = command
        for part in parts:
            decorated = part(decorated)
        return click.command(name)(decorated)

    return decorate


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


def as_markdown(result: Result) -> str:
    """Return a result as a section with a table."""
    rows = [(MARKS[f.holds], f.name, f.measured, f.bound, f.source) for f in result.findings]
    fixes = [f"- {finding.name}: {finding.fix}" for finding in result.findings if finding.fix]
    title = f"## {result.check}: {'holds' if result.holds else 'does not hold'}"
    figures = table(("", "what", "measured", "bound", "source of the bound"), rows)
    return "\n".join([title, "", result.subject, "", figures, *(["", *fixes] if fixes else []), ""])


def without_home(text: str) -> str:
    """Return a text in which the home folder reads ~: a report is for strangers' eyes."""
    home = str(Path.home())
    return text if home == "/" else re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
