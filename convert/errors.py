"""The errors of conversion, many findings in one message."""

from collections.abc import Iterable, Mapping

from covo_npu.kernels.errors import CovoError

SHOWN = 10


class ConvertError(CovoError):
    """The source cannot be converted, or the destination cannot be written."""


def together(title: str, findings: Iterable[str]) -> str:
    """Return the title and its findings, one a line: the first ten and how many more."""
    rows = list(findings)
    more = [f"... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return f"{title} ({len(rows)}):" + "".join(f"\n  {row}" for row in [*rows[:SHOWN], *more])


def refuse(where: str, kinds: Mapping[str, Iterable[str]], advice: str) -> None:
    """Raise ConvertError if any kind (title -> findings) has findings: a paragraph for each kind, then the advice."""
    paragraphs = [
        together(title, rows) for title, rows in ((title, list(found)) for title, found in kinds.items()) if rows
    ]
    if paragraphs:
        raise ConvertError("\n".join([f"{where} cannot be converted; nothing was written", *paragraphs, advice]))
