"""What is counted of questions: each ends in one way, and pauses are those that somebody hears."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
import torch

from covo_npu.runtime import CovoAudio, Engine
from covo_npu.runtime.engine import Dialogue
from covo_npu.runtime.events import Audio, Ticket
from covo_npu.runtime.options import Ask
from covo_npu.serve import worker
from covo_npu.serve.errors import ApiError
from covo_npu.serve.metrics import Meter, Metrics
from covo_npu.serve.service import Service
from covo_npu.serve.settings import Settings
from covo_npu.serve.worker import READY, Question, ReplyStream

Use = Callable[[Service, ReplyStream], Awaitable[None]]


def ends(model: CovoAudio, use: Use) -> dict[str, float]:
    """Return how often a question ended in each way, after something was done with its reply."""
    service = Service(Engine(model, 1), Settings(slots=1))
    question = Question(torch.zeros(24_000), Ask("a2t", max_new_tokens=40), lambda _: Dialogue(), lambda *_: None)

    async def run() -> None:
        service.worker.start()
        while service.worker.state != READY:
            await asyncio.sleep(0.01)
        async with service.worker.reply(question) as stream:
            await use(service, stream)
        while service.worker._streams:
            await asyncio.sleep(0.01)

    try:
        asyncio.run(run())
    finally:
        service.close()
    families = (service.metrics.success, service.metrics.fail)
    samples = [sample for family in families for metric in family.collect() for sample in metric.samples]
    counts = [sample for sample in samples if sample.name.endswith("_total") and sample.value]
    return {next(iter(sample.labels.values())): sample.value for sample in counts}


async def interrupted_at_the_end(service: Service, stream: ReplyStream) -> None:
    while not stream.complete:
        await asyncio.sleep(0.01)
    assert await stream.interrupt(keep=True)


async def interrupted(service: Service, stream: ReplyStream) -> None:
    assert not await stream.interrupt(keep=False)


async def left(service: Service, stream: ReplyStream) -> None:
    pass


async def failing(service: Service, stream: ReplyStream) -> None:
    with pytest.raises(ApiError):
        await stream.whole()


async def broken(service: Service, stream: ReplyStream) -> None:
    service.worker.engine.step = lambda: 1 / 0  # type: ignore[method-assign]
    await failing(service, stream)


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (interrupted_at_the_end, "stop"),
        (interrupted, "interrupted"),
        (left, "cancelled"),
        (broken, "failed"),
    ],
)
def test_a_question_ends_in_one_way(model: CovoAudio, use: Use, expected: str) -> None:
    assert ends(model, use) == {expected: 1}


def test_a_reply_that_is_not_read_fails_once(model: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MAX_UNREAD_SAMPLES", -1)
    assert ends(model, failing) == {"reader too slow": 1}


@pytest.mark.parametrize(("streamed", "pauses", "seconds"), [(True, 2, 1.5), (False, 0, 0.0)])
def test_only_a_stream_can_pause(streamed: bool, pauses: int, seconds: float) -> None:
    """Two seconds of speech a piece, the next one after two, two and a half and three: of a reply that is sent whole,
    nobody hears when its pieces were made."""
    metrics, moments = Metrics(), iter((0.0, 1.0, 3.0, 5.5, 8.5))
    meter = Meter(metrics, streamed, lambda: next(moments))
    for _ in range(4):
        meter.see(Audio(Ticket(1), np.zeros(48_000, np.float32)))
    value = metrics.registry.get_sample_value
    assert value("covo_audio_underrun_total") == pauses
    assert value("covo_audio_underrun_seconds_total") == pytest.approx(seconds)
