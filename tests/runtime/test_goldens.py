"""The whole pipeline, from a WAV file through the converter and the public API, against what upstream computed.

float32: every token of every dialogue is identical. bfloat16: logits by the rule of twice the error. The tolerances are
those of float32 arithmetic in another order; the goldens' smallest gap between two candidates is 0.0088.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from covo_npu.runtime import CovoAudio, Session, prompt
from covo_npu.runtime.audio import prepare, read_audio
from covo_npu.runtime.networks.cache import SharedPrefixes
from covo_npu.runtime.networks.files import Networks

Golden = Callable[[str], dict[str, np.ndarray]]
AUDIO = Path(__file__).parents[1] / "data" / "audio"
QUESTIONS = ("question_en_48k_24bit", "question_zh_44k_stereo", "long_16k_over30s")
DIALOGUES = (
    ("dialogue_fp32_two_rounds_a2ta", "a2ta", 48),
    ("dialogue_fp32_three_rounds_a2t", "a2t", 48),
    ("dialogue_fp32_long_a2ta", "a2ta", 48),
)


@pytest.fixture(scope="module")
def model(convert_tiny: Callable[[str], Path], device: str) -> CovoAudio:
    """Without captured steps, whose values in between cannot be looked at; test_decode.py has the tokens of those."""
    return CovoAudio.load(
        convert_tiny("float32"), device=device, dtype="float32", token2wav_dtype="float32", graph="off"
    )


def relative_l2(found: torch.Tensor, expected: np.ndarray) -> float:
    reference = torch.as_tensor(expected).double()
    return float((found.cpu().double() - reference).norm() / reference.norm())


def recorded_logits(model: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return a list that fills with the logits [V] of every step that the model takes from now on."""
    steps: list[torch.Tensor] = []
    head = model.networks.llm.logits

    def record(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        steps.append(logits[0].cpu())
        return logits

    monkeypatch.setattr(model.networks.llm, "logits", record)
    return steps


@pytest.mark.parametrize("question", QUESTIONS)
def test_encoder_and_adapter(model: CovoAudio, golden: Golden, question: str) -> None:
    expected = golden(f"encoder_{question}")
    seen: list[torch.Tensor] = []
    whisper = model.networks.encoder.encoder
    handle = whisper.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    features = model.encode(prepare(*read_audio(AUDIO / f"{question}.wav")))
    handle.remove()
    states = torch.stack(seen)
    assert relative_l2(states[:, ::25], expected["encoder_sample"]) <= 1e-5
    assert relative_l2(states.mean(1), expected["encoder_mean"]) <= 1e-5
    assert relative_l2(features, expected["adapter"].reshape(features.shape)) <= 1e-5


@pytest.fixture(params=["converted", "computed"])
def system_prompt(request: pytest.FixtureRequest) -> str:
    """Where its rows come from: the checkpoint, or the first dialogue."""
    return str(request.param)


def forget_converted(model: CovoAudio, system_prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt.shared(model.tokenizer, prompt.DEFAULT_SYSTEM_PROMPT)
    assert model.prefixes.get(ids) is not None
    if system_prompt == "computed":
        monkeypatch.setattr(model, "prefixes", SharedPrefixes())


@pytest.mark.parametrize(("name", "mode", "limit"), DIALOGUES)
def test_dialogue_token_for_token(
    model: CovoAudio,
    golden: Golden,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mode: str,
    limit: int,
    system_prompt: str,
) -> None:
    forget_converted(model, system_prompt, monkeypatch)
    expected = golden(name)
    steps = recorded_logits(model, monkeypatch)
    chat = Session(model, mode=mode, max_new_tokens=limit)
    rounds = sum(key.endswith("_tokens") for key in expected)
    for r in range(rounds):
        steps.clear()
        reply = chat.say(AUDIO / Path(str(expected[f"r{r}_audio"])).name)
        logits = torch.as_tensor(expected[f"r{r}_logits"])
        assert reply.prompt_tokens == len(expected[f"r{r}_input_ids"])
        assert (torch.stack(steps[: len(logits)]) - logits).abs().max() <= 1e-4 * logits.std()
        assert reply.tokens == expected[f"r{r}_tokens"].tolist(), f"round {r}"


def test_bfloat16_logits_have_at_most_twice_upstreams_error(
    convert_tiny: Callable[[str], Path],
    golden: Golden,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    system_prompt: str,
) -> None:
    half, exact = golden("dialogue_bf16_two_rounds_a2ta"), golden("dialogue_fp32_two_rounds_a2ta")
    model = CovoAudio.load(convert_tiny("bfloat16"), device=device, graph="off")
    assert model.dtype == torch.bfloat16
    forget_converted(model, system_prompt, monkeypatch)
    steps = recorded_logits(model, monkeypatch)
    Session(model, mode="a2ta", max_new_tokens=1).say(AUDIO / str(exact["r0_audio"]))
    expected = torch.as_tensor(exact["r0_logits"][0])
    upstreams = (torch.as_tensor(half["r0_logits"][0]) - expected).norm()
    assert 0 < (steps[0] - expected).norm() <= 2 * upstreams


@pytest.mark.parametrize("count", [1, 15, 60])
def test_token2wav(model: CovoAudio, golden: Golden, count: int) -> None:
    expected = golden(f"token2wav_{count}")
    waveform = model.token2wav(expected["tokens"].tolist(), noise=expected["noise"])
    error = waveform - expected["wav"]
    assert waveform.shape == expected["wav"].shape
    assert 10 * np.log10((expected["wav"] ** 2).sum() / (error**2).sum()) >= 80  # dB


def test_nothing_is_left_on_meta_and_nothing_was_initialised(convert_tiny: Callable[[str], Path]) -> None:
    """Every weight of the networks is a tensor of the files: same memory for mapped loads, so nobody filled another."""
    with pytest.MonkeyPatch.context() as patch:
        for fill in ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_", "xavier_uniform_"):
            patch.setattr(torch.nn.init, fill, _refuse)
        for fill in ("normal_", "uniform_"):
            patch.setattr(torch.Tensor, fill, _refuse)
        model = CovoAudio.load(convert_tiny("float32"), device="cpu", dtype="float32")
        assert model.speech is model.networks.token2wav
    files = {tensor.data_ptr() for tensor in model.weights.tensors.values() if tensor.numel()}
    networks: Networks = model.networks
    for network in (networks.llm, networks.encoder, networks.token2wav):
        for name, tensor in network.state_dict().items():
            assert tensor.data_ptr() in files, f"{name} is a copy"
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            assert tensor.device.type != "meta", name


def _refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("the runtime initialised something")
