"""The converted system prompt: its rows against transformers' in float64, who starts from them, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import pytest
import torch
from made_checkpoint import remove_file, replace_file
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from covo_npu.runtime import CovoAudio, Session, prompt
from covo_npu.runtime.checkpoint.format import PREFIX, CheckpointError, read_manifest
from covo_npu.runtime.decode import Decoder
from covo_npu.runtime.networks.cache import SharedPrefixes, allocate
from covo_npu.runtime.prefix import INPUT_IDS, KEYS, VALUES, computed_prefix, stored_prefix

Convert = Callable[[str], Path]
AUDIO = Path(__file__).parents[1] / "data" / "audio"
ENGLISH, CHINESE = AUDIO / "question_en_48k_24bit.wav", AUDIO / "question_zh_44k_stereo.wav"
CPU = torch.device("cpu")


def load(folder: Path, device: str = "cpu", dtype: str | None = None) -> CovoAudio:
    return CovoAudio.load(folder, device=device, dtype=dtype, speech=False, max_context=2048)


def default_ids(model: CovoAudio) -> list[int]:
    return prompt.shared(model.tokenizer, prompt.DEFAULT_SYSTEM_PROMPT)


def told(model: CovoAudio, **fields) -> list[list[int]]:
    """Return the ids of a dialogue of two rounds."""
    chat = Session(model, mode="a2t", max_new_tokens=16, **fields)
    return [chat.say(question).tokens for question in (ENGLISH, CHINESE)]


def stored(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the file, read by its stock reader; copies, for the file may be written anew."""
    tensors = load_file(folder / PREFIX)
    return {name: tensor.clone() for name, tensor in tensors.items() if not name.startswith("__pad")}


# --- what the rows are


def held(name: str, tensor: Tensor, weights: str) -> Tensor:
    """Return in float64 what a checkpoint holds of a tensor of the source. weights: a dtype, or int8 with bfloat16."""
    if weights == "int8" and name.startswith("model.layers.") and name.endswith("_proj.weight"):
        scale = tensor.float().abs().amax(1, keepdim=True) / 127
        return (tensor.float() / scale).round().double() * scale.double()
    return tensor.to(torch.bfloat16 if weights == "int8" else getattr(torch, weights)).double()


def exact_rows(source: Path, weights: str, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of transformers' Qwen2 in float64 [layers, G, P, D]. weights: see held."""
    config = json.loads((source / "config.json").read_text())["llm_config"]
    model = Qwen2ForCausalLM(Qwen2Config(**config, attn_implementation="eager")).double().eval()
    shards = [load_file(path) for path in sorted(source.glob("model-*.safetensors"))]
    tensors = {name.removeprefix("llm."): t for shard in shards for name, t in shard.items() if name.startswith("llm.")}
    model.load_state_dict({name: held(name, tensor, weights) for name, tensor in tensors.items()}, strict=True)
    with torch.inference_mode():
        layers = model(input_ids[None], use_cache=True).past_key_values.layers
    return torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])


def are_rounded_once(found: Tensor, exact: Tensor, folder: Path) -> bool:
    """Whether every value is the exact one after float32 sums and one rounding.

    A float32 sum of K products is off by about sqrt(K) roundings of 2^-24 of its size; a row of the last layer has been
    through four products in each layer. An angle of the rotation is a position times a float32 frequency, in all
    implementations, and two of these differ by a unit in the last place. The rounding at the end is off by at most half
    a unit.
    """
    llm = read_manifest(folder).config.llm
    summed = 2**-24 * sqrt(4 * llm.num_layers * max(llm.intermediate_size, llm.hidden_size)) + 2**-23 * exact.shape[2]
    size = exact.square().mean(-1, keepdim=True).sqrt()
    rounded = torch.finfo(found.dtype).eps / 2 * exact.abs()
    return bool(((found.double() - exact).abs() <= rounded + summed * size).all())


@pytest.mark.parametrize(
    ("weights", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("int8", torch.bfloat16)]
)
def test_the_rows_are_those_of_transformers_rounded_once(
    convert_tiny: Convert, tiny_source: Path, weights: str, dtype: torch.dtype
) -> None:
    folder = convert_tiny(weights)
    tensors, model = stored(folder), load(folder)
    assert tensors[INPUT_IDS].tolist() == default_ids(model)
    assert tensors[KEYS].dtype == tensors[VALUES].dtype == dtype
    exact = exact_rows(tiny_source, weights, tensors[INPUT_IDS])
    assert all(are_rounded_once(tensors[name], rows, folder) for name, rows in zip((KEYS, VALUES), exact, strict=True))


def test_rows_that_are_rounded_after_every_operator_are_others(convert_tiny: Convert, tiny_source: Path) -> None:
    """The mutant of the test above: a prefill in bfloat16, of which every layer but the first is off by more."""
    folder = convert_tiny("bfloat16")
    model, ids = load(folder), stored(folder)[INPUT_IDS]
    cache = allocate(model.config.llm, 1, len(ids), torch.bfloat16, CPU)
    with torch.inference_mode():
        model.networks.llm.fill(model.networks.llm.embed(ids), cache, 0, 0)
    exact, _ = exact_rows(tiny_source, "bfloat16", ids)
    for keys, layer in zip(cache.keys[1:], exact[1:], strict=True):
        assert not are_rounded_once(keys[0], layer, folder)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_the_rows_are_streamed_with_progress_by_layer(convert_tiny: Convert, weights: str) -> None:
    manifest, told_bytes = read_manifest(convert_tiny(weights)), []
    computed_prefix(manifest, told_bytes.append)
    tensors = manifest.files[manifest.ranks[0]].tensors
    layers = sum(record.bytes for name, record in tensors.items() if name.startswith("llm.layers."))
    assert len(told_bytes) == manifest.config.llm.num_layers and sum(told_bytes) == layers


# --- who starts from them


def fills(model: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that fills with the number of tokens of each prefill."""
    counts: list[int] = []
    fill = Decoder.fill

    def counted(self: Decoder, slot: int, embeddings: Tensor, start: int) -> Tensor:
        counts.append(len(embeddings))
        return fill(self, slot, embeddings, start)

    monkeypatch.setattr(Decoder, "fill", counted)
    return counts


def test_every_dialogue_starts_from_the_file_and_is_the_same_bit_for_bit(
    convert_tiny: Convert, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after more other prompts than are kept: were the rows computed then, the dialogue would be another."""
    model = load(convert_tiny("bfloat16"), device)
    counts, ids, tensors = fills(model, monkeypatch), default_ids(model), stored(convert_tiny("bfloat16"))
    chats = [Session(model, mode="a2t", max_new_tokens=4) for _ in range(2)]
    chats[0].say(ENGLISH)
    assert counts == [chats[0].dialogue.length - 3 - len(ids)]  # the question alone; of 4 ids the cache has 3
    for number in range(6):
        Session(model, mode="a2t", max_new_tokens=1, system=f"Prompt {number}.").say(ENGLISH)
    chats[1].say(ENGLISH)
    first, later = (chat.engine._decoder.cache.read(0, chat.dialogue.length) for chat in chats)
    assert all(torch.equal(a, b) for a, b in zip(first, later, strict=True))
    rows = torch.stack(first)[:, :, : len(ids)].cpu()
    assert torch.equal(rows, torch.cat([tensors[KEYS], tensors[VALUES]]))


def test_a_model_in_another_dtype_computes_its_own(convert_tiny: Convert, device: str, tmp_path: Path) -> None:
    """Rows of bfloat16 would spoil float32; those of float32 weights are none of weights that were rounded."""
    for weights, dtype in (("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")):
        without = shutil.copytree(convert_tiny(weights), tmp_path / f"{weights}-{dtype}")
        remove_file(without, PREFIX)
        models = [load(folder, device, dtype) for folder in (convert_tiny(weights), without)]
        assert models[0].prefixes.get(default_ids(models[0])) is None
        assert told(models[0]) == told(models[1])
    assert load(convert_tiny("float32"), device).prefixes.get(default_ids(models[0])) is not None


def test_in_float32_it_makes_no_difference_to_the_ids(convert_tiny: Convert, device: str, tmp_path: Path) -> None:
    without = shutil.copytree(convert_tiny("float32"), tmp_path / "without")
    remove_file(without, PREFIX)
    models = [load(folder, device) for folder in (convert_tiny("float32"), without)]
    assert told(models[0]) == told(models[1])
    assert told(models[0], system="Be brief.") == told(models[1], system="Be brief.")


def test_the_rows_that_last_are_not_those_that_go() -> None:
    rows = (torch.zeros(1),)
    prefixes = SharedPrefixes({(1, 2): rows}, kept=2)
    for number in range(3):
        prefixes.put([number], rows)
    assert [prefixes.get(ids) is rows for ids in ([1, 2], [0], [1], [2])] == [True, False, True, True]
    assert prefixes.get([2, 1]) is None


# --- what is refused


def spoiled(tensors: dict[str, Tensor], name: str, at: tuple[int, ...], value: float) -> dict[str, Tensor]:
    changed = tensors[name].clone()
    changed[at] = value
    return tensors | {name: changed}


HOSTILE = {
    "keys that are NaN": (lambda t: spoiled(t, KEYS, (1, 0, 5, 3), float("nan")), "prefix.keys: not finite"),
    "values that are infinite": (lambda t: spoiled(t, VALUES, (0, 1, 0, 0), float("inf")), "values: not finite"),
    "more ids than rows": (lambda t: t | {INPUT_IDS: t[INPUT_IDS].repeat(2)}, r"prefix.keys: expected .*\d+, 1"),
    "fewer rows of values": (lambda t: t | {VALUES: t[VALUES][:, :, 1:].contiguous()}, "prefix.values: expected"),
    "a layer too few": (lambda t: t | {KEYS: t[KEYS][1:].contiguous()}, "prefix.keys: expected"),
    "another dtype": (lambda t: t | {KEYS: t[KEYS].bfloat16()}, "prefix.keys: expected .*float32.* found .*bfloat16"),
    "ids that are no integers": (lambda t: t | {INPUT_IDS: t[INPUT_IDS].float()}, "prefix.input_ids: expected"),
    "no ids": (lambda t: {KEYS: t[KEYS], VALUES: t[VALUES]}, "prefix.input_ids: expected .* found None"),
    "something more": (lambda t: t | {"prefix.x": t[KEYS]}, "prefix.x: expected None"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_rows_that_do_not_fit_are_refused(convert_tiny: Convert, tmp_path: Path, fault: str) -> None:
    folder = shutil.copytree(convert_tiny("float32"), tmp_path / "ckpt")
    change, message = HOSTILE[fault]
    replace_file(folder, PREFIX, change(stored(folder)))
    with pytest.raises(CheckpointError, match=f"{PREFIX}: not the rows of a prompt of this model: .*{message}"):
        load(folder)


@pytest.mark.parametrize("place", [5000, -1])
def test_a_flipped_byte_is_named_before_anything_is_answered(convert_tiny: Convert, tmp_path: Path, place: int) -> None:
    folder = shutil.copytree(convert_tiny("float32"), tmp_path / "ckpt")
    data = bytearray((folder / PREFIX).read_bytes())
    data[place] ^= 1
    (folder / PREFIX).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{PREFIX}: damaged in the block"):
        load(folder)
    (folder / PREFIX).write_bytes(data[:-512])
    with pytest.raises(CheckpointError, match=f"{PREFIX}: expected {len(data)} bytes, found {len(data) - 512}"):
        load(folder)
    (folder / PREFIX).unlink()
    with pytest.raises(CheckpointError, match=f"{PREFIX}: missing"):
        load(folder)


def test_rows_of_another_prompt_serve_nobody(convert_tiny: Convert, device: str, tmp_path: Path) -> None:
    """As if the text of the default prompt had changed since: the ids do not agree, and the model computes its own."""
    folder, without = (shutil.copytree(convert_tiny("float32"), tmp_path / name) for name in ("ckpt", "without"))
    tensors = stored(folder)
    replace_file(folder, PREFIX, tensors | {INPUT_IDS: tensors[INPUT_IDS].roll(1)})
    remove_file(without, PREFIX)
    assert told(load(folder, device)) == told(load(without, device))


def test_a_checkpoint_may_have_none(convert_tiny: Convert, tmp_path: Path) -> None:
    folder = shutil.copytree(convert_tiny("float32"), tmp_path / "ckpt")
    remove_file(folder, PREFIX)
    assert stored_prefix(read_manifest(folder)) is None
