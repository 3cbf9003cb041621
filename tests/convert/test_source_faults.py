"""Bad sources: each kind of finding is named, all of a kind in one message, nothing is written, no traceback."""

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from source_edits import (
    CONFIG,
    INDEX,
    PICKLE,
    SHARDS,
    VALUES,
    VOICE,
    edit_array,
    edit_json,
    edit_pickle,
    edit_shard,
    rewrite_header,
    truncate,
)

OTHER = VALUES.replace("layers.1", "layers.2")  # of the same shape, in the same shard

# name: (damage to the source folder, parts that the message must have)
FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda s: (s / CONFIG).unlink(), ["config.json: no such file"]),
    "config not JSON": (lambda s: (s / CONFIG).write_text("{"), ["config.json: not valid JSON", "download it again"]),
    "config a list": (lambda s: (s / CONFIG).write_text("[]"), ["expected a JSON object, found list"]),
    "config fields": (
        lambda s: edit_json(
            s / CONFIG,
            lambda c: (
                c["llm_config"].pop("hidden_size"),
                c["llm_config"].update(hidden_act="gelu", rms_norm_eps="small"),
                c.update(adapter_downsample=6),
            ),
        ),
        [
            "fields (4)",
            "llm_config.hidden_size: missing",
            "llm_config.hidden_act: expected 'silu', found 'gelu': not implemented",
            "llm_config.rms_norm_eps: expected a number, found 'small'",
            "adapter_downsample: expected a power of 2, found 6",
        ],
    ),
    "rope of another kind": (
        lambda s: edit_json(s / CONFIG, lambda c: c["llm_config"]["rope_parameters"].update(rope_type="yarn")),
        ["llm_config.rope_parameters.rope_type: expected 'default', found 'yarn': not implemented"],
    ),
    "token2wav of another kind": (
        lambda s: edit_json(s / "token2wav" / CONFIG, lambda c: c["model"]["wavegan"].update(activation="snake")),
        ["model.wavegan.activation: expected 'snakebeta', found 'snake'"],
    ),
    "no index": (
        lambda s: (s / INDEX).unlink(),
        [f"has neither {INDEX} nor model.safetensors, but {SHARDS[0]}", f"take {INDEX} from where they come from"],
    ),
    "index without a map": (lambda s: (s / INDEX).write_text("{}"), ["expected a weight_map"]),
    "index leaves the folder": (
        lambda s: edit_json(s / INDEX, lambda i: i["weight_map"].update({VALUES: "../x.safetensors"})),
        [f"{VALUES}: expected a plain file name, found '../x.safetensors'"],
    ),
    "two shards missing": (
        lambda s: [(s / SHARDS[n]).unlink() for n in (1, 3)],
        ["shards that the index names are missing (2)", SHARDS[1], SHARDS[3], "17 tensors expected in it"],
    ),
    "two shards truncated": (
        lambda s: [truncate(s / SHARDS[n], 1000) for n in (0, 2)],
        ["shards are damaged (2)", f"{SHARDS[0]}: header says 2316856 bytes, file has 2315856", SHARDS[2]],
    ),
    "a shard too long": (
        lambda s: (s / SHARDS[0]).open("ab").write(b"x"),
        ["header says 2316856 bytes, file has 2316857"],
    ),
    "a shard ends in its header": (
        lambda s: os.truncate(s / SHARDS[3], 200),
        [f"{SHARDS[3]}: 200 bytes cannot hold its header"],
    ),
    "an empty shard": (lambda s: os.truncate(s / SHARDS[3], 0), [f"{SHARDS[3]}: 0 bytes cannot hold its header"]),
    "a shard that is a web page": (
        lambda s: (s / SHARDS[3]).write_text("<html>" + "x" * 3000),
        ["files are what a server said instead (1)", f"{SHARDS[3]}: a web page, '<html>xxx"],
    ),
    "a header that is not JSON": (
        lambda s: (s / SHARDS[3]).write_bytes((9).to_bytes(8, "little") + b"{nonsense"),
        ["its header is not that of a safetensors file"],
    ),
    "a header of another shape": (
        lambda s: rewrite_header(s / SHARDS[3], lambda h: h[VALUES].update(shape=[1, 2])),
        [f"header: {VALUES}: offsets do not fit its shape [1, 2]"],
    ),
    "a header of tensors in one place": (
        lambda s: rewrite_header(s / SHARDS[3], lambda h: h[VALUES].update(data_offsets=h[OTHER]["data_offsets"])),
        ["shards are damaged (1)", f"{SHARDS[3]}: header: {VALUES} and {OTHER} overlap: a download that ended early"],
    ),
    "FP8": (
        lambda s: rewrite_header(s / SHARDS[3], lambda h: h[VALUES].update(dtype="F8_E4M3")),
        [
            "tensors have a dtype that cannot be converted (1)",
            f"{VALUES}: F8_E4M3 in {SHARDS[3]}",
            "Quantised weights (FP8, INT8, 4 bits) are not supported; use the bfloat16, float16 or float32 checkpoint",
        ],
    ),
    "in another file than the index says": (
        lambda s: edit_json(s / INDEX, lambda i: i["weight_map"].update({VALUES: SHARDS[0]})),
        [
            "tensors are not where the index says (1)",
            f"{VALUES}: the index expects it in {SHARDS[0]}, found in {SHARDS[3]}",
        ],
    ),
    "in no file": (
        lambda s: edit_shard(s / SHARDS[3], lambda t: t.pop(VALUES)),
        [f"{VALUES}: the index expects it in {SHARDS[3]}, no file that could be read holds it"],
    ),
    "in two files": (
        lambda s: edit_shard(s / SHARDS[0], lambda t: t.update({VALUES: torch.zeros(2).bfloat16()})),
        ["tensors lie in several shards (1)", f"{VALUES}: in {SHARDS[0]}, {SHARDS[3]}"],
    ),
    "not in the index": (
        lambda s: edit_json(s / INDEX, lambda i: i["weight_map"].pop(VALUES)),
        [f"tensors that are needed are not in {INDEX} (1)", f"{VALUES}: in {SHARDS[3]}"],
    ),
    "misshapen": (
        lambda s: [
            edit_shard(
                s / SHARDS[3],
                lambda t: t.update({VALUES: torch.zeros(608, 224).bfloat16(), "llm.model.norm.weight": torch.zeros(7)}),
            )
        ],
        [
            "tensors have another shape than the networks need (2)",
            f"{VALUES}: expected [224, 608], found [608, 224] in {SHARDS[3]}",
            "llm.model.norm.weight: expected [224], found [7]",
        ],
    ),
    "not floating point": (
        lambda s: edit_shard(s / SHARDS[3], lambda t: t.update({VALUES: torch.zeros(224, 608, dtype=torch.int8)})),
        ["tensors have a dtype that cannot be converted (1)", f"{VALUES}: I8"],
    ),
    "fewer layers than the config says": (
        lambda s: edit_json(s / CONFIG, lambda c: c["llm_config"].update(num_hidden_layers=5)),
        ["tensors are missing (24)", "llm.model.layers.3.input_layernorm.weight: expected [224]", "... and 14 more"],
    ),
    "vocabulary too small": (
        lambda s: edit_json(s / CONFIG, lambda c: c["llm_config"].update(vocab_size=600)),
        ["config.json", "545 text ids and 64 audio codes exceed llm.vocab_size 600"],
    ),
    "no pickle": (
        lambda s: (s / PICKLE).unlink(),
        ["files of speech are missing (1)", "token2wav/model.pt", "--no-token2wav"],
    ),
    "no speech": (
        lambda s: shutil.rmtree(s / "token2wav"),
        ["files of speech are missing (2)", "token2wav/model.pt", "token2wav/global_mean_var.npy", "--no-token2wav"],
    ),
    "a truncated pickle": (lambda s: truncate(s / PICKLE, 5000), ["model.pt: not a readable torch file"]),
    "a pickle from before torch 1.6": (
        lambda s: torch.save(
            torch.load(s / PICKLE, weights_only=True), s / PICKLE, _use_new_zipfile_serialization=False
        ),
        ["model.pt: not a readable torch file"],
    ),
    "a pickle with a damaged byte": (
        lambda s: (s / PICKLE).write_bytes((s / PICKLE).read_bytes().replace(b"}q", b"tq", 1)),
        ["model.pt: not a readable torch file"],
    ),
    "a pickle of something else": (lambda s: torch.save([1, 2], s / PICKLE), ["found no tensors"]),
    "a pickle without a tensor": (
        lambda s: edit_pickle(
            s / PICKLE, lambda m: [m.pop("wavegan.conv_pre.weight_g"), m.pop("token2latent.cond_proj.bias")]
        ),
        [
            "tensors are missing (2)",
            "token2latent.cond_proj.bias: expected [128]",
            "wavegan.conv_pre.weight_g: expected [128, 1, 1]",
        ],
    ),
    "a pickle with both spellings": (
        lambda s: edit_pickle(
            s / PICKLE, lambda m: m.update({"module.wavegan.conv_pre.bias": m["wavegan.conv_pre.bias"]})
        ),
        ["tensors are there twice", "wavegan.conv_pre.bias and module.wavegan.conv_pre.bias"],
    ),
    "filters that differ": (
        lambda s: edit_pickle(s / PICKLE, lambda m: m["wavegan.activation_post.upsample.filter"].add_(0.25)),
        ["vocoder.filters.up", "differs from the first by up to 0.25"],
    ),
    "no filters": (
        lambda s: edit_pickle(s / PICKLE, lambda m: [m.pop(k) for k in list(m) if k.endswith(".filter")]),
        ["wavegan.resblocks.*.activations.*.upsample.filter: expected [1, 1, 12]"],
    ),
    "statistics of another size": (
        lambda s: np.save(s / "token2wav" / "global_mean_var.npy", np.ones(9, np.float32)),
        ["global_mean_var: expected [16], found [9] in token2wav/global_mean_var.npy"],
    ),
    "a pickle of a tensor without values, and of a sparse one": (
        lambda s: edit_pickle(
            s / PICKLE,
            lambda m: m.update({"wavegan.conv_pre.bias": torch.zeros(128).to("meta"), "x": torch.eye(2).to_sparse()}),
        ),
        ["tensors are missing (1)", "wavegan.conv_pre.bias: expected [128]"],
    ),
    "no statistics": (lambda s: (s / "token2wav" / "global_mean_var.npy").unlink(), ["global_mean_var.npy"]),
    "an array that is a pickle": (
        lambda s: (s / "token2wav" / "global_mean_var.npy").write_bytes(pickle.dumps([1.0])),
        ["global_mean_var.npy: not a readable .npy file of numbers"],
    ),
    "an array of objects": (
        lambda s: np.save(s / "token2wav" / "global_mean_var.npy", np.array([{}], dtype=object)),
        ["global_mean_var.npy: not a readable .npy file of numbers"],
    ),
    "a voice of floats": (
        lambda s: np.save(s / "token2wav" / "prompt" / "prompt_token.npy", np.ones((1, 11))),
        ["prompt_token.npy: expected integers of shape [any], found float64 [11]"],
    ),
    "half a voice": (
        lambda s: [(s / "token2wav" / "prompt" / f"{n}.npy").unlink() for n in ("prompt_token", "speaker_embed")],
        ["prompt_token.npy: missing; speaker_embed.npy: missing"],
    ),
    "a voice with codes outside the table": (
        lambda s: edit_array(s / VOICE / "prompt_token.npy", lambda a: a.__setitem__((0, slice(3, 5)), [64, -1])),
        ["prompt_token.npy: 64 at [3] is not in 0..63, the first of 2"],
    ),
    "a voice with NaN and an infinity": (
        lambda s: [
            edit_array(s / VOICE / "prompt_latent.npy", lambda a: a.__setitem__((0, 7, 2), np.nan)),
            edit_array(s / VOICE / "speaker_embed.npy", lambda a: a.__setitem__((0, 15), np.inf)),
        ],
        ["prompt_latent.npy: nan at [7, 2] is not finite", "speaker_embed.npy: inf at [15] is not finite"],
    ),
    "a voice with more latents than its codes explain": (
        lambda s: edit_array(s / VOICE / "prompt_latent.npy", lambda a: np.resize(a, (1, 48, 8))),
        ["prompt_latent.npy: 48 frames, and 11 prompt codes explain 47 at most"],
    ),
    "a voice of another model": (
        lambda s: np.save(s / "token2wav" / "prompt" / "speaker_embed.npy", np.ones((1, 192), np.float32)),
        ["speaker_embed.npy: expected floats of shape [16], found float32 [192]"],
    ),
    "no tokenizer": (
        lambda s: [(s / n).unlink() for n in ("tokenizer.json", "merges.txt")],
        ["has no tokenizer.json", "merges.txt to build it from is missing"],
    ),
    "a tokenizer that is not one": (
        lambda s: (s / "tokenizer.json").write_text('{"model": 3}'),
        ["tokenizer.json: not a tokenizer that can be read"],
    ),
    "a tokenizer of another model": (
        lambda s: edit_json(s / CONFIG, lambda c: c.update(audio_token_index=500)),
        ["the number of tokens is not where the audio codes start", "expected audio_token_index of config.json, 500"],
    ),
    "a tokenizer with an id among the audio codes": (
        lambda s: edit_json(s / "tokenizer.json", lambda t: t["model"]["vocab"].update(e=600)),
        ["the number of tokens is not where the audio codes start (1)", "545; found 545 tokens, the last 600"],
    ),
    "special tokens missing": (
        lambda s: [
            edit_json(
                s / "tokenizer.json",
                lambda t: t.update(
                    added_tokens=[
                        token | {"content": token["content"].replace("cAUDIO", "gone")} for token in t["added_tokens"]
                    ]
                ),
            ),
            (s / "tokenizer_config.json").unlink(),
        ],
        ["special tokens are missing (3)", "<|begofcAUDIO|>", "<|cAUDIO|>", "<|endofcAUDIO|>"],
    ),
    "added tokens elsewhere": (
        lambda s: (s / "added_tokens.json").write_text('{"<|cAUDIO|>": 12}') and (s / "tokenizer_config.json").unlink(),
        ["added tokens have another id (1)", "<|cAUDIO|>: expected id 12, found 540"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_source_is_refused_by_name(fault: str, source: Path, convert, tmp_path: Path):
    damage, expected = FAULTS[fault]
    damage(source)
    outcome = convert(source)
    assert outcome.code == 1 and outcome.out == ""
    assert outcome.err.startswith("covo-convert: ") and "Traceback" not in outcome.err
    for part in expected:
        assert part in outcome.err, outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"], "nothing was written"


def test_findings_of_several_kinds_come_in_one_message(source: Path, convert):
    (source / SHARDS[1]).unlink()
    truncate(source / SHARDS[0], 10)
    edit_shard(source / SHARDS[3], lambda t: t.pop(VALUES))
    outcome = convert(source)
    assert len(re.findall(r"\(1\):", outcome.err)) == 3, outcome.err


class Malicious:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(form: str, source: Path, convert, tmp_path: Path):
    proof = tmp_path / "proof"
    if form == "torch":
        torch.save({"model": {"x": torch.zeros(1)}, "extra": Malicious(proof)}, source / PICKLE)
        part = "refused, nothing in it was run: the pickle wants more than tensors"
    else:
        (source / PICKLE).write_bytes(pickle.dumps(Malicious(proof)))
        part = "not a readable torch file"
    outcome = convert(source)
    assert outcome.code == 1 and part in outcome.err, outcome.err
    assert not proof.exists(), "the code ran"
    torch.load(source / PICKLE, weights_only=False) if form == "torch" else pickle.loads((source / PICKLE).read_bytes())
    assert proof.exists(), "this pickle does run code where that is allowed"
