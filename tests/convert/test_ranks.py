"""Checkpoints for several tensor-parallel ranks against the one for one rank, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import four_kv_heads
import pytest
import torch
from made_checkpoint import rewrite_manifest
from safetensors.torch import load_file
from torch import Tensor

from covo_npu.convert import rules
from covo_npu.convert.plan import recipes
from covo_npu.runtime.checkpoint.config import ConfigError, LLMConfig
from covo_npu.runtime.checkpoint.format import INT8, PREFIX, read_manifest
from covo_npu.runtime.networks.files import expected_tensors
from covo_npu.tools.check.ckpt import examine_folder
from covo_npu.tools.synth.config import PRESETS

CUT_ROWS = (
    *("qkv_proj.weight", "qkv_proj.bias", "gate_up_proj.weight", "lm_head.weight"),
    *("qkv_proj.scale", "gate_up_proj.scale", "lm_head.scale"),
)
CUT_COLUMNS = ("o_proj.weight", "down_proj.weight")


@pytest.fixture(
    params=[(size, weights) for weights in ((), *(("--weights", word) for word in INT8)) for size in (2, 4)],
    ids=lambda param: " ".join([str(param[0]), *param[1][1:]]),
)
def pair(request: pytest.FixtureRequest, tiny_source: Path, tmp_path: Path, convert: Callable) -> tuple[Path, ...]:
    """(source, checkpoint of one rank, checkpoint of several): two of the pack's heads, four of a made one."""
    size, weights = request.param
    source = tiny_source if size == 2 else four_kv_heads.write(tmp_path / "four")
    one, several = tmp_path / "one", tmp_path / "several"
    assert convert(source, *weights, dst=one).code == 0
    assert convert(source, *weights, "--tp", str(size), dst=several).code == 0
    return source, one, several


def llm_files(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(folder / name) for name in read_manifest(folder).ranks]


def blocks(name: str, config: LLMConfig) -> list[int]:
    """Rows of what lies fused in a tensor: the textbook sizes of q, k and v, of gate and up."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    table = {"qkv_proj": [q, kv, kv], "gate_up_proj": 2 * [config.intermediate_size], "lm_head": [config.vocab_size]}
    return next(sizes for part, sizes in table.items() if part in name)


def test_the_ranks_files_hold_each_row_and_column_of_the_whole_once(pair: tuple[Path, ...]):
    _, one, several = pair
    (whole,), parts = llm_files(one), llm_files(several)
    config = read_manifest(one).config.llm
    assert read_manifest(several).config.llm == config
    for name, tensor in whole.items():
        if name.startswith("__pad"):
            continue
        found = [part[name] for part in parts]
        if name.endswith(CUT_ROWS):
            at = 0
            for rows, block in zip(blocks(name, config), tensor.split(blocks(name, config)), strict=True):
                share = -(-rows // len(parts))
                joined = torch.cat([part[at : at + share] for part in found])
                assert torch.equal(joined[:rows], block) and not joined[rows:].any(), name
                at += share
            assert at == found[0].shape[0]
        elif name.endswith(CUT_COLUMNS):
            assert torch.equal(torch.cat(found, dim=1), tensor), name
        else:
            assert all(torch.equal(part, tensor) for part in found), name


def test_all_else_is_as_for_one_rank(pair: tuple[Path, ...]):
    _, one, several = pair
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (one, several)]
    for key in ("config", "dtype", "weights", "left_out", "source", "special_tokens"):
        assert manifests[0][key] == manifests[1][key], key
    for name in ("encoder.safetensors", "token2wav.safetensors", "tokenizer.json", PREFIX):
        assert (one / name).read_bytes() == (several / name).read_bytes()


def test_the_check_against_the_source_undoes_the_ranks(pair: tuple[Path, ...], tmp_path: Path):
    source, _, several = pair
    result = examine_folder(several, source, None)
    assert all(finding.holds for finding in result.findings), result.findings


def test_the_check_against_the_source_notices_ranks_in_another_order(
    tiny_source: Path, tmp_path: Path, convert: Callable
):
    assert convert(tiny_source, "--tp", "2").code == 0
    rewrite_manifest(tmp_path / "target", lambda manifest: manifest["tensor_parallel"]["ranks"].reverse())
    failed = [
        finding for finding in examine_folder(tmp_path / "target", tiny_source, None).findings if not finding.holds
    ]
    assert [finding.name for finding in failed] == ["system prompt", "tensors against the source"]
    assert "qkv_proj" in failed[1].measured


def test_a_rank_of_the_published_size_has_its_part_of_the_bytes():
    """Embeddings and norms are whole; of the head each has 84028 rows of 168055, or 42014."""
    llm = PRESETS["full"].llm
    for size, rows in ((2, 84028), (4, 42014)):
        shapes = expected_tensors(PRESETS["full"], tp=size)["llm"]
        matrices = llm.num_layers * ((28 + 2 * 4) * 128 * 3584 + 28 * 128 * 3584 + 3 * 3584 * 18944) // size
        vectors = llm.num_layers * ((28 + 2 * 4) * 128 // size + 2 * 3584) + 3584
        tables = 168055 * 3584 + rows * 3584
        assert sum(prod(shape) for shape in shapes.values()) == matrices + vectors + tables


@pytest.mark.parametrize("int8", [(), *INT8.values()], ids=["float", *INT8])
def test_every_matrix_of_the_layers_says_how_it_is_split(int8: tuple[str, ...]):
    """A product that no rule splits would be computed by all ranks and summed."""
    made = [recipe for recipe in recipes(PRESETS["tiny"], int8=int8) if recipe.file == "llm"]
    by_rows = {recipe.target for recipe in made if recipe.split in (rules.HEADS, rules.SPLIT_ROWS)}
    by_columns = {recipe.target for recipe in made if recipe.split is rules.COLUMNS}
    assert by_rows == {recipe.target for recipe in made if recipe.target.endswith(CUT_ROWS)}
    assert by_columns == {recipe.target for recipe in made if recipe.target.endswith(CUT_COLUMNS)}


@pytest.mark.parametrize(
    ("change", "size", "says"),
    [
        (
            {},
            8,
            "8 tensor-parallel ranks cannot share 28 heads, 4 kv heads evenly; this model can be split into 1, 2, 4",
        ),
        ({"intermediate_size": 18942}, 4, "cannot share 18942 feed-forward columns evenly"),
        ({"num_kv_heads": 7}, 4, "cannot share 7 kv heads evenly; this model can be split into 1$"),
    ],
)
def test_what_cannot_be_shared_evenly_is_refused(change: dict[str, int], size: int, says: str):
    with pytest.raises(ConfigError, match=says):
        replace(PRESETS["full"].llm, **change).of_rank(size)
