"""Captured graphs on the emulated device: by default, with the same tokens, and with the reason where they fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulation import device
from emulation.graphs import Graph
from emulation.stages import made_up

from covo_npu.kernels import npu
from covo_npu.kernels.device import DeviceCapture, device_capture
from covo_npu.kernels.errors import BackendError
from covo_npu.runtime import CovoAudio, Sampling, Session
from covo_npu.runtime.decode import Decoder
from covo_npu.runtime.evaluations import Evaluations
from covo_npu.runtime.flow import Flow
from covo_npu.runtime.networks.cache import allocate
from covo_npu.runtime.options import SpeechBlocks
from covo_npu.tools.synth.config import PRESETS

DEVICE = torch.device("npu", 0)
AUDIO = Path(__file__).parents[1] / "data" / "audio"


def test_a_dialogue_is_captured_by_default_and_says_what_upstream_says(
    convert_tiny: Callable[[str], Path], golden: Callable[[str], dict[str, np.ndarray]]
) -> None:
    expected = golden("dialogue_fp32_three_rounds_a2t")
    model = CovoAudio.load(convert_tiny("float32"), device="npu:0", speech=False)
    chat = Session(model, mode="a2t", max_new_tokens=48)
    for r in range(2):
        with device.log.recording() as log:
            reply = chat.say(AUDIO / Path(str(expected[f"r{r}_audio"])).name)
        assert reply.tokens == expected[f"r{r}_tokens"].tolist()
    assert model.capture is not None and model.capture.report.graphs >= 2  # the encoder and a step
    assert log.launches.count(("npu::replay", torch.float32)) >= len(reply.tokens)
    assert "npu::npu_gelu" in log.replayed and "aten::argmax.out" in log.replayed


@torch.inference_mode()
def test_a_captured_step_is_one_launch_without_aicpu_and_makes_its_mask_once() -> None:
    model = made_up("npu:0", PRESETS["tiny"])
    cache = allocate(model.config.llm, 1, 512, model.dtype, model.device)
    decoder = Decoder(model.networks.llm, cache, device_capture("auto", DEVICE))
    ids = torch.arange(64, device=DEVICE)
    decoder.begin(0, ids, decoder.fill(0, model.networks.llm.embed(ids), 0), 64, 0, Sampling()).tokens()
    decoder.step(1).tokens()
    with device.log.recording() as log:
        decoder.step(1).tokens()
    assert [name for name, _ in log.launches] == ["npu::replay"] and len(log.synchronisations) == 1
    assert log.replayed.count("aten::logical_not") == 1
    assert log.replayed.count("npu::npu_fused_infer_attention_score") == model.config.llm.num_layers
    assert not log.on_aicpu


@torch.inference_mode()
def test_a_captured_evaluation_of_speech_is_a_replay_and_the_copies_around_it() -> None:
    model = made_up("npu:0", PRESETS["tiny"])
    speech, voice = model.networks.token2wav, model.voice
    assert speech
    evaluations = Evaluations(speech.dit, device_capture("auto", DEVICE))
    codes = torch.cat((voice.prompt_codes, torch.zeros(20, dtype=torch.int64, device=DEVICE)))
    evaluate = evaluations.under(speech.dit.conditions(codes, voice.prompt_latents))
    (time,) = speech.dit.modulations([0.5], voice.speaker_embedding)
    latents = torch.zeros(4 * len(codes), speech.config.dit.latent_dim, device=DEVICE)
    evaluate(latents, time)
    with device.log.recording() as log:
        evaluate(latents, time)
    # latents, zeros behind them, inputs, mask and time go in, the velocities of the reply come out
    copies = ["aten::copy_", "aten::zero_", *["aten::copy_"] * 3]
    assert [name for name, _ in log.launches] == [*copies, "npu::replay", "aten::clone"] and not log.synchronisations
    assert log.replayed.count("npu::npu_fused_infer_attention_score") == speech.config.dit.num_layers
    assert not log.on_aicpu


def launched_and_captured(folder: Path, dtype: str) -> tuple[np.ndarray, np.ndarray, CovoAudio]:
    """Return speech of the same codes without graphs and with, and the model that has them."""
    codes, found = [(7 * i) % 64 for i in range(40)], []
    for graph in ("off", "auto"):
        model = CovoAudio.load(folder, device="npu:0", token2wav_dtype=dtype, graph=graph)
        found.append(model.token2wav(codes, seed=1, flow=Flow(2), blocks=SpeechBlocks()))
    return *found, model


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_speech_is_captured_by_default_and_is_what_is_launched(
    convert_tiny: Callable[[str], Path], dtype: str, apart: float
) -> None:
    launched, captured, model = launched_and_captured(convert_tiny("float32"), dtype)
    assert np.linalg.norm(captured - launched) <= apart * np.linalg.norm(launched)
    assert model.speech_capture and model.capture and model.speech_capture.report.graphs == 2
    assert model.speech_capture._pool != model.capture._pool  # its graphs may run beside those of steps


def test_a_mask_that_the_device_reads_the_other_way_is_seen(
    convert_tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(npu, "key_mask", lambda attended, num_queries: attended.expand(num_queries, -1).contiguous())
    launched, captured, model = launched_and_captured(convert_tiny("float32"), "bfloat16")
    assert np.array_equal(launched, captured) and "attention under a mask off by" in caplog.text
    model = CovoAudio.load(convert_tiny("float32"), device="npu:0", graph="on")
    with pytest.raises(BackendError, match=r"npu:0: flow matching of 128 frames .* again with --graph off"):
        model.token2wav([1] * 9)


def test_the_reason_is_the_operators_not_that_of_the_broken_capture() -> None:
    with pytest.raises(
        BackendError, match=r"npu: work could not be captured as a graph \(operation not .*: item\): st"
    ):
        DeviceCapture(DEVICE)(lambda: torch.ones(1, device=DEVICE).item())
    assert Graph.current is None


@pytest.mark.parametrize("mode", ["thread_local", "global"])
def test_other_threads_go_on_during_a_capture(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As speech does beside the steps: it launches and reads back. In the usual mode, global, that would break them."""
    graph = torch.npu.graph
    monkeypatch.setattr(
        torch.npu, "graph", lambda *args, **kwargs: graph(*args, **kwargs | {"capture_error_mode": mode})
    )
    total, heard = torch.zeros(2, device=DEVICE), []

    def speak() -> None:
        try:
            heard.append((torch.ones(3, device=DEVICE) + 1).cpu().tolist())
        except RuntimeError as error:
            heard.append(str(error))

    def work() -> None:
        total.add_(1)
        speaker = threading.Thread(target=speak)
        speaker.start()
        speaker.join()

    if mode == "global":
        with pytest.raises(BackendError, match="could not be captured"):
            DeviceCapture(DEVICE)(work)
        assert heard[0] == [2, 2, 2] and "not permitted" in heard[1]
        return
    replay = DeviceCapture(DEVICE)(work)
    assert heard == [[2, 2, 2]] * 2 and total.tolist() == [1, 1]
    replay()
    assert heard == [[2, 2, 2]] * 2 and total.tolist() == [2, 2]


def test_a_capture_runs_nothing_and_a_replay_runs_it_once() -> None:
    total = torch.zeros(2, device=DEVICE)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        sum_ = total.add_(1) + total
    assert total.tolist() == [0, 0] and sum_.isnan().all()
    graph.replay()
    graph.replay()
    assert total.tolist() == [2, 2] and sum_.tolist() == [4, 4]


def forgetful(q: Any, k: Any, v: Any, mask: Any, bound: int, scale: float) -> Any:
    """Attention that reads the first tile of 512 rows only. Source: such a report, vllm-ascend issue 15503."""
    return npu_masked(q, k, v, mask, min(bound, 512), scale)


npu_masked = npu.masked_decode_attention


def test_attention_that_forgets_rows_is_not_captured(
    convert_tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, question = convert_tiny("bfloat16"), torch.sin(torch.arange(24000) / 20).numpy()

    def answer(graph: str) -> list[int]:
        model = CovoAudio.load(folder, device="npu:0", speech=False, graph=graph)
        return Session(model, mode="a2t", max_new_tokens=6).say(question, 24000).tokens

    expected = answer("off")
    monkeypatch.setattr(npu, "masked_decode_attention", forgetful)
    monkeypatch.setattr("covo_npu.runtime.decode.SMALLEST_BOUND", 1024)
    assert answer("auto") == expected and "launched one by one" in caplog.text
    with pytest.raises(BackendError, match="under a mask of 1024 rows"):
        answer("on")
