"""The worker's end, which the end of the program hides most of the time."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from covo_npu.runtime import CovoAudio, Engine
from covo_npu.serve.errors import ApiError
from covo_npu.serve.service import Service
from covo_npu.serve.settings import Settings
from covo_npu.serve.worker import DRAINING, READY


def test_who_asks_when_the_worker_has_ended_is_told(model: CovoAudio) -> None:
    """A request that was let in before the end and comes to its question after it."""
    service = Service(Engine(model, 1), Settings(slots=1))
    worker = service.worker
    worker.start()
    while worker.state != READY:
        time.sleep(0.01)
    worker.state = DRAINING
    service.close()

    async def ask() -> Any:
        return await asyncio.wait_for(worker.call(lambda: pytest.fail("it runs nothing any more")), 10)

    with pytest.raises(ApiError, match="the server is ending"):
        asyncio.run(ask())
