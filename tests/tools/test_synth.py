"""covo-synth: the published layout, the same bytes for the same seed, values that keep activations sane."""

import filecmp
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from covo_npu.convert.plan import Need, recipes
from covo_npu.convert.stream import write_file
from covo_npu.tools.synth import checkpoint
from covo_npu.tools.synth import cli as synth
from covo_npu.tools.synth.config import PRESETS, upstream_json
from covo_npu.tools.synth.tokenizer import SPECIAL_TOKENS, byte_alphabet, enumerate_merges, write_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset."""
    folder = tmp_path_factory.mktemp("synth") / "tiny"
    assert synth.main(["--preset", "tiny", "--seed", "3", str(folder)]) == 0
    return folder


def layout(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> dtype and shape of all tensors, read with the stock libraries."""
    found = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        with safe_open(path, "pt") as shard:
            found |= {k: (shard.get_slice(k).get_dtype(), shard.get_slice(k).get_shape()) for k in shard.keys()}  # noqa: SIM118
    state = torch.load(folder / "token2wav" / "model.pt", weights_only=True)["model"]
    return found | {k: (str(t.dtype), list(t.shape)) for k, t in state.items()}


def test_names_shapes_and_dtypes_are_those_of_the_reference_pack(made: Path, tiny_source: Path):
    assert layout(made) == layout(tiny_source)
    files = {str(path.relative_to(made)) for path in made.rglob("*")}
    assert files == {str(path.relative_to(tiny_source)) for path in tiny_source.rglob("*")}
    for name in ("token2wav/global_mean_var", *(f"token2wav/prompt/{n}" for n in ("prompt_token", "prompt_latent"))):
        ours, theirs = np.load(made / f"{name}.npy"), np.load(tiny_source / f"{name}.npy")
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name


def test_layers_are_cut_in_the_middle(made: Path):
    weight_map = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) == 4
    split = [
        (layer, pair)
        for layer in range(3)
        for pair in (("self_attn.q", "self_attn.k"), ("self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up"))
        if len({weight_map[f"llm.model.layers.{layer}.{part}_proj.weight"] for part in pair}) == 2
    ]
    assert {pair for _, pair in split} == {
        ("self_attn.q", "self_attn.k"),
        ("self_attn.k", "self_attn.v"),
        ("mlp.gate", "mlp.up"),
    }


def test_shards_of_the_full_size_are_about_equal():
    needs = {need.name: need for recipe in recipes(PRESETS["full"]) for need in recipe.needs if need.name}
    model = [n for name in ("audio_adapter.", "encoder.", "llm.") for n in needs.values() if n.name.startswith(name)]
    sizes = [sum(2 * int(np.prod(need.shape)) for need in shard) for shard in checkpoint.cut(model)]
    assert len(sizes) == 4 and sum(sizes) / 1e9 == pytest.approx(16.80, abs=0.01)
    assert max(sizes) < 1.2 * min(sizes)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(made: Path, tmp_path: Path):
    for seed in ("3", "4"):
        assert synth.main(["--preset", "tiny", "--seed", seed, str(tmp_path / seed)]) == 0
    names = [str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()]
    assert filecmp.cmpfiles(made, tmp_path / "3", names, shallow=False) == (names, [], [])
    _, differ, _ = filecmp.cmpfiles(made, tmp_path / "4", names, shallow=False)
    assert set(differ) == {name for name in names if name.endswith((".safetensors", ".pt", ".npy"))}


def test_it_converts_and_the_published_spelling_of_the_config_is_read(made: Path, tmp_path: Path):
    from covo_npu.convert.cli import main
    from covo_npu.runtime.checkpoint.format import read_manifest

    assert main(["--src", str(made), "--dst", str(tmp_path / "converted")]) == 0
    assert read_manifest(tmp_path / "converted").config == PRESETS["tiny"]
    written = json.loads((made / "config.json").read_text())
    assert written["llm_config"]["rope_theta"] == 1e6 and "rope_parameters" not in written["llm_config"]
    assert written["torch_dtype"] == "bfloat16"


def test_head_dim_is_written_where_it_does_not_follow():
    tiny = PRESETS["tiny"]
    assert "head_dim" not in upstream_json(tiny)["llm_config"]
    assert upstream_json(replace(tiny, llm=replace(tiny.llm, head_dim=32)))["llm_config"]["head_dim"] == 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_large_tensor_has_its_scale_no_mean_and_no_repetition(dtype: torch.dtype, tmp_path: Path):
    shape = (600, 1500)  # several periods, the last one not whole
    write_file(tmp_path / "x", [checkpoint.RandomValues(5).stream(Need("some.weight", shape), dtype)])
    data = torch.frombuffer(bytearray((tmp_path / "x").read_bytes()), dtype=dtype).view(shape).float()
    assert data.std() == pytest.approx(1 / np.sqrt(1500), rel=0.01)
    assert abs(data.mean()) < 1e-4
    rows = data / data.norm(dim=1, keepdim=True)
    similarity = (rows @ rows.T).fill_diagonal_(0)
    assert similarity.abs().max() < 0.2, "no row repeats another"


def test_values_do_not_depend_on_how_they_are_read():
    shape = (600, 1000)
    need, values = Need("some.weight", shape), checkpoint.RandomValues(5)
    whole, parts = bytearray(2 * 600_000), bytearray(2 * 600_000)
    values.stream(need, torch.bfloat16).read_into(memoryview(whole))
    stream, at = checkpoint.RandomValues(5).stream(need, torch.bfloat16), 0
    for count in (2, 524286, 524290, 151422):
        stream.read_into(memoryview(parts)[at : at + count])
        at += count
    assert at == len(parts) and whole == parts


def test_the_filter_is_that_of_the_published_vocoder(tiny_source: Path):
    state = torch.load(tiny_source / "token2wav" / "model.pt", weights_only=True)["model"]
    torch.testing.assert_close(
        checkpoint.kaiser_sinc(), state["wavegan.activation_post.upsample.filter"], rtol=1e-5, atol=1e-7
    )


def test_scales_of_the_tiny_preset_are_near_those_of_the_reference_pack(made: Path, tiny_source: Path):
    """The pack's goldens show sane activations; ours must not be an order of magnitude away anywhere."""

    def deviations(folder: Path) -> dict[str, float]:
        tensors: dict[str, torch.Tensor] = {}
        for shard in sorted(folder.glob("model-*.safetensors")):
            tensors |= load_file(shard)
        tensors |= torch.load(folder / "token2wav" / "model.pt", weights_only=True)["model"]
        return {name: float(t.float().pow(2).mean().sqrt()) for name, t in tensors.items() if t.numel() > 100}

    theirs = deviations(tiny_source)
    for name, found in deviations(made).items():
        assert 0.3 < found / theirs[name] < 3, (name, found, theirs[name])


# --- the tokenizer


@pytest.fixture(scope="module")
def full_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 151671)
    return folder


def test_the_full_tokenizer_has_the_published_ids(full_tokenizer: Path):
    tokenizer = Tokenizer.from_file(str(full_tokenizer / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 151671
    assert tokenizer.token_to_id("<|cAUDIO|>") == 151666 and tokenizer.token_to_id("<|im_end|>") == 151645
    assert len(SPECIAL_TOKENS) == 28


def test_texts_come_back_and_have_plausible_lengths(full_tokenizer: Path):
    tokenizer = Tokenizer.from_file(str(full_tokenizer / "tokenizer.json"))
    prompt = Path(__file__).parents[2] / "runtime" / "data" / "system_prompt.txt"
    texts = {
        "Hello, how are you today? The weather is fine.": 30,
        "请使用简洁、口语化的语言和用户聊天。": 19,
        "naïve café 🎉 \x00\x7f": 30,
        prompt.read_text("utf-8"): 400,
    }
    for text, most in texts.items():
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert len(ids) <= most, (text, len(ids))


def test_special_tokens_are_one_token_each(full_tokenizer: Path):
    tokenizer = Tokenizer.from_file(str(full_tokenizer / "tokenizer.json"))
    text = "<|im_start|>user\n<|begofcAUDIO|>" + "<|cAUDIO|>" * 5 + "<|endofcAUDIO|><|im_end|>"
    ids = tokenizer.encode(text).ids
    assert ids.count(tokenizer.token_to_id("<|cAUDIO|>")) == 5
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n"


def test_transformers_builds_the_same_tokenizer_from_vocabulary_and_merges(made: Path, tmp_path: Path):
    from covo_npu.convert.tokenizer import read_tokenizer

    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    built = Tokenizer.from_str(read_tokenizer(tmp_path, 545).text.decode())
    given = Tokenizer.from_file(str(made / "tokenizer.json"))
    for text in ("the answer is 42", "<|im_start|>system\n你好<|im_end|>"):
        assert built.encode(text).ids == given.encode(text).ids


def test_merges_join_tokens_that_exist_and_never_make_one_twice():
    known = set(byte_alphabet().values())
    assert len(known) == 256
    for number, (a, b) in enumerate(enumerate_merges(byte_alphabet())):
        assert a in known and b in known and a + b not in known
        known.add(a + b)
        if number == 60_000:
            break


def test_a_tokenizer_too_small_for_its_special_tokens_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="at least 284 tokens"):
        write_tokenizer(tmp_path, 100)


# --- the command line


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("mine")
    assert synth.main([str(tmp_path)]) == 1
    assert "exists and is not an empty folder" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch, capfd):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    assert synth.main(["--preset", "full", str(tmp_path / "full")]) == 1
    assert "18.27 GB are needed, 1.00 GB are free" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tokenizer", broken)
    assert synth.main([str(tmp_path / "tiny")]) == 1
    assert "No space left" in capfd.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path: Path):
    result = subprocess.run(
        [Path(sys.executable).with_name("covo-synth"), tmp_path / "checkpoint"],
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("covo-synth: token2wav/model.pt cannot be written (")
    assert list(tmp_path.iterdir()) == []


def test_the_summary_names_the_size_and_the_made_up_tokenizer(
    made: Path, tmp_path: Path, capfd, convert_tiny: Callable
):
    assert synth.main([str(tmp_path / "tiny")]) == 0
    out = capfd.readouterr().out
    assert re.search(r"tiny: tiny, seed 0, 0\.01 GB in [\d.]+ s; its tokenizer is made up", out)
