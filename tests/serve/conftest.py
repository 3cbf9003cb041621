"""One tiny model for all tests of the server, and one server for those that leave it as it was."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, sync_playwright
from serve.browser import ahead_of_others, launch, microphone
from serve.harness import CHINESE, Running, serving

from covo_npu.runtime import CovoAudio
from covo_npu.runtime.audio import read_audio
from covo_npu.runtime.resampling import resample
from covo_npu.runtime.wav import write_wav


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """A test that configures the server's log lets it write to a stderr that ends with the test."""
    loggers = [logging.getLogger(name) for name in ("covo_npu.serve", "uvicorn")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def model(convert_tiny: Callable[[str], Path], device: str) -> CovoAudio:
    return CovoAudio.load(convert_tiny("float32"), device=device, dtype="float32", max_context=2600)


@pytest.fixture(scope="session")
def running(model: CovoAudio) -> Iterator[Running]:
    with serving(model) as running:
        yield running


@pytest.fixture(scope="session")
def question_wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 s of a question between silences, 48 kHz: what the microphone of the tests hears, over and over."""
    samples, rate = read_audio(CHINESE)
    spoken = resample(samples, rate, 48_000, torch.float64).numpy()
    path = tmp_path_factory.mktemp("microphone") / "question.wav"
    write_wav(path, np.concatenate([np.zeros(12_000), spoken[:96_000], np.zeros(72_000)]), 48_000)
    return path


@pytest.fixture(scope="module")
def chromium(question_wav: Path) -> Iterator[Browser]:
    """A browser with a microphone. For a module: while Playwright runs, no other event loop can in this thread."""
    with contextlib.ExitStack() as stack:
        with ahead_of_others():
            playwright = stack.enter_context(sync_playwright())
            browser = launch(playwright.chromium, *microphone(question_wav))
        yield browser
        browser.close()
