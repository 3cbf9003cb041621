"""covo-check graphs: a reply that passes the rows of one graph says the same with captured graphs and without."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from covo_npu.kernels.device import GRAPHS, open_device
from covo_npu.runtime.decode import SMALLEST_BOUND
from covo_npu.tools.check.made_up import with_checkpoint
from covo_npu.tools.check.result import Finding, Result, Subject, check
from covo_npu.tools.question import RATE, made_up

TOKENS = 64
ROWS_TO_GO = 8  # from the prompt to the end of the first graph's rows
ENCODER_HZ = 50
SOURCE = "in 16 bits near ties may differ: then look at --dtype float32"


@dataclass(frozen=True, slots=True)
class Reply:
    """What was said, how many rows a graph takes that the reply passed, at which rate, with how many graphs."""

    tokens: list[int]
    bound: int
    tokens_per_s: float
    graphs: int


def reply(subject: Subject, graph: str) -> Reply:
    """Return the answer to a made-up question, so long that the reply goes over to the next graph soon."""
    from covo_npu.runtime import CovoAudio, Engine, Session, prompt

    model = CovoAudio.load(subject.require_ckpt(), replace(subject.options, graph=graph), speech=False)
    without_audio = len(prompt.first_round(model.tokenizer, prompt.DEFAULT_SYSTEM_PROMPT, 0))
    bound = SMALLEST_BOUND
    while bound <= without_audio + TOKENS:
        bound *= 2
    frames = bound - ROWS_TO_GO - without_audio
    question = made_up(frames * 2**model.config.adapter.num_layers / ENCODER_HZ)
    engine, times = Engine(model), []
    for _ in range(2):  # the second one captures nothing any more
        chat = Session(model, engine=engine, mode="a2t", max_new_tokens=TOKENS)
        start = time.perf_counter()
        answer = chat.say(question, RATE)
        times.append(time.perf_counter() - start)
    graphs = model.capture.report.graphs if model.capture else 0
    return Reply(answer.tokens, bound, len(answer.tokens) / times[-1], graphs)


def examine(subject: Subject) -> Result:
    """Return the findings: equal tokens, and what graphs gain."""
    device = open_device(subject.options.device)
    if device.type not in GRAPHS:
        return Result("graphs", str(device), (Finding("graphs", f"{device.type} has none"),))
    with with_checkpoint(subject) as (named, says):
        eager, captured = reply(named, "off"), reply(named, "on")
    pairs = enumerate(zip(eager.tokens, captured.tokens, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(eager.tokens), len(captured.tokens)))
    same = eager.tokens == captured.tokens
    graphs = f"3: the encoder, steps of {captured.bound} rows and of more"
    short = len(captured.tokens) <= 2 * ROWS_TO_GO  # it may have ended before it came to the second graph
    findings = (
        Finding("tokens", f"{first} of {len(eager.tokens)} equal", "all equal", SOURCE, same),
        Finding("graphs", f"{captured.graphs} captured", graphs, "", None if short else captured.graphs == 3),
        Finding(
            "rate of a reply", f"{captured.tokens_per_s:.1f} tokens/s with graphs, {eager.tokens_per_s:.1f} without"
        ),
    )
    return Result("graphs", f"{device}; {says}", findings)


@check("graphs", ckpt=False, loading=("device", "dtype", "backend"))
def command(subject: Subject) -> Result:
    """Answer the same question with captured graphs and without, past the rows of the first graph.

    Without --ckpt a small checkpoint with random weights is made, of the real heads.
    """
    return examine(subject)
