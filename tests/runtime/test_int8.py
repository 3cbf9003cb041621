"""Checkpoints with weights in 8 bits: what a model of them answers, and what is refused before it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from convert.test_int8 import changed
from made_checkpoint import LLM, replace_file, rewrite_in_layout_1, rewrite_manifest
from safetensors.torch import load_file

from covo_npu.runtime import CovoAudio, Engine, Session
from covo_npu.runtime.checkpoint.format import ENCODER, TOKEN2WAV, CheckpointError, read_manifest
from covo_npu.runtime.cli.batch import Item, answers
from covo_npu.runtime.ground import multiplied
from covo_npu.runtime.networks.layers import Int8Linear, Linear
from covo_npu.runtime.options import Ask

QUESTION = Path(__file__).parents[1] / "data" / "audio" / "question_en_48k_24bit.wav"
SCALE, WEIGHT = "llm.layers.1.down_proj.scale", "llm.layers.1.down_proj.weight"
HEAD_SCALE, HEAD_WEIGHT = "llm.lm_head.scale", "llm.lm_head.weight"


@pytest.fixture(scope="module")
def ckpt(convert_tiny: Callable[[str], Path]) -> Path:
    """One with all that can be in 8 bits: the layers' products and the head."""
    return convert_tiny("int8+head")


@pytest.fixture
def copy(ckpt: Path, tmp_path: Path) -> Path:
    return changed(ckpt, tmp_path / "copy", lambda tensors: None)


@pytest.mark.parametrize(("weights", "of_head"), [("int8", Linear), ("int8+head", Int8Linear)])
def test_the_model_holds_them_as_they_lie_in_the_file(
    weights: str, of_head: type, convert_tiny: Callable[[str], Path], device: str
) -> None:
    ckpt = convert_tiny(weights)
    model = CovoAudio.load(ckpt, device=device)
    assert (model.dtype, model.report.weights) == (torch.bfloat16, weights)
    assert not model.report.backend.startswith("native")
    stored, products = load_file(ckpt / LLM), {"llm.lm_head": model.networks.llm.lm_head}
    assert type(products["llm.lm_head"]) is of_head
    for index, layer in enumerate(model.networks.llm.layers):
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            products[f"llm.layers.{index}.{name}"] = getattr(layer, name)
            assert isinstance(getattr(layer, name), Int8Linear)
    for name, product in products.items():
        assert torch.equal(product.weight.cpu(), stored[f"{name}.weight"])
        if isinstance(product, Int8Linear):
            scale_dtype, bias_dtype = model.kernels.int8_dtypes[torch.bfloat16]
            assert product.scale.dtype == scale_dtype and (product.bias is None or product.bias.dtype == bias_dtype)
            assert torch.equal(product.scale.cpu(), stored[f"{name}.scale"].to(scale_dtype))
    assert model.report.bytes == sum((ckpt / name).stat().st_size for name in (LLM, ENCODER, TOKEN2WAV))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_a_dialogue_is_answered_near_what_the_plain_weights_answer(
    dtype: str, ckpt: Path, convert_tiny: Callable[[str], Path], device: str
) -> None:
    """Logits of the prompt within 20 % of those of bfloat16 weights, as random weights are; and not equal to them."""
    eight, plain = (CovoAudio.load(folder, device=device, dtype=dtype) for folder in (ckpt, convert_tiny("bfloat16")))
    assert len(Session(eight, mode="a2ta", max_new_tokens=12).say(QUESTION).tokens) == 12
    found, expected = (logits(model) for model in (eight, plain))
    assert 1e-3 < float((found - expected).norm() / expected.norm()) < 0.2


def test_the_heads_logits_are_those_of_the_formula(ckpt: Path, device: str) -> None:
    """Against float64: hidden states times numbers, times scales. Scales that stand one row further on are noticed.

    A result is rounded once to bfloat16, by 2^-8 at most; before that a float32 sum of 224 products is off by less than
    2^-16 of their sizes, or by two more of those roundings where the device takes scales in bfloat16.
    """
    model, stored = CovoAudio.load(ckpt, device=device), load_file(ckpt / LLM)
    hidden = torch.randn(3, model.config.llm.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        found = model.networks.llm.logits(hidden.to(device)).cpu().double()
    numbers, scale = stored[HEAD_WEIGHT].double(), stored[HEAD_SCALE].double()
    products = hidden.double() @ numbers.T
    of_a_sum = 2**-16 if model.kernels.int8_dtypes[torch.bfloat16][0] == torch.float32 else 2**-7
    bound = 2**-8 * products.abs() + of_a_sum * (hidden.double().abs() @ numbers.abs().T)
    assert ((found - products * scale).abs() <= bound * scale).all()
    assert not ((found - products * scale.roll(1)).abs() <= bound * scale.roll(1)).all()


@torch.inference_mode()
def logits(model: CovoAudio) -> torch.Tensor:
    from covo_npu.runtime.networks.cache import allocate

    llm, ids = model.networks.llm, torch.arange(100, 130, device=model.device)
    cache = allocate(model.config.llm, 1, 64, model.dtype, model.device)
    return llm.logits(llm.fill(llm.embed(ids), cache, 0, 0)).float().cpu()


def test_side_by_side_they_are_answered_as_alone(ckpt: Path, device: str) -> None:
    model, asked = CovoAudio.load(ckpt, device=device, dtype="float32"), Ask("a2t", max_new_tokens=6)
    alone = Session(model, asked).say(QUESTION).tokens
    items = [Item(str(i), (QUESTION,)) for i in range(3)]
    for answer in answers(Engine(model, 3), items, asked):
        assert answer.replies[0].tokens == alone


def test_what_is_measured_are_the_weights_of_a_token(ckpt: Path, convert_tiny: Callable[[str], Path]) -> None:
    found, layers = (multiplied(read_manifest(each), torch.bfloat16) for each in (ckpt, convert_tiny("int8")))
    plain = multiplied(read_manifest(convert_tiny("bfloat16")), torch.float16)
    assert len(found) == 4 * 3 + 1 == len(plain)
    assert [shape[2] for shape in found] == [torch.int8] * 13
    assert [shape[2] for shape in layers] == [torch.int8] * 12 + [torch.bfloat16]
    assert {shape[2] for shape in plain} == {torch.float16}
    assert [shape[:2] for shape in found] == [shape[:2] for shape in layers] == [shape[:2] for shape in plain]
    assert (224, 608, torch.int8) in found


# --- what is refused


@pytest.mark.parametrize("name", [SCALE, HEAD_SCALE])
@pytest.mark.parametrize("value", [float("nan"), -1e-3, float("inf")])
def test_a_scale_that_is_none_is_named(value: float, name: str, ckpt: Path, tmp_path: Path) -> None:
    folder = changed(ckpt, tmp_path / "changed", lambda tensors: tensors[name][3].fill_(value))
    with pytest.raises(CheckpointError, match=f"negative or not finite: {name}; convert the source again"):
        CovoAudio.load(folder, device="cpu")


@pytest.mark.parametrize("tensor", [SCALE, WEIGHT, HEAD_SCALE, HEAD_WEIGHT])
def test_a_flipped_bit_is_found_before_anything_is_answered(tensor: str, ckpt: Path, copy: Path) -> None:
    place = read_manifest(ckpt).files[LLM].tensors[tensor]
    data = bytearray((copy / LLM).read_bytes())
    data[place.offset + 12] ^= 1
    (copy / LLM).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{LLM}: damaged in the block"):
        Session(CovoAudio.load(copy, device="cpu"), mode="a2t", max_new_tokens=2).say(QUESTION)


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        (WEIGHT, lambda t: t[:, :-32], "1 of another shape: llm.layers.1.down_proj.weight"),
        (SCALE, lambda t: t[:-1], "1 of another shape: llm.layers.1.down_proj.scale"),
        (WEIGHT, lambda t: t.bfloat16(), "llm.layers.1.down_proj.weight: expected int8, found floats"),
        (WEIGHT, lambda t: t.view(torch.uint8), "llm.layers.1.down_proj.weight: expected int8, found uint8"),
        (SCALE, lambda t: t.view(torch.uint8)[::4], "llm.layers.1.down_proj.scale: expected floats, found uint8"),
        (HEAD_WEIGHT, lambda t: t[:-1], "1 of another shape: llm.lm_head.weight"),
        (HEAD_SCALE, lambda t: t[None], "1 of another shape: llm.lm_head.scale"),
        (HEAD_WEIGHT, lambda t: t.bfloat16(), "llm.lm_head.weight: expected int8, found floats"),
    ],
)
def test_tensors_of_another_form_are_refused(name: str, form: Callable, message: str, ckpt: Path, copy: Path) -> None:
    tensors = {n: t for n, t in load_file(ckpt / LLM).items() if not n.startswith("__pad.")}
    replace_file(copy, LLM, {**tensors, name: form(tensors[name]).contiguous()})
    with pytest.raises(CheckpointError, match=message):
        CovoAudio.load(copy, device="cpu")


def test_a_manifest_that_says_something_else_than_the_file_is_refused(copy: Path) -> None:
    rewrite_manifest(copy, lambda m: m.update(weights="bfloat16"))
    with pytest.raises(CheckpointError, match=r"13 unexpected: llm\.layers\.0\.down_proj\.scale"):
        CovoAudio.load(copy, device="cpu")
    rewrite_manifest(copy, lambda m: m.update(weights="int8"))
    with pytest.raises(CheckpointError, match=r"1 unexpected: llm\.lm_head\.scale"):
        CovoAudio.load(copy, device="cpu")
    for dtype in ("bf16", "nn", "int8"):
        rewrite_manifest(copy, lambda m, dtype=dtype: m.update(dtype=dtype))
        with pytest.raises(CheckpointError, match=f"dtype: expected one of .*, float32, found '{dtype}'"):
            CovoAudio.load(copy, device="cpu")
    rewrite_manifest(copy, lambda m: m.update(dtype="bfloat16"))
    rewrite_manifest(copy, lambda m: m.update(weights="int4"))
    expected = r"weights: expected one of bfloat16, int8, int8\+head, found 'int4'; upgrade covo-npu"
    with pytest.raises(CheckpointError, match=expected):
        CovoAudio.load(copy, device="cpu")


def test_checkpoints_from_before_say_nothing_of_weights_and_load(
    convert_tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for path in convert_tiny("bfloat16").iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    rewrite_in_layout_1(old)
    rewrite_manifest(old, lambda m: m.pop("weights"))
    rewrite_manifest(old, lambda m: m.update(layout_version=1))
    assert not read_manifest(old).int8
    reply = Session(CovoAudio.load(old, device="cpu"), mode="a2t", max_new_tokens=3).say(QUESTION)
    assert len(reply.tokens) == 3 and np.isfinite(reply.timing.decode_s)
