"""The errors of conversion, many findings in one message."""

from collections.abc import Iterable
from dataclasses import dataclass

from covo_npu.kernels.errors import CovoError, listed


class ConvertError(CovoError):
    """The source cannot be converted, or the destination cannot be written."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Findings of one kind and what to do about them."""

    title: str
    findings: Iterable[str]
    advice: str


def refuse(where: str, *kinds: Kind, state: str = "nothing was written") -> None:
    """Raise ConvertError if any kind has findings: a paragraph for each such kind, then what to do.

    state: what there is of the destination.
    """
    rows = [(kind, list(kind.findings)) for kind in kinds]
    found = [(kind, findings) for kind, findings in rows if findings]
    if found:
        paragraphs = [
            f"{kind.title} ({len(findings)}):\n  {listed(findings, separator=chr(10) + '  ')}"
            for kind, findings in found
        ]
        advice = dict.fromkeys(kind.advice for kind, _ in found)  # each once, in this order
        raise ConvertError("\n".join([f"{where} cannot be converted; {state}", *paragraphs, *advice]))
