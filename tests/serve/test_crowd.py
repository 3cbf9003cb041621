"""Many clients that leave at random moments: every place and slot comes back, and nothing is left of them."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest
from serve.crowd import EXPECTED, crowd
from serve.harness import ENGLISH, MODEL, serving, spoken

from covo_npu.runtime import CovoAudio
from covo_npu.runtime.engine import _Round
from covo_npu.serve.realtime.connection import Session
from covo_npu.serve.worker import ReplyStream

VISITS, AT_A_TIME, MOST_S = 120, 24, 25.0


def left() -> tuple[int, int]:
    """Objects of replies and sessions that are still there, and open files."""
    gc.collect()
    kept = sum(type(thing) in (ReplyStream, Session, _Round) for thing in gc.get_objects())
    return kept, len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_clients_that_leave_take_nothing_with_them(model: CovoAudio) -> None:
    others = set(threading.enumerate())  # of a server that all tests share
    with serving(model, slots=3, queue=9, sessions=20, parked_bytes=4 << 20) as running:
        client, asked = running.client(), {"model": MODEL, "messages": [spoken(ENGLISH)], "max_completion_tokens": 5}
        before = client.chat.completions.create(**asked).choices[0].message.content  # type: ignore[call-overload]
        assert running.idle()
        files = left()[1]
        seen = crowd(running.port, AT_A_TIME, seconds=MOST_S, seed=1, most=VISITS)
        assert not set(seen) - EXPECTED, seen
        assert sum(seen.values()) >= AT_A_TIME and seen["gone"] and seen["200"]
        assert running.idle()
        worker = running.service.worker
        assert worker.dialogues.bytes <= 4 << 20 and len(worker.engine._undelivered) == 0
        end = time.monotonic() + 20
        while (running.service.sessions or left()[0] or left()[1] > files) and time.monotonic() < end:
            time.sleep(0.1)
        assert not running.service.sessions and left()[0] == 0 and left()[1] <= files
        assert client.chat.completions.create(**asked).choices[0].message.content == before  # type: ignore[call-overload]
    assert not set(threading.enumerate()) - others
