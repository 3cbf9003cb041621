"""The checkpoint that a check without one makes up: random weights, the real heads, few layers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from covo_npu.tools.check.result import Subject
from covo_npu.tools.synth.checkpoint import write_converted

SAYS = "made-up weights, real heads, few layers"


@contextmanager
def with_checkpoint(subject: Subject) -> Iterator[tuple[Subject, str]]:
    """Yield the subject with a checkpoint, and its name for people. One that is made up lasts as long as the block."""
    if subject.ckpt is not None:
        yield subject, subject.ckpt.name
        return
    with tempfile.TemporaryDirectory() as folder:
        yield replace(subject, ckpt=write_converted("small", Path(folder))), SAYS
