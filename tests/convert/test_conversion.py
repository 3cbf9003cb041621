"""The tiny checkpoint, converted: every value is that of the source once the transform is undone."""

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_checkpoint import block_digests
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from covo_npu.runtime.checkpoint.format import PREFIX, read_manifest

LLM, ENCODER, TOKEN2WAV = "llm-rank0of1.safetensors", "encoder.safetensors", "token2wav.safetensors"


def stock(folder: Path) -> dict[str, Tensor]:
    """All tensors of a source, read with the stock libraries."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(shard)
    return tensors | torch.load(folder / "token2wav" / "model.pt", weights_only=True)["model"]


def undone(target: dict[str, Tensor], heads: tuple[int, int]) -> dict[str, Tensor]:
    """Source names and values from target tensors, for what conversion moves without computing.

    heads: rows of q and of k in the LLM's fused projection. Written out by hand, not from the converter's tables.
    """
    found: dict[str, Tensor] = {}
    for name, t in target.items():
        if match := re.fullmatch(r"(llm|encoder|dit)\.(layers|blocks)\.(\d+)\.qkv_proj\.(weight|bias)", name):
            net, _, i, kind = match.groups()
            rows = [heads[0], heads[1], heads[1]] if net == "llm" else [len(t) // 3] * 3
            prefix = {"llm": "llm.model.layers.{}.self_attn", "encoder": "encoder.layers.{}.self_attn"}.get(
                net, "token2latent.blocks.{}.attn"
            )
            for letter, part in zip("qkv", t.split(rows), strict=True):
                if (net, kind, letter) == ("encoder", "bias", "k"):
                    assert not part.any(), "Whisper's keys have no bias"
                else:
                    found[f"{prefix.format(i)}.{letter}_proj.{kind}"] = part
        elif name.endswith("gate_up_proj.weight"):
            layer = name.replace("llm.layers", "llm.model.layers").removesuffix("gate_up_proj.weight")
            found[layer + "mlp.gate_proj.weight"], found[layer + "mlp.up_proj.weight"] = t.chunk(2)
        elif name.startswith(("llm.", "encoder.", "adapter.", "dit.")) or name.endswith(".bias"):
            found[renamed(name)] = t
    return found


def renamed(name: str) -> str:
    """The source name of a tensor that is only renamed."""
    for pattern, replacement in (
        (r"^llm\.(embed_tokens|layers|norm)", r"llm.model.\1"),
        (r"^(llm\.model\.layers\.\d+)\.o_proj", r"\1.self_attn.o_proj"),
        (r"^(llm\.model\.layers\.\d+)\.down_proj", r"\1.mlp.down_proj"),
        (r"^(encoder\.layers\.\d+)\.o_proj", r"\1.self_attn.out_proj"),
        (r"^adapter\.layers\.(\d+)\.conv\.", r"audio_adapter.downsample_layers.\1.conv1d."),
        (r"^adapter\.layers\.", "audio_adapter.downsample_layers."),
        (r"^dit\.", "token2latent."),
        (r"\.token_proj\.", ".token_proj.0."),
        (r"\.token_upsample\.", ".token_proj.1."),
        (r"\.time_mlp\.", ".time_embedder.mlp."),
        (r"\.input_proj\.", ".transformer_input_proj."),
        (r"\.conv_embed\.", ".conv_embed.conv."),
        (r"\.modulation\.", ".modulation_layer.1."),
        (r"(blocks\.\d+)\.o_proj", r"\1.attn.o_proj"),
        (r"(blocks\.\d+)\.fc", r"\1.ffn.fc"),
        (r"\.output_modulation\.", ".output_layer.adaLN_modulation.1."),
        (r"\.output_proj\.", ".output_layer.linear."),
        (r"^vocoder\.stages\.(\d+)\.upsample", r"wavegan.ups.\1.0"),
        (r"^vocoder\.", "wavegan."),
    ):
        name = re.sub(pattern, replacement, name)
    return re.sub(
        r"stages\.(\d+)\.blocks\.(\d+)\.conv(\d)",
        lambda m: f"resblocks.{3 * int(m[1]) + int(m[2])}.convs{m[3]}",
        name,
    )


@pytest.fixture(scope="module")
def converted(convert_tiny: Callable[[str], Path]) -> dict[str, Tensor]:
    folder = convert_tiny("bfloat16")
    return {
        name: tensor
        for file in (LLM, ENCODER, TOKEN2WAV)
        for name, tensor in load_file(folder / file).items()
        if not name.startswith("__pad.")
    }


def test_moved_tensors_equal_the_source_bit_for_bit(converted: dict[str, Tensor], tiny_source: Path):
    source = stock(tiny_source)
    found = undone(converted, heads=(14 * 16, 2 * 16))
    computed = ("weight_g", "weight_v", ".alpha", ".beta", ".filter", ".inv_freq")
    assert set(found) >= {name for name in source if not name.endswith(computed)}
    for name, tensor in found.items():
        if name in source:
            assert tensor.dtype == source[name].dtype, name
            assert torch.equal(tensor, source[name]), name
    extra = {name for name in found if name not in source}
    assert not extra, f"targets of no source: {extra}"


def test_computed_tensors_equal_numpys_float64_rounded_once(converted: dict[str, Tensor], tiny_source: Path):
    source = {name: tensor.numpy() for name, tensor in stock(tiny_source).items() if tensor.dtype == torch.float32}
    count = 0
    for stage in range(6):
        pairs = [(f"vocoder.stages.{stage}.upsample", f"wavegan.ups.{stage}.0")]
        for block in range(3):
            here, there = f"vocoder.stages.{stage}.blocks.{block}", f"wavegan.resblocks.{3 * stage + block}"
            pairs += [(f"{here}.conv{n}.{j}", f"{there}.convs{n}.{j}") for n in (1, 2) for j in range(3)]
            for k in range(6):
                alpha = np.exp(source[f"{there}.activations.{k}.act.alpha"].astype(np.float64))
                beta = 1 / (np.exp(source[f"{there}.activations.{k}.act.beta"].astype(np.float64)) + 1e-9)
                assert np.array_equal(converted[f"{here}.acts.{k}.alpha"].numpy(), alpha.astype(np.float32))
                assert np.array_equal(converted[f"{here}.acts.{k}.inverse_beta"].numpy(), beta.astype(np.float32))
                count += 2
        for target, name in pairs:
            g, v = source[f"{name}.weight_g"].astype(np.float64), source[f"{name}.weight_v"].astype(np.float64)
            folded = v * (g / np.sqrt((v**2).sum(axis=(1, 2), keepdims=True)))
            np.testing.assert_allclose(converted[f"{target}.weight"].numpy(), folded, rtol=6e-8, atol=0)
            assert converted[f"{target}.weight"].shape == v.shape
            count += 1
    assert count == 6 * (1 + 3 * 6 + 3 * 12)


def test_voice_statistics_and_filters_are_those_of_the_source(converted: dict[str, Tensor], tiny_source: Path):
    folder = tiny_source / "token2wav"
    assert np.array_equal(converted["voice.prompt_codes"], np.load(folder / "prompt" / "prompt_token.npy")[0])
    assert np.array_equal(converted["voice.prompt_latents"], np.load(folder / "prompt" / "prompt_latent.npy")[0])
    assert np.array_equal(converted["voice.speaker_embedding"], np.load(folder / "prompt" / "speaker_embed.npy")[0])
    statistics = np.load(folder / "global_mean_var.npy")[0]
    assert np.array_equal(converted["statistics.mean"], statistics[:8])
    assert np.array_equal(converted["statistics.std"], np.sqrt(statistics[8:]))
    source = stock(tiny_source)
    for name, tensor in source.items():
        if name.endswith(".filter"):
            side = "up" if ".upsample." in name else "down"
            assert torch.equal(converted[f"vocoder.filters.{side}"], tensor.flatten())


@pytest.mark.parametrize("file", [LLM, ENCODER, TOKEN2WAV])
def test_the_stock_reader_opens_the_file_and_all_is_aligned(convert_tiny: Callable[[str], Path], file: str):
    path = convert_tiny("bfloat16") / file
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 4096 == 0 and data[8:9] == b"{"
    names = [name for name in header if name != "__metadata__"]
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == set(names)
        assert opened.metadata() == {"format": "pt"}
    for name in names:
        if not name.startswith("__pad."):
            assert (8 + length + header[name]["data_offsets"][0]) % 512 == 0, name
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_manifest_says_what_is_there(convert_tiny: Callable[[str], Path], tiny_source: Path):
    folder = convert_tiny("bfloat16")
    manifest = read_manifest(folder)
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, record in manifest.files.items():
        assert list(record.blocks) == block_digests(folder / name)
    assert manifest.special_tokens["cAUDIO"] == 540 and len(manifest.special_tokens) == 6
    assert manifest.left_out == {
        "token2latent.blocks.{}.attn.rotary": {
            "tensors": 2,
            "bytes": 128,
            "reason": "derived: computed from the sizes",
        }
    }
    assert manifest.dtype == "bfloat16" and manifest.ranks == (LLM,)
    config = json.loads((tiny_source / "config.json").read_text())
    assert manifest.config.llm.rope_theta == config["llm_config"]["rope_parameters"]["rope_theta"]
    assert manifest.config.token2wav.voice.num_codes == 11 and manifest.config.token2wav.voice.num_frames == 47
    sources = {str(path.relative_to(tiny_source)) for path in tiny_source.rglob("*") if path.is_file()}
    built_from = {name.replace("voice/", "token2wav/prompt/") for name in manifest.source}
    assert built_from == sources - {"vocab.json", "merges.txt"}
    text = (folder / "manifest.json").read_text()
    assert str(tiny_source) not in text and str(folder) not in text, "no paths: the same source gives the same bytes"
    assert manifest.layout_version == 2


def test_the_same_source_gives_the_same_bytes_whatever_the_threads(
    convert_tiny: Callable[[str], Path], source: Path, tmp_path: Path
):
    command = [Path(sys.executable).with_name("covo-convert"), "--src", source, "--dst", tmp_path / "again"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    compared = filecmp.dircmp(convert_tiny("bfloat16"), tmp_path / "again")
    assert not compared.left_only and not compared.right_only
    match, differ, errors = filecmp.cmpfiles(compared.left, compared.right, compared.common_files, shallow=False)
    assert (len(match), differ, errors) == (6, [], [])


def test_one_changed_byte_of_the_source_changes_its_digest(source: Path, convert, tmp_path: Path):
    assert convert(source).code == 0
    before = read_manifest(tmp_path / "target").source
    shard = "model-00003-of-00004.safetensors"
    data = bytearray((source / shard).read_bytes())
    data[-7] ^= 1
    (source / shard).write_bytes(data)
    assert convert(source, "--force").code == 0
    after = read_manifest(tmp_path / "target").source
    assert [name for name in before if before[name] != after[name]] == [shard]


# --- other forms of the source


def test_a_checkpoint_without_speech(source: Path, convert, tmp_path: Path):
    shutil.rmtree(source / "token2wav")
    assert convert(source, "--no-token2wav").code == 0
    manifest = read_manifest(tmp_path / "target")
    assert manifest.config.token2wav is None and TOKEN2WAV not in manifest.files


def test_a_checkpoint_without_the_rows_of_the_system_prompt(source: Path, convert, tmp_path: Path, convert_tiny):
    assert convert(source, "--no-prefix").code == 0
    compared = filecmp.dircmp(convert_tiny("bfloat16"), tmp_path / "target")
    assert (compared.left_only, compared.right_only) == ([PREFIX], [])
    manifests = [json.loads((Path(side) / "manifest.json").read_text()) for side in (compared.left, compared.right)]
    for part in ("files", "tensors"):
        assert manifests[0][part].pop(PREFIX)
    assert manifests[0] | {"manifest_xxh3_128": 0} == manifests[1] | {"manifest_xxh3_128": 0}


def test_rows_that_do_not_fit_into_the_dtype_are_refused(source: Path, convert, tmp_path: Path):
    """Keys of 60000 fit into float16; turned by 45 degrees they are 84853, which does not."""
    for shard in source.glob("model-*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
        biases = {name: torch.full_like(t, 60_000) for name, t in tensors.items() if name.endswith("k_proj.bias")}
        save_file(tensors | {name: t for name, t in biases.items() if name.startswith("llm.")}, shard)
    outcome = convert(source, "--dtype", "float16")
    assert outcome.code == 1 and "keys or values of the system prompt do not fit into float16" in outcome.err
    assert "Traceback" not in outcome.err and not (tmp_path / "target").exists()
    assert convert(source, "--dtype", "float16", "--no-prefix").code == 0


def test_without_the_voice_speech_starts_from_zeros_and_says_so(source: Path, convert, tmp_path: Path):
    shutil.rmtree(source / "token2wav" / "prompt")
    outcome = convert(source)
    assert outcome.code == 0 and "warning: no voice found" in outcome.err
    tensors = load_file(tmp_path / "target" / TOKEN2WAV)
    assert tensors["voice.prompt_codes"].shape == (0,) and tensors["voice.prompt_latents"].shape == (0, 8)
    assert not tensors["voice.speaker_embedding"].any() and tensors["voice.speaker_embedding"].shape == (16,)
    manifest = read_manifest(tmp_path / "target")
    voice = manifest.config.token2wav.voice
    assert (voice.num_codes, voice.num_frames) == (0, 0)
    assert not [name for name in manifest.source if name.startswith("voice/")]


@pytest.mark.parametrize("place", ["--voice", "inside", "beside"])
def test_the_voice_is_found_in_its_order(place: str, source: Path, convert, tmp_path: Path):
    home = source / "token2wav" / "prompt"
    moved = {"--voice": tmp_path / "voice", "inside": home, "beside": tmp_path / "token2wav" / "prompt"}[place]
    if moved != home:
        shutil.copytree(home, moved)
    codes = np.load(home / "prompt_token.npy") // 2
    np.save(moved / "prompt_token.npy", codes)
    if place == "beside":
        shutil.rmtree(home)
    outcome = convert(source, *(["--voice", str(moved)] if place == "--voice" else []))
    assert outcome.code == 0 and "warning" not in outcome.err
    found = load_file(tmp_path / "target" / TOKEN2WAV)["voice.prompt_codes"]
    assert np.array_equal(found, codes[0])


def respelled(state: dict[str, Tensor], form: str) -> object:
    """The same state dict in another of the forms that exist."""
    renames = {
        "module": lambda name: f"module.{name}",
        "parametrized": lambda name: name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ),
    }
    named = {renames.get(form, str)(name): tensor for name, tensor in state.items()}
    return named if form == "flat" else {"model": named, "epoch": 3}


@pytest.mark.parametrize("form", ["flat", "module", "parametrized"])
def test_all_forms_of_the_pickle_give_the_same_tensors(
    form: str, source: Path, convert, tmp_path: Path, convert_tiny: Callable[[str], Path]
):
    path = source / "token2wav" / "model.pt"
    torch.save(respelled(torch.load(path, weights_only=True)["model"], form), path)
    assert convert(source).code == 0
    assert filecmp.cmp(tmp_path / "target" / TOKEN2WAV, convert_tiny("bfloat16") / TOKEN2WAV, shallow=False)


def test_the_older_spelling_of_the_config_means_the_same(source: Path, convert, tmp_path: Path, convert_tiny):
    path = source / "config.json"
    config = json.loads(path.read_text())
    llm = config["llm_config"]
    llm["rope_theta"] = llm.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    assert convert(source).code == 0
    assert read_manifest(tmp_path / "target").config == read_manifest(convert_tiny("bfloat16")).config


def test_built_in_sizes_are_the_published_ones():
    from covo_npu.convert.config import token2wav_config
    from covo_npu.runtime.checkpoint.config import VoiceConfig
    from covo_npu.tools.synth.config import PRESETS

    found = token2wav_config(Path("absent") / "config.json")
    assert replace(found, voice=VoiceConfig(291, 1167)) == PRESETS["full"].token2wav
    published = Path(__file__).parents[3] / "shared" / "upstream-data" / "token2wav_config.json"
    if not published.exists():
        pytest.skip(f"needs the publisher's file at {published}")
    assert token2wav_config(published) == found


def test_a_source_of_links_as_hugging_faces_cache_has_it(
    tiny_source: Path, convert, tmp_path: Path, convert_tiny: Callable[[str], Path]
):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    for n, path in enumerate(sorted(path for path in tiny_source.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(tiny_source)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / f"{n:040x}")
        link.symlink_to(os.path.relpath(blobs / f"{n:040x}", link.parent))
    assert convert(snapshot).code == 0
    same = filecmp.cmp(tmp_path / "target" / "manifest.json", convert_tiny("bfloat16") / "manifest.json", shallow=False)
    assert same


def test_training_only_tensors_are_left_out_and_reported(source: Path, convert, tmp_path: Path):
    path = source / "token2wav" / "model.pt"
    loaded = torch.load(path, weights_only=True)
    for i in range(3):
        loaded["model"][f"wavegan.encoder.downs.{i}.weight"] = torch.zeros(4, 5)
    loaded["model"]["wavegan.flow.flows.0.pre.bias"] = torch.zeros(7)
    torch.save(loaded, path)
    outcome = convert(source)
    assert outcome.code == 0
    assert "left out: wavegan.encoder.* 3 tensors, 0.00 MB (not needed for inference)" in outcome.out
    left = read_manifest(tmp_path / "target").left_out
    assert left["wavegan.encoder"] == {"tensors": 3, "bytes": 240, "reason": "not needed for inference"}
    assert left["wavegan.flow"]["tensors"] == 1


# --- dtypes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_is_torchs_cast(dtype: str, source: Path, convert, tmp_path: Path, converted: dict[str, Tensor]):
    wanted = getattr(torch, dtype)
    assert convert(source, "--dtype", dtype).code == 0
    assert read_manifest(tmp_path / "target").dtype == dtype
    for file in (LLM, ENCODER):
        for name, tensor in load_file(tmp_path / "target" / file).items():
            if not name.startswith("__pad."):
                assert tensor.dtype == wanted
                assert torch.equal(tensor, converted[name].to(tensor.dtype)), name


def test_a_float32_source_becomes_bfloat16(source: Path, convert, tmp_path: Path, converted: dict[str, Tensor]):
    for shard in source.glob("model-*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(shard).items()}, shard)
    outcome = convert(source)
    assert outcome.code == 0
    for name, tensor in load_file(tmp_path / "target" / LLM).items():
        if not name.startswith("__pad."):
            assert torch.equal(tensor, converted[name]), name
