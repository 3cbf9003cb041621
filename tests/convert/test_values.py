"""Values that cannot be used: every bit pattern against torch, and sources that hold them, named with their places."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from source_edits import PICKLE, SHARDS, VALUES, edit_pickle, edit_shard

from covo_npu.convert.values import PIECE_BYTES, RUN_BYTES, Values, bits, not_finite, place

NAN, INF = float("nan"), float("inf")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
EMBEDDING = "llm.model.embed_tokens.weight"  # 609 x 224


# --- the bits


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_value_of_16_bits_is_judged_as_torch_does(dtype: str):
    patterns = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(patterns.view(np.int16).copy()).view(DTYPES[dtype]).isfinite().numpy()
    for pattern, finite in zip(patterns, expected, strict=True):
        assert Values(dtype).see(memoryview(pattern.tobytes())) != finite, hex(pattern)
    seen, data = Values(dtype), memoryview(patterns.tobytes())
    assert seen.see(data) and np.array_equal(not_finite(data, dtype), ~expected)
    assert (seen.not_finite, seen.first) == ((~expected).sum(), np.flatnonzero(~expected)[0])


EDGES = [0.0, -0.0, 1.0, -1.0, 5e-324, NAN, -NAN, INF, -INF]


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_and_payloads_are_judged_as_torch_does(dtype: str):
    torch_dtype = DTYPES[dtype]
    info, size = torch.finfo(torch_dtype), torch_dtype.itemsize
    values = torch.tensor([*EDGES, info.max, info.min, info.tiny, -info.tiny]).to(torch_dtype)
    raw = np.frombuffer(bits(values), f"u{size}")
    signed_zero, infinity = int(raw[1]), int(raw[7])
    payloads = [infinity + 1, infinity - 1, infinity | signed_zero, (infinity | signed_zero) + 1, signed_zero - 1,
                2 * signed_zero - 1, signed_zero | (infinity - 1)]  # fmt: skip
    for pattern in [*raw.tolist(), *payloads]:
        data = np.array([pattern], f"u{size}").tobytes()
        finite = bool(torch.frombuffer(bytearray(data), dtype=torch_dtype).isfinite())
        assert Values(dtype).see(memoryview(data)) != finite, hex(pattern)
        assert not_finite(memoryview(data), dtype).item() != finite, hex(pattern)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_value_anywhere_among_random_ones_is_found_in_its_place(dtype: str, bad: float):
    rng = torch.Generator().manual_seed(2)
    values = torch.randn(5000, generator=rng).to(DTYPES[dtype])
    values[::7] *= -1e-4
    for index in (0, 1, 2499, 4999):
        changed = values.clone()
        changed[index] = bad
        seen, found = Values(dtype), []
        for start in range(0, 5000, 999):  # in pieces
            found += [start] * seen.see(bits(changed[start : start + 999]))
        assert found == [index - index % 999] and (seen.not_finite, seen.first) == (1, index)
    seen = Values(dtype)
    assert not seen.see(bits(values)) and seen.not_finite == 0 and not seen.only_zeros


def test_zeros_are_seen_and_their_longest_run_is_measured():
    def seen(*pieces: torch.Tensor) -> Values:
        values = Values("BF16")
        for piece in pieces:
            values.see(bits(piece))
        return values

    zeros, ones = torch.zeros(1000).bfloat16(), torch.ones(1000).bfloat16()
    assert seen(zeros, zeros).only_zeros and seen(zeros, zeros).zeros_bytes == 4000
    mixed = seen(zeros, ones, zeros, zeros, zeros, ones, zeros)
    assert not mixed.only_zeros and mixed.zeros_bytes == 6000
    assert not seen(-zeros).only_zeros, "a negative zero was written by somebody"
    assert not Values("BF16").only_zeros and not Values("I64").only_zeros, "there was nothing"
    assert not Values("I64").see(bits(torch.full((3,), -1))), "of integers nothing is noted"


def test_places_count_as_numpy_does():
    shape = (3, 4, 5)
    for index in range(60):
        where = np.argwhere(np.arange(60).reshape(shape) == index)[0].tolist()
        assert place(index, shape) == str(where)
    assert place(0, ()) == "[]"


# --- sources that hold them


def put(index: tuple[int, ...], value: float):
    def change(tensor: torch.Tensor) -> None:
        tensor[index] = value

    return change


def in_shard(name: str, change):
    def edit(source: Path) -> None:
        def change_it(tensors: dict) -> None:
            tensors[name] = tensors[name].clone()
            change(tensors[name])

        (shard,) = [s for s in SHARDS if name in load_file(source / s)]
        edit_shard(source / shard, change_it)

    return edit


def in_pickle(name: str, change):
    return lambda source: edit_pickle(source / PICKLE, lambda state: change(state[name]))


def in_array(name: str, index: tuple[int, ...], value: float):
    def edit(source: Path) -> None:
        array = np.load(source / "token2wav" / name)
        array[index] = value
        np.save(source / "token2wav" / name, array)

    return edit


NOT_FINITE = {
    "a weight of the LLM": (
        in_shard(VALUES, put((0, 5), NAN)),
        f"{VALUES} in {SHARDS[3]}: 1 of 136192 values are not finite, the first at [0, 5]",
    ),
    "many weights": (
        in_shard(EMBEDDING, put((slice(607, 609), slice(None)), INF)),
        f"{EMBEDDING} in {SHARDS[1]}: 448 of 136416 values are not finite, the first at [607, 0]",
    ),
    "the last weight": (in_shard("llm.lm_head.weight", put((608, 223), -INF)), "the first at [608, 223]"),
    "a bias that is fused": (
        in_shard("llm.model.layers.0.self_attn.k_proj.bias", put((31,), NAN)),
        "llm.model.layers.0.self_attn.k_proj.bias in model-0000",
    ),
    "a convolution of the encoder": (in_shard("encoder.conv1.weight", put((1, 2, 0), NAN)), "the first at [1, 2, 0]"),
    "a norm of the adapter's layer": (
        in_shard("audio_adapter.downsample_layers.2.linear2.bias", put((0,), INF)),
        "audio_adapter.downsample_layers.2.linear2.bias in",
    ),
    "the DiT": (
        in_pickle("token2latent.cond_proj.weight", put((3, 4), NAN)),
        "token2latent.cond_proj.weight in token2wav/model.pt: 1 of ",
    ),
    "a direction that is folded": (
        in_pickle("wavegan.conv_pre.weight_v", put((2, 1, 6), INF)),
        "wavegan.conv_pre.weight_v in token2wav/model.pt: 1 of 7168 values are not finite, the first at [2, 1, 6]",
    ),
    "a filter": (
        in_pickle("wavegan.activation_post.upsample.filter", put((0, 0, 11), NAN)),
        "wavegan.activation_post.upsample.filter in token2wav/model.pt: 1 of 12 values are not finite",
    ),
    "the statistics": (
        in_array("global_mean_var.npy", (0, 9), NAN),
        "global_mean_var in token2wav/global_mean_var.npy: 1 of 16 values are not finite, the first at [9]",
    ),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_value_that_is_not_finite_is_named_with_its_place(case: str, source: Path, convert, tmp_path: Path):
    damage, expected = NOT_FINITE[case]
    damage(source)
    outcome = convert(source)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert "cannot be converted; what was written is removed" in outcome.err
    assert "tensors hold values that are not finite (1):" in outcome.err, outcome.err
    assert expected in outcome.err, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_all_of_them_are_named_in_one_pass(source: Path, convert):
    for damage, _ in NOT_FINITE.values():
        damage(source)
    err = convert(source).err
    (count,) = re.findall(r"values that are not finite \((\d+)\)", err)
    assert int(count) == len(NOT_FINITE) and "... and" not in err
    for _, expected in NOT_FINITE.values():
        assert expected in err, err


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
def test_a_source_of_another_dtype_is_looked_at_before_it_is_cast(dtype: str, target: str, source: Path, convert):
    for shard in SHARDS:
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(source / shard).items()}
        if VALUES in tensors:
            tensors[VALUES][7, 300] = NAN
        save_file(tensors, source / shard)
    outcome = convert(source, "--dtype", target)
    assert f"{VALUES} in {SHARDS[3]}: 1 of 136192 values are not finite, the first at [7, 300]" in outcome.err, (
        outcome.err
    )
    assert "do not fit" not in outcome.err


def test_a_value_in_a_tensor_that_is_left_out_does_not_matter(source: Path, convert):
    edit_pickle(source / PICKLE, lambda state: state.update({"wavegan.encoder.x": torch.tensor([NAN])}))
    assert convert(source).code == 0


# --- what becomes of them


def test_values_beyond_float16_are_counted_and_named_with_an_example(source: Path, convert, tmp_path: Path):
    in_shard("llm.model.layers.1.mlp.up_proj.weight", put((5, slice(6, 9)), 1e6))(source)
    in_shard("encoder.conv1.weight", put((0, 0, 0), -70000))(source)
    assert convert(source).code == 0, "bfloat16 holds them"
    outcome = convert(source, "--dtype", "float16", dst=tmp_path / "other")
    assert outcome.code == 1 and "tensors hold values that do not fit (2):" in outcome.err
    first = "llm.model.layers.1.mlp.up_proj.weight in model-00003-of-00004.safetensors: 3 of 136192 values do not fit"
    assert f"{first} into F16, such as 999424 at [5, 6]" in outcome.err, outcome.err
    assert "encoder.conv1.weight in model-00002-of-00004.safetensors: 1 of " in outcome.err
    assert "such as -70144 at [0, 0, 0]" in outcome.err  # what bfloat16 makes of 70000
    assert "Choose another --dtype: bfloat16 and float32 hold what is below 3.3e38." in outcome.err
    assert not (tmp_path / "other").exists()


def test_the_largest_values_of_float16_and_what_rounds_to_them_fit(source: Path, convert, tmp_path: Path):
    """65504 is the largest; up to 65520, halfway to what would be next, rounding leads back to it."""
    tensors = {name: tensor.float() for name, tensor in load_file(source / SHARDS[3]).items()}
    tensors[VALUES][0, :4] = torch.tensor([65504.0, -65504.0, 65519.99, -65519.99])
    save_file(tensors, source / SHARDS[3])
    assert convert(source, "--dtype", "float16").code == 0
    found = load_file(tmp_path / "target" / "llm-rank0of1.safetensors")["llm.layers.1.down_proj.weight"][0, :4]
    assert found.tolist() == [65504.0, -65504.0, 65504.0, -65504.0]
    tensors[VALUES][0, 2] = 65520.0
    save_file(tensors, source / SHARDS[3])
    assert (
        "1 of 136192 values do not fit into F16, such as 65520 at [0, 2]"
        in convert(source, "--force", "--dtype", "float16").err
    )


def test_float64_values_beyond_float32_are_named_where_something_is_computed_of_them(source: Path, convert):
    name = "wavegan.conv_pre.weight_v"
    edit_pickle(source / PICKLE, lambda state: state.update({name: state[name].double()}))
    assert convert(source).code == 0
    in_pickle(name, put((1, 1, 1), 1e300))(source)
    outcome = convert(source, "--force")
    assert f"{name} in token2wav/model.pt: 1 of 7168 values do not fit into F32, such as 1e+300" in outcome.err
    assert "What is larger is damage." in outcome.err, "no --dtype holds it"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            in_array("global_mean_var.npy", (0, 11), -0.5),
            "statistics.std, std of global_mean_var: 1 of 8 values are not finite, the first at [3]",
        ),
        (
            in_pickle("wavegan.conv_pre.weight_v", put((4,), 0.0)),
            "vocoder.conv_pre.weight, fold of wavegan.conv_pre.weight_g and wavegan.conv_pre.weight_v: 56 of 7168",
        ),
        (
            in_pickle("wavegan.activation_post.act.alpha", put((1,), 99.0)),
            "vocoder.act_post.alpha, exp of wavegan.activation_post.act.alpha: 1 of 2 values are not",
        ),
    ],
    ids=["negative variance", "direction of zeros", "huge log scale"],
)
def test_what_is_not_finite_once_it_is_computed_is_named_with_what_it_is_made_of(damage, expected, source, convert):
    damage(source)
    outcome = convert(source)
    assert outcome.code == 1 and "tensors cannot be computed (1):" in outcome.err
    assert expected in outcome.err, outcome.err


def test_zeros_that_make_other_faults_are_named_with_them(source: Path, convert):
    """A hole in the middle of the pickle: filters that differ are its consequence."""
    data = bytearray((source / PICKLE).read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    (source / PICKLE).write_bytes(data)
    err = convert(source).err
    assert "tensors cannot be computed" in err and "differs from the first by up to" in err
    assert "tensors are all zeros" in err and f"in {PICKLE}: [" in err


# --- zeros


def test_a_matrix_of_zeros_is_refused_unless_it_is_allowed_a_vector_is_common(source: Path, convert, tmp_path: Path):
    in_shard("llm.model.layers.0.self_attn.q_proj.bias", put((slice(None),), 0.0))(source)
    assert convert(source).code == 0
    in_shard(VALUES, put((slice(None),), 0.0))(source)
    outcome = convert(source, dst=tmp_path / "other")
    assert outcome.code == 1 and "tensors are all zeros (1):" in outcome.err
    assert f"{VALUES} in {SHARDS[3]}: [224, 608]" in outcome.err and "--allow-zeros" in outcome.err
    assert convert(source, "--allow-zeros", dst=tmp_path / "other").code == 0
    assert not load_file(tmp_path / "other" / "llm-rank0of1.safetensors")["llm.layers.1.down_proj.weight"].any()


def test_a_long_run_of_zeros_inside_a_tensor_is_mentioned(source: Path, convert, tmp_path: Path, monkeypatch):
    """The tiny tensors are smaller than a run worth a word, so that is made shorter here."""
    monkeypatch.setattr("covo_npu.convert.reading.RUN_BYTES", 2**15)
    monkeypatch.setattr("covo_npu.convert.reading.PIECE_BYTES", 2**12)
    assert RUN_BYTES > PIECE_BYTES > 2**12
    in_shard(EMBEDDING, put((slice(100, 300),), 0.0))(source)  # 89600 bytes
    outcome = convert(source)
    assert outcome.code == 0
    assert f"warning: {EMBEDDING} in {SHARDS[1]}: 0.1 MB of it are zeros, one after another" in outcome.err
    assert outcome.err.count("warning") == 1
