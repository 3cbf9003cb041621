"""covo-check ops: every stage of a reply runs on the device; nothing is refused, nothing falls back to the host.

Meant for an Ascend NPU. torch_npu tells of an operator that falls back once in a process: what ran before cannot be
seen here, so of all checks of a process this comes first. Without a checkpoint one with random weights is made up: real
heads, few layers.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from covo_npu.kernels.errors import first_line
from covo_npu.tools.check.made_up import with_checkpoint
from covo_npu.tools.check.result import Finding, Result, Subject, check
from covo_npu.tools.question import RATE, made_up

if TYPE_CHECKING:
    from covo_npu.runtime.model import CovoAudio

FALLBACK = re.compile(r"\S*::\S+(?=.*fall ?back to run on the CPU)")  # what torch_npu says on stderr of an operator
TOKENS = 8


def stages(model: CovoAudio) -> dict[str, Callable[[], object]]:
    """Return {stages: a call that runs them}. Speech is of codes that are given: a reply may have none."""
    from covo_npu.runtime import Sampling, Session, audio

    def answer(temperature: float) -> object:
        sampling = Sampling(temperature=temperature)
        return Session(model, mode="a2t", sampling=sampling, max_new_tokens=TOKENS).say(made_up(1.0), RATE)

    calls: dict[str, Callable[[], object]] = {
        "encoder and adapter": lambda: model.encode(audio.prepare(torch.from_numpy(made_up(1.0)), RATE)),
        "prefill and decoding": lambda: answer(0.0),
        "sampling": lambda: answer(1.0),
    }
    if model.voice is not None:
        calls["flow matching and vocoder"] = lambda: model.token2wav(range(TOKENS))
    return calls


def watched(call: Callable[[], object]) -> list[str]:
    """Return why a call does not run on the device alone: the refusal, and the operators that fell back."""
    faults, usual = [], os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)  # torch_npu writes there past Python
        try:
            call()
        except RuntimeError as error:
            faults.append(f"refused: {first_line(error)}")
        finally:
            os.dup2(usual, 2)
            os.close(usual)
        kept.seek(0)
        said = kept.read().decode(errors="replace")
    return faults + [f"falls back: {name.strip(chr(39))}" for name in dict.fromkeys(FALLBACK.findall(said))]


def examine(subject: Subject) -> Result:
    """Return a finding for each group of stages."""
    from covo_npu.runtime import CovoAudio

    with with_checkpoint(subject) as (named, of):
        loaded: list[CovoAudio] = []
        findings = [_ran("loading", lambda: loaded.append(CovoAudio.load(named.require_ckpt(), named.options)))]
        if not loaded:
            return Result("ops", f"{named.options.device}; {of}", tuple(findings))
        (model,) = loaded
        findings += [_ran(name, call) for name, call in stages(model).items()]
    return Result("ops", f"{model.report.device}, {model.report.backend}, {model.report.dtype}; {of}", tuple(findings))


def _ran(name: str, call: Callable[[], object]) -> Finding:
    faults = watched(call)
    return Finding(name, "; ".join(faults) or "ran", "nothing is refused, nothing falls back", "", not faults)


@check("ops", ckpt=False)
def command(subject: Subject) -> Result:
    """Run every stage on the device. Without --ckpt a small checkpoint with random weights is made, of the real heads.

    Fails if the device refuses a call, or if torch_npu says that an operator falls back to the CPU.
    """
    return examine(subject)
