"""covo-check graphs: a reply that passes the rows of one graph says the same with captured graphs and without.

So does speech of it: two lengths after one another, of which the shorter one leaves frames of a graph unused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from covo_npu.kernels.device import GRAPHS, device_capture, fast_dtype, open_device
from covo_npu.kernels.select import select
from covo_npu.runtime.checkpoint.format import TOKEN2WAV, read_manifest
from covo_npu.runtime.decode import SMALLEST_BOUND
from covo_npu.runtime.token2wav import FLOAT32, SpeechDtypes, Token2Wav
from covo_npu.runtime.voice import Voice
from covo_npu.tools.bench import measure
from covo_npu.tools.check.made_up import with_checkpoint
from covo_npu.tools.check.result import Finding, Result, Subject, check
from covo_npu.tools.check.speech import THREADS_SNR_DB
from covo_npu.tools.check.waveforms import snr_db
from covo_npu.tools.question import RATE, made_up
from covo_npu.tools.speech import load_token2wav, recast

TOKENS = 64
ROWS_TO_GO = 8  # from the prompt to the end of the first graph's rows
ENCODER_HZ = 50
SPEECH_CODES = (75, 70)
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


@torch.inference_mode()
def solved(networks: Token2Wav, voice: Voice, num_codes: int) -> Tensor:
    """Return the latents of a reply of made-up codes, on the host."""
    generator, device = torch.Generator().manual_seed(num_codes), voice.prompt_codes.device
    codes = torch.randint(networks.config.dit.num_codes, (num_codes,), generator=generator).to(device)
    noise = torch.randn(networks.num_frames(num_codes, voice), networks.config.dit.latent_dim, generator=generator)
    *_, latents = networks.solve(torch.cat((voice.prompt_codes, codes)), voice.prompt_latents, noise.to(device), voice)
    return latents.cpu()


def speech(subject: Subject) -> Iterator[Finding]:
    """Yield the findings of flow matching: equal latents in float32, and what graphs gain in the fast dtype."""
    device, folder = open_device(subject.options.device), subject.require_ckpt()
    if TOKEN2WAV not in read_manifest(folder).files:
        return
    kernels = select(subject.options.backend, device)
    networks, voice = load_token2wav(folder, kernels, device)
    captured = recast(networks, kernels, FLOAT32, device_capture("on", device))
    for num_codes in SPEECH_CODES:
        decibels = snr_db(solved(captured, voice, num_codes), solved(networks, voice, num_codes))
        bound = f"at least {THREADS_SNR_DB:.0f} dB"
        holds = decibels >= THREADS_SNR_DB
        yield Finding(f"speech of {num_codes} codes", f"SNR {decibels:.0f} dB", bound, "float32 arithmetic", holds)
    times, dtype = [], fast_dtype(device)
    for capture in (device_capture("on", device), None):
        work = partial(solved, recast(networks, kernels, SpeechDtypes(dtype), capture), voice, SPEECH_CODES[0])
        work()
        times.append(measure.seconds(work, device))
    name = str(dtype).removeprefix("torch.")
    yield Finding("flow matching", f"{times[0]:.3f} s with graphs, {times[1]:.3f} without, {name}")


def examine(subject: Subject) -> Result:
    """Return the findings: equal tokens and speech, and what graphs gain."""
    device = open_device(subject.options.device)
    if device.type not in GRAPHS:
        return Result("graphs", str(device), (Finding("graphs", f"{device.type} has none"),))
    with with_checkpoint(subject) as (named, says):
        eager, captured = reply(named, "off"), reply(named, "on")
        spoken = tuple(speech(named))
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
        *spoken,
    )
    return Result("graphs", f"{device}; {says}", findings)


@check("graphs", ckpt=False, loading=("device", "dtype", "backend"))
def command(subject: Subject) -> Result:
    """Answer the same question with captured graphs and without, past the rows of the first graph, and speak.

    Without --ckpt a small checkpoint with random weights is made, of the real heads.
    """
    return examine(subject)
