"""The networks: filled once, with what their files hold, and not changed by anything that is computed with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from covo_npu.runtime import Ask, CovoAudio, Engine, Sampling, Session
from covo_npu.runtime import model as runtime_model
from covo_npu.runtime.checkpoint import loader
from covo_npu.runtime.checkpoint.format import TOKEN2WAV, CheckpointError
from covo_npu.runtime.cli.batch import Item, answers
from covo_npu.runtime.flow import Flow
from covo_npu.runtime.networks.bigvgan import Stream
from covo_npu.runtime.networks.files import expected_tensors, fill
from covo_npu.runtime.networks.layers import Linear, parameter
from covo_npu.runtime.voice import Voice
from covo_npu.tools.synth.config import PRESETS

AUDIO = Path(__file__).parents[1] / "data" / "audio"
QUESTION = AUDIO / "question_en_48k_24bit.wav"
ConvertTiny = Callable[[str], Path]


@pytest.fixture
def model(convert_tiny: ConvertTiny, device: str) -> CovoAudio:
    return CovoAudio.load(convert_tiny("bfloat16"), device=device, dtype="bfloat16")


@pytest.fixture
def one_thread() -> None:
    """Inside an operator: side by side they would only wait for each other's."""
    torch.set_num_threads(1)


def other_voice(model: CovoAudio) -> Voice:
    assert model.voice is not None
    return replace(
        model.voice, prompt_latents=model.voice.prompt_latents[:40], prompt_codes=model.voice.prompt_codes[:10]
    )


# --- nothing changes


def state(value: Any, path: str) -> Iterator[tuple[str, object]]:
    """Yield (path, what tells a change) of all that hangs on a value: identity, place and version of every tensor."""
    if isinstance(value, Tensor):
        yield path, (id(value), value.data_ptr(), value._version, value.dtype, tuple(value.shape))
    elif isinstance(value, dict):
        yield path, list(value)
        for key, item in value.items():
            yield from state(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple, set)):
        yield path, len(value)
        for index, item in enumerate(value):
            yield from state(item, f"{path}[{index}]")
    elif isinstance(value, nn.Module):
        yield from state(vars(value), path)
    else:
        yield path, value if isinstance(value, (bool, int, float, str, torch.dtype)) else id(value)


def everything(model: CovoAudio) -> dict[str, object]:
    networks = (model.networks.llm, model.networks.encoder, model.speech)
    return dict(pair for network in networks for pair in state(network, type(network).__name__))


@pytest.mark.usefixtures("one_thread")
def test_nothing_that_is_computed_changes_the_networks(model: CovoAudio) -> None:
    before = everything(model)
    assert len(before) > 2000
    chat = Session(model, sampling=Sampling(temperature=0.5), max_new_tokens=12)
    chat.say(QUESTION)
    chat.say(QUESTION)
    Session(model, mode="a2t", max_new_tokens=4).say(QUESTION)
    items = [Item(str(i), (QUESTION,)) for i in range(3)]
    assert len(list(answers(Engine(model, 2), items, Ask(max_new_tokens=4)))) == 3
    model.token2wav([1, 2, 3], voice=other_voice(model), flow=Flow(2, "euler"))
    model.token2wav(list(range(40)))
    with torch.inference_mode():
        stream = Stream()
        for _ in range(3):
            model.speech.vocoder.step(torch.randn(1, 8, 20, device=model.device), stream, ends=False)
    after = everything(model)
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == set()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.speech, "voice", 1),
        lambda model: model.speech.dit.blocks[1].fc1.weight.mul_(1),
        lambda model: model.speech.vocoder.stages[0].layers[0].act1.derive(),
        lambda model: model.networks.llm.layers[2].qkv_proj.half(),
        lambda model: setattr(model.networks.encoder.adapter.layers[0].conv, "stride", 1),
    ],
    ids=["an attribute", "a value", "a buffer", "a dtype", "a number"],
)
def test_a_change_would_be_seen(model: CovoAudio, change: Callable[[CovoAudio], object]) -> None:
    before = everything(model)
    change(model)
    assert before != everything(model)


# --- filled once


@pytest.mark.usefixtures("one_thread")
def test_speech_is_filled_once_whoever_asks_first(model: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []

    def slowly(network: nn.Module, *arguments: Any) -> None:
        filled.append(network)
        time.sleep(0.05)
        fill(network, *arguments)

    monkeypatch.setattr(runtime_model, "fill", slowly)
    with ThreadPoolExecutor(8) as pool:
        waveforms = list(pool.map(lambda seed: model.token2wav([5, 6, 7], seed=seed), [1, 2] * 8))
    assert filled == [model.networks.token2wav]
    for waveform, expected in zip(waveforms, [waveforms[0], waveforms[1]] * 8, strict=True):
        assert np.array_equal(waveform, expected)


@pytest.mark.usefixtures("one_thread")
def test_requests_with_other_voices_and_solvers_run_side_by_side(model: CovoAudio) -> None:
    assert model.voice is not None
    requests = [(voice, flow) for voice in (model.voice, other_voice(model)) for flow in (Flow(3), Flow(4, "euler"))]

    def speak(request: tuple[Voice, Flow]) -> np.ndarray:
        return model.token2wav([5, 6, 7, 8], voice=request[0], flow=request[1])

    alone = [speak(request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(speak, requests * 3))
    for waveform, expected in zip(together, alone * 3, strict=True):
        assert np.array_equal(waveform, expected)
    assert not np.array_equal(alone[0], alone[1])


def test_text_does_not_wait_for_the_weights_of_speech_and_speech_does(
    convert_tiny: ConvertTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), loader._populated

    def populated(flat: Tensor, block: Any) -> bool:
        if block.opened.record.name == TOKEN2WAV:
            gate.wait(60)
        return real(flat, block)

    monkeypatch.setattr(loader, "_populated", populated)
    model = CovoAudio.load(convert_tiny("float32"), device="cpu")
    assert len(Session(model, mode="a2t", max_new_tokens=3).say(QUESTION).tokens) == 3
    assert not gate.is_set()
    with ThreadPoolExecutor(1) as pool:
        speech = pool.submit(model.token2wav, [1, 2])
        time.sleep(0.5)
        assert not speech.done()
        gate.set()
        assert speech.result(60).size


def test_without_speech_its_file_is_not_opened(convert_tiny: ConvertTiny) -> None:
    model = CovoAudio.load(convert_tiny("float32"), device="cpu", speech=False)
    assert TOKEN2WAV not in model.weights.files and model.voice is None


# --- what fill puts where


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = parameter(2)
        self.codes = nn.Parameter(torch.empty(3, dtype=torch.int8), requires_grad=False)


def mixed(dtype: torch.dtype) -> Mixed:
    with torch.device("meta"):
        return Mixed().to(dtype)


def test_floats_become_what_the_module_wants_and_integers_stay() -> None:
    network, codes = mixed(torch.bfloat16), torch.tensor([1, -2, 3], dtype=torch.int8)
    scale = torch.tensor([1.0, 2.0009765625])
    fill(network, {"x.scale": scale, "x.codes": codes}, "x.")
    assert network.scale.dtype == torch.bfloat16 and torch.equal(network.scale, scale.bfloat16())
    assert network.codes.dtype == torch.int8 and network.codes.data_ptr() == codes.data_ptr()
    network = mixed(torch.float32)
    fill(network, {"x.scale": scale, "x.codes": codes}, "x.")
    assert network.scale.data_ptr() == scale.data_ptr(), "no copy where the dtype is right"


def test_tensors_that_do_not_fit_are_listed(model: CovoAudio) -> None:
    with torch.device("meta"):
        network = Linear(model.kernels, 3, 2)
    with pytest.raises(
        CheckpointError, match=r"1 missing: llm\.bias; 1 unexpected: weight; 1 of another shape: llm\.weight"
    ):
        fill(network, {"llm.weight": torch.zeros(2, 4), "weight": torch.zeros(2, 3)}, "llm.")


def test_a_module_a_file() -> None:
    files = expected_tensors(PRESETS["tiny"])
    assert list(files) == ["llm", "encoder", "token2wav"]
    tops = {stem: {name.partition(".")[0] for name in names} for stem, names in files.items()}
    assert tops["llm"] == {"llm"} and tops["encoder"] == {"encoder", "adapter"}
    assert tops["token2wav"] == {"voice", "statistics", "dit", "vocoder"}
