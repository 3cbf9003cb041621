"""covo-check repeat: the same question twice gives the same tokens, the same text and the same waveform."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from covo_npu.kernels.device import open_device
from covo_npu.kernels.select import select
from covo_npu.runtime.checkpoint.format import read_manifest
from covo_npu.runtime.options import PRODUCTS
from covo_npu.runtime.process import module_command
from covo_npu.tools.check.result import CheckError, Finding, Result, Subject, check
from covo_npu.tools.question import write_made_up

TOKENS = 64
SETTINGS = ("--temperature", "0", "--repetition-penalty", "1.05", "--seed", "0", "--max-new-tokens", str(TOKENS))
LOADING = ("device", "dtype", "backend", "products", "graph", "tp")  # options of loading that are handed on
DOCUMENT = "the Ascend document: two runs, 64 of 64 tokens equal"
THREADS = "PyTorch promises equal sums for equal thread counts only"


def ask(subject: Subject, wav: Path, mode: str, *more: str) -> dict[str, Any]:
    """Return the round that covo-run reports, "speech" the bytes of its WAV file. Raises CheckError if it fails."""
    arguments = ["--ckpt", str(subject.ckpt), "--mode", mode, *SETTINGS, *more, "--quiet", "--json", "-"]
    for name in LOADING:
        if (value := getattr(subject.options, name)) is not None:
            arguments += [f"--{name}", str(value)]
    with tempfile.TemporaryDirectory() as folder:
        command = module_command("covo_npu.runtime.cli.run", *arguments, "--output", folder, "--", str(wav))
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CheckError(f"covo-run failed: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}")
        reply: dict[str, Any] = json.loads(done.stdout)["rounds"][0]
        return {**reply, "speech": Path(reply["wav"]).read_bytes() if reply["wav"] else b""}


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], where: str, source: str, promised: bool = True
) -> list[Finding]:
    """Return the findings of two rounds. promised: False where a difference is no fault."""
    count = max(len(first["tokens"]), len(second["tokens"]))
    equal = sum(a == b for a, b in zip(first["tokens"], second["tokens"]))
    words = {True: "equal", False: "differs"}
    measured = {
        "tokens": f"{equal} of {count} equal",
        "text": words[first["text"] == second["text"]],
        "speech": f"{len(first['speech'])} bytes, {words[first['speech'] == second['speech']]}",
    }
    bound = "all equal" if promised else "not promised"
    return [
        Finding(f"{name}, {where}", says, bound, source, first[name] == second[name] if promised else None)
        for name, says in measured.items()
    ]


def examine(subject: Subject) -> Result:
    """Return the findings: two processes, and a third one with one host thread."""
    options = subject.options
    if options.products is None and options.backend in (None, "cpu"):  # a measurement may end otherwise each time
        kernels = select(options.backend, open_device(options.device))
        fixed = PRODUCTS[0] if kernels.name == "cpu" else None
        subject = replace(subject, options=replace(options, products=fixed))
    mode = "a2ta" if read_manifest(subject.require_ckpt()).config.token2wav else "a2t"
    with tempfile.TemporaryDirectory() as folder:
        wav = subject.wav or write_made_up(Path(folder) / "question.wav")
        first = ask(subject, wav, mode)
        findings = differences(first, ask(subject, wav, mode), "again", DOCUMENT)
        if len(os.sched_getaffinity(0)) > 1:
            single = ask(subject, wav, mode, "--threads", "1")
            findings += differences(first, single, "with one host thread", THREADS, promised=False)
    return Result(
        "repeat", f"{subject.options.device}, {mode}, {len(first['tokens'])} tokens, {wav.name}", tuple(findings)
    )


@check("repeat", wav=True, loading=LOADING)
def command(subject: Subject) -> Result:
    """Ask the same question in processes of their own: temperature 0, repetition penalty 1.05, 64 tokens, one seed.

    Without WAV a question is made up.
    """
    return examine(subject)
