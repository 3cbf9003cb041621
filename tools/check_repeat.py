"""covo-check repeat: the same question twice gives the same tokens, the same text and the same waveform."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from covo_npu.tools.check_result import (
    CheckError,
    Finding,
    Result,
    Subject,
    ckpt_option,
    device_option,
    json_option,
    show,
    verbose_option,
    wav_argument,
)

if TYPE_CHECKING:
    from covo_npu.runtime.model import CovoAudio

TOKENS = 64
TEMPERATURE, REPETITION_PENALTY = 0.0, 1.05
DOCUMENT = "the Ascend document: two runs, 64 of 64 tokens equal"
THREADS = "PyTorch promises equal sums for equal thread counts only"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one run gave: tokens, text, and the bytes of its WAV file."""

    tokens: tuple[int, ...]
    text: str
    wav: bytes


def in_process(model: CovoAudio, wav: Path) -> Answer:
    """Return the answer of a new dialogue in this process."""
    import torch

    from covo_npu.runtime.audio import write_wav

    sampling = replace(model.generation.sampling, temperature=TEMPERATURE, repetition_penalty=REPETITION_PENALTY)
    mode = "a2ta" if model.networks.token2wav else "a2t"
    reply = model.session(mode, sampling, TOKENS, seed=0).say(wav)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reply.wav"
        write_wav(path, torch.from_numpy(reply.waveform), reply.sample_rate)
        return Answer(tuple(reply.tokens), reply.text, path.read_bytes() if reply.waveform.size else b"")


def in_own_process(ckpt: Path, wav: Path, device: str, speaks: bool, threads: int | None = None) -> Answer:
    """Return the answer of covo-run. Raises CheckError with the last line of its stderr if it fails."""
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *safe_path, "-m", "covo_npu.runtime.cli", "--ckpt", str(ckpt), "--device", device]
        command += [
            "--mode",
            "a2ta" if speaks else "a2t",
            "--max-new-tokens",
            str(TOKENS),
            "--seed",
            "0",
            "--json",
            "-",
        ]
        command += ["--temperature", str(TEMPERATURE), "--repetition-penalty", str(REPETITION_PENALTY), "--quiet"]
        command += ["--output", folder, *(["--threads", str(threads)] if threads else []), "--", str(wav)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CheckError(f"covo-run failed: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}")
        reply = json.loads(done.stdout)["rounds"][0]
        speech = Path(reply["wav"]).read_bytes() if reply["wav"] else b""
    return Answer(tuple(reply["tokens"]), reply["text"], speech)


def differences(first: Answer, second: Answer, where: str, source: str, promised: bool = True) -> list[Finding]:
    """Return the findings of two answers. promised: False where a difference is no fault."""
    equal = sum(a == b for a, b in zip(first.tokens, second.tokens))
    count = max(len(first.tokens), len(second.tokens))
    rows = [
        ("tokens", equal == count, f"{equal} of {count} equal"),
        ("text", first.text == second.text, "equal" if first.text == second.text else "differs"),
        ("waveform", first.wav == second.wav, _waveform(first.wav, second.wav)),
    ]
    bound = "all equal" if promised else "not promised"
    return [
        Finding(f"{name}, {where}", measured, bound, source, holds if promised else None)
        for name, holds, measured in rows
    ]


def examine(subject: Subject) -> Result:
    """Return the findings: twice in one process, in two more processes, and with one thread."""
    import torch

    from covo_npu.runtime import CovoAudio

    if subject.ckpt is None:
        raise CheckError("repeat needs a checkpoint: give --ckpt")
    with tempfile.TemporaryDirectory() as folder:
        wav = subject.wav or _made_up(Path(folder))
        model = CovoAudio.load(subject.ckpt, device=subject.device)
        first, again = in_process(model, wav), in_process(model, wav)
        device, speaks = model.report.device, model.networks.token2wav is not None
        subject_line = (
            f"{model.report.backend} on {device}, {model.report.dtype}, {len(first.tokens)} tokens, {wav.name}"
        )
        findings = differences(first, again, "twice in a process", DOCUMENT)
        del model
        other = in_own_process(subject.ckpt, wav, device, speaks)
        findings += differences(first, other, "in another process", "same machine, device and thread count")
        if torch.get_num_threads() > 1:
            single = in_own_process(subject.ckpt, wav, device, speaks, threads=1)
            findings += differences(other, single, "with one host thread", THREADS, promised=False)
    return Result("repeat", subject_line, tuple(findings))


def _made_up(folder: Path) -> Path:
    import torch

    from covo_npu.runtime.audio import write_wav
    from covo_npu.tools.question import RATE, made_up

    path = folder / "question.wav"
    write_wav(path, torch.from_numpy(made_up()), RATE)
    return path


def _waveform(first: bytes, second: bytes) -> str:
    if not first and not second:
        return "no speech"
    return f"{len(first)} bytes equal" if first == second else "differs"


@click.command("repeat")
@wav_argument
@ckpt_option()
@device_option
@json_option
@verbose_option
def command(wav: Path | None, ckpt: Path, device: str, as_json: bool, **options: Any) -> int:
    """Ask the same question several times: temperature 0, repetition penalty 1.05, 64 tokens, one seed.

    Without WAV a question is made up.
    """
    return show(examine(Subject(ckpt, wav, device)), as_json)
