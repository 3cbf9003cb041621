"""How many operators each stage of the real depth launches and how often the host waits: counts, held exactly.

Heads are those of the real model, other widths are small; the numbers of operators are those of the real model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from emulation import device
from emulation.forecast import VERSIONS, npu_operators
from emulation.launches import Counts, Recorder, count
from emulation.stages import MadeUp, Stages, deep_and_thin, made_up

from covo_npu.kernels import native, npu
from covo_npu.kernels.device import device_capture
from covo_npu.runtime.checkpoint.format import INT8 as INT8_WORDS
from covo_npu.runtime.evaluations import Evaluations
from covo_npu.tools.bench.stock_decode import Stock
from covo_npu.tools.bench.stock_token2wav import StockToken2Wav
from covo_npu.tools.synth.config import PRESETS

LAYERS, BLOCKS = 28, 12  # of LLM and DiT

# stage: the most operators it may launch
BUDGETS = {
    "prefill": 14 * LAYERS + 30,
    "decode": 12 * LAYERS + 20,
    "flow matching": 16 * BLOCKS + 12,  # before, after and between evaluations the 12
}


@pytest.fixture(scope="module")
def model() -> MadeUp:
    return made_up("npu:0")


@pytest.fixture(scope="module")
def ours(model: MadeUp) -> dict[str, Counts]:
    return counts(model)


@torch.inference_mode()
def counts(model: MadeUp, *stages: str) -> dict[str, Counts]:
    return {stage: count(run) for stage, run in Stages(model).runs().items() if stage in stages or not stages}


@pytest.fixture(scope="module")
@torch.inference_mode()
def stock() -> dict[str, Counts]:
    """The stock paths on such weights: transformers for encoder and decoder, a direct port for speech.

    The decoder's sampling is greedy with both penalties. The encoder runs in float32, because the device's
    convolutions do not take bfloat16.
    """
    model = made_up("npu:0")
    path: Any = Stock(model)
    inputs, sizes, encoder = Stages(model), model.config.llm, path.encoder.float()
    ids = torch.cat((inputs.ids, inputs.ids[:1]))[None]
    shape = (1, sizes.num_kv_heads, len(inputs.ids), sizes.head_dim)
    rows = tuple(inputs.mel.new_zeros(shape) for _ in range(2 * sizes.num_layers))
    speech = StockToken2Wav(inputs.token2wav, model.voice)
    z, known, time = (x.new_zeros(2, *x.shape) for x in (inputs.noise, inputs.noise, inputs.noise[0, 0]))
    tokens_in = z.new_zeros(*z.shape[:2], speech.config.dit.hidden_size)

    def tokens(number: int) -> Counts:
        return count(lambda: path.continuation(ids, rows, number))

    return {
        "encode": count(lambda: encoder(inputs.mel.float())),
        "prefill": count(lambda: path.llm(inputs_embeds=inputs.embeddings[None], use_cache=True, logits_to_keep=1)),
        "decode": tokens(5).minus(tokens(4)),
        # without guidance and the step, which ours has
        "flow matching": count(lambda: speech.velocity(time, z, tokens_in, known)),
        "vocoder": count(lambda: speech.vocoder(inputs.latents)),
    }


@torch.inference_mode()
def test_a_captured_evaluation_of_the_real_depth_is_seven_launches(model: MadeUp, ours: dict[str, Counts]) -> None:
    """Instead of some 200; guidance and the step of the ODE, which stay outside, come on top of both."""
    stages = Stages(model)
    evaluate = Evaluations(stages.token2wav.dit, device_capture("on", model.device)).under(stages._conditions())
    (time,) = stages.token2wav.dit.modulations([0.5], model.voice.speaker_embedding)
    found = count(lambda: evaluate(stages.noise, time))
    assert (found.launches, found.operators["npu::replay"], found.waits, found.on_aicpu) == (7, 1, 0, 0)
    assert ours["flow matching"].launches > 150


def test_every_stage_keeps_to_its_budget(model: MadeUp, ours: dict[str, Counts]) -> None:
    assert model.config.llm.num_layers == LAYERS and model.config.token2wav.dit.num_layers == BLOCKS
    launches = {stage: ours[stage].launches for stage in BUDGETS}
    assert all(0 < launches[stage] <= most for stage, most in BUDGETS.items()), launches


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_has_a_kernel_for_what_is_launched(ours: dict[str, Counts], version: str) -> None:
    launched = {name.partition(".")[0] for found in ours.values() for name in found.operators}
    of_pytorch = {name for name in launched if name.startswith("aten::")}
    assert len(of_pytorch) > 30 and of_pytorch <= npu_operators(version)


def test_nothing_of_a_reply_runs_on_the_aicpu(ours: dict[str, Counts]) -> None:
    assert {stage: found.on_aicpu for stage, found in ours.items()} == dict.fromkeys(ours, 0)


@torch.inference_mode()
def test_booleans_that_are_scattered_would_be_seen() -> None:
    seen = torch.zeros(2, 9, dtype=torch.bool, device="npu:0")
    assert count(lambda: seen.scatter_(1, torch.ones(2, 1, dtype=torch.int64, device="npu:0"), True)).on_aicpu == 1


def test_a_decoded_token_waits_once_and_nothing_before_it_waits(ours: dict[str, Counts]) -> None:
    waits = {stage: found.waits for stage, found in ours.items() if stage != "flow set-up"}
    assert waits == {stage: int(stage.startswith("decode")) for stage in waits}


def test_fewer_launches_than_the_stock_path(ours: dict[str, Counts], stock: dict[str, Counts]) -> None:
    assert stock["decode"].launches > 1000
    assert all(ours[stage].launches < found.launches for stage, found in stock.items())
    assert 2 * ours["vocoder"].launches <= stock["vocoder"].launches


INT8 = "npu::npu_weight_quant_batchmatmul"


@pytest.fixture(scope="module")
def eight() -> MadeUp:
    """The same networks with weights in 8 bits."""
    return made_up("npu:0", int8=INT8_WORDS["int8"])


def products_in_8_bits(found: Counts) -> int:
    return sum(count for name, count in found.operators.items() if name.partition(".")[0] == INT8)


def test_weights_in_8_bits_launch_no_more(eight: MadeUp, ours: dict[str, Counts]) -> None:
    """Each product of a layer is one operator, as in bfloat16; what runs on the AICPU and what waits stays, too."""
    found = counts(eight, "prefill", "decode")
    assert {stage: products_in_8_bits(each) for stage, each in found.items()} == dict.fromkeys(found, 4 * LAYERS)
    for stage, each in found.items():
        assert each.launches <= ours[stage].launches
        assert (each.waits, each.on_aicpu) == (ours[stage].waits, ours[stage].on_aicpu)


def test_scales_of_another_dtype_would_cost_launches(
    eight: MadeUp, ours: dict[str, Counts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: scales and biases as they lie in the file would be cast at every product."""
    monkeypatch.setattr(npu, "int8_dtypes", native.int8_dtypes)
    wasteful = made_up("npu:0", int8=INT8_WORDS["int8"])
    monkeypatch.undo()
    assert counts(wasteful, "decode")["decode"].launches > ours["decode"].launches


def test_a_head_of_the_published_size_in_8_bits_is_three_products_and_a_join(
    eight: MadeUp, ours: dict[str, Counts]
) -> None:
    """168055 rows, of which one product takes 65535. A decoded token keeps to its budget, and waits no more."""
    config = deep_and_thin()
    published = replace(config, llm=replace(config.llm, vocab_size=PRESETS["full"].llm.vocab_size))
    found = counts(made_up("npu:0", published, int8=INT8_WORDS["int8+head"]), "decode")["decode"]
    assert products_in_8_bits(found) == 4 * LAYERS + 3
    assert found.launches == counts(eight, "decode")["decode"].launches + 3 <= BUDGETS["decode"]
    assert (found.waits, found.on_aicpu) == (ours["decode"].waits, ours["decode"].on_aicpu)


def test_kernels_that_waste_launches_break_the_budgets(model: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu, "swiglu", native.swiglu)
    monkeypatch.setattr(npu, "rotary", native.rotary)
    wasteful = counts(model, *BUDGETS)
    assert all(wasteful[stage].launches > most for stage, most in BUDGETS.items())


def test_a_recorder_sees_the_waits_that_the_device_logs() -> None:
    decode = Stages(made_up("npu:0", PRESETS["tiny"])).runs()["decode, sampled"]
    x = torch.ones(3, device="npu:0")
    for run in (lambda: x.nonzero(), lambda: x.sum().item(), lambda: x.cpu(), lambda: x.cpu() + x.cpu()):
        with torch.no_grad(), device.log.recording() as log, Recorder() as recorder:
            run()
        assert recorder.waits == len(log.synchronisations) > 0
    with torch.no_grad():
        found = count(decode)
    assert found.waits == 1 and found.launches > 0
