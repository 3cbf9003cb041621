"""covo-bench decode on the tiny checkpoint: both paths answer alike, and the figures add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from covo_npu.runtime import CovoAudio
from covo_npu.runtime.checkpoint.format import INT8
from covo_npu.runtime.networks.cache import allocate
from covo_npu.tools.bench import decode as bench_decode
from covo_npu.tools.bench.stock_decode import Stock, prefill_operations


@pytest.fixture(scope="module")
def model(convert_tiny: Callable[[str], Path]) -> CovoAudio:
    return CovoAudio.load(convert_tiny("float32"), device="cpu", dtype="float32", speech=False, max_context=1024)


def test_both_paths_read_the_same_memory(model: CovoAudio) -> None:
    stock = Stock(model)
    ours = {tensor.untyped_storage().data_ptr() for tensor in model.weights.tensors.values()}
    for network in (stock.llm, stock.encoder):
        assert {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()} <= ours


def test_both_paths_choose_the_same_tokens(model: CovoAudio) -> None:
    stock = Stock(model)
    ours, generate, second = bench_decode.answers(model, stock, 12)
    assert ours.tokens == generate.tokens == second.tokens and len(ours.tokens) == 12
    found, _ = bench_decode.steps(model, stock, [(100, 1), (150, 1), (100, 3)], 6, 2, lambda: 1e9)
    assert [(row.context, row.batch) for row in found[::2]] == [(100, 1), (150, 1), (100, 3)]
    for ours, generate in zip(found[::2], found[1::2]):
        assert ours.tokens == generate.tokens and len(ours.tokens) == 6


def test_a_turn_is_compared_with_the_reading_around_it(model: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns of half a second a step, while memory reads at 1, 3 and 5 GB/s."""
    monkeypatch.setattr(bench_decode, "between", lambda moments: [0.5])
    rates = iter([1e9, 3e9, 5e9])
    (row,), reading = bench_decode.steps(model, None, [(100, 1)], 4, 2, lambda: next(rates))
    per_s = bench_decode.step_bytes(model, 100, 1) / 0.5
    shares = [per_s / 2e9, per_s / 4e9]
    assert (row.of_read_rate.low, row.of_read_rate.high) == pytest.approx((min(shares), max(shares)))
    assert (reading.low, reading.median, reading.high) == (1e9, 3e9, 5e9)


def test_an_id_that_tells_nothing_has_its_moment(model: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiny model's ids many are parts of characters, or codes that nothing speaks here."""
    moments: list[int] = []
    monkeypatch.setattr(bench_decode, "between", lambda found: [moments.append(len(found)) or 1.0])
    found = bench_decode.answers(model, None, 32)
    assert moments == [len(row.tokens) for row in found] and all(row.ttft_s > 0 for row in found)


def test_a_reply_of_one_id_has_no_rate(model: CovoAudio) -> None:
    ours, generate, _ = found = bench_decode.answers(model, Stock(model), 1)
    rows, reading = bench_decode.steps(model, None, [(100, 1)], 3, 1, lambda: 1e9)
    assert ours.step_s is None and ours.tokens == generate.tokens and len(ours.tokens) == 1
    assert "| -        |" in bench_decode.question_table(found, 1e12)
    assert not any("tokens/s of the reply" in said for said in bench_decode.verdicts(found, rows, 1e12, reading))


def test_the_bytes_of_a_step(model: CovoAudio) -> None:
    config = model.config.llm
    weights = sum(p.nbytes for p in model.networks.llm.parameters()) - config.vocab_size * config.hidden_size * 4
    row = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4
    assert bench_decode.step_bytes(model, 100, 3) == weights + 300 * row


@pytest.mark.parametrize("weights", ["bfloat16", *INT8])
def test_the_bytes_of_a_step_are_those_of_the_file(weights: str, convert_tiny: Callable[[str], Path]) -> None:
    """All tensors of the LLM's file but the embeddings, and rows of 16 bits whatever the weights are."""
    model = CovoAudio.load(convert_tiny(weights), device="cpu", speech=False, max_context=64)
    config, (file,) = model.config.llm, model.manifest.ranks
    tensors = model.manifest.files[file].tensors
    read = sum(place.bytes for name, place in tensors.items() if name != "llm.embed_tokens.weight")
    row = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2
    assert bench_decode.step_bytes(model, 100, 3) == read + 300 * row


def test_the_operations_of_a_prefill(convert_tiny: Callable[[str], Path]) -> None:
    """Against PyTorch's counter over the reference kernels, whose matrix products it all knows.

    The reference computes causal attention whole, the count takes half; the networks skip most of the last layer.
    """
    model = CovoAudio.load(convert_tiny("float32"), device="cpu", speech=False, backend="reference")
    networks, length = model.networks, 200
    cache = allocate(model.config.llm, 1, 256, model.dtype, model.device)
    for known in (0, 150):
        with torch.inference_mode(), FlopCounterMode(display=False) as counted:
            networks.encoder(torch.zeros(1, model.config.encoder.num_mels, 3000))
            embeddings = networks.llm.embed(torch.zeros(length - known, dtype=torch.int64))
            networks.llm.logits(networks.llm.fill(embeddings, cache, 0, known))
        assert 0.95 < prefill_operations(model.config, length, known=known) / counted.get_total_flops() < 1.1


def test_the_command_writes_what_it_shows(convert_tiny: Callable[[str], Path], tmp_path: Path) -> None:
    options = ["--ckpt", str(convert_tiny("float32")), "--device", "cpu", "--max-new-tokens", "4", "--steps", "4"]
    rows = ["--runs", "1", "--context", "20", "--context", "40", "--batch", "1", "--batch", "2"]
    files = ["--json", str(tmp_path / "a.json")]
    found = CliRunner().invoke(bench_decode.command, [*options, *rows, *files], catch_exceptions=False)
    assert found.exit_code == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert [(row["context"], row["batch"]) for row in report["steps"][::2]] == [(20, 1), (40, 1), (20, 2)]
    assert all(line in found.stdout for line in report["said"])
    assert report["question"][0]["tokens"] == report["question"][1]["tokens"]


@pytest.mark.parametrize("weights", INT8)
def test_weights_in_8_bits_are_measured_alone(
    weights: str, convert_tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """There is nothing to compare with."""
    options = ["--ckpt", str(convert_tiny(weights)), "--device", "cpu", "--max-new-tokens", "4", "--steps", "4"]
    rows = ["--runs", "1", "--context", "20", "--batch", "1", "--batch", "2", "--json", str(tmp_path / "a.json")]
    found = CliRunner().invoke(bench_decode.command, [*options, *rows], catch_exceptions=False)
    report = json.loads((tmp_path / "a.json").read_text())
    assert (found.exit_code, report["weights"]) == (0, weights)
    assert [(row["path"], row["batch"]) for row in report["steps"]] == [("ours", 1), ("ours", 2)]
    assert [row["path"] for row in report["question"]] == ["ours", "ours, second dialogue"]
    cost, floors = report["said"]
    assert cost.startswith("context 20, batch 2: a step takes ") and floors.startswith("floors: ")
