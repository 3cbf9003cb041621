"""A checkpoint with random weights, exactly in the layout of the published one.

For demonstrations, tests and measurements without the published weights. Names and shapes come from the converter's
rules. The scales keep activations sane: products by 1 / sqrt(fan-in), norms near 1, residual branches a little smaller.
"""

import fnmatch
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covo_npu.convert.plan import Need, recipes
from covo_npu.convert.stream import Bytes, ByteStream, write_file
from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.checkpoint.config import ModelConfig, Token2WavConfig
from covo_npu.runtime.voice import FILES
from covo_npu.tools.synth.config import PRESETS, token2wav_json, upstream_json
from covo_npu.tools.synth.tokenizer import write_tokenizer

SHARDS = 4
# A shard ends after a tensor of these: in the middle of a layer, so that q and k, k and v, gate and up are apart.
CUT_AFTER = (".self_attn.q_proj.weight", ".mlp.gate_proj.weight", ".self_attn.k_proj.weight")
PERIOD = 2**18  # larger tensors repeat this many normal values, each time rotated and with other signs

Scale = Callable[[Sequence[int]], float]


def by_fan_in(gain: float = 1.0) -> Scale:
    """Return the standard deviation that keeps a product at `gain` times the size of its input."""
    return lambda shape: gain / math.sqrt(prod(shape[1:]))


def fixed(value: float) -> Scale:
    """Return a standard deviation that does not depend on the shape."""
    return lambda shape: value


# (name, mean, standard deviation); the first that matches.
SCALES: tuple[tuple[str, float, Scale], ...] = (
    ("*norm.weight", 1.0, fixed(0.1)),
    ("*.bias", 0.0, fixed(0.02)),
    ("llm.model.embed_tokens.weight", 0.0, fixed(1.0)),
    ("llm.lm_head.weight", 0.0, by_fan_in(3.0)),  # logits with a clear best
    ("token2latent.*_proj.weight", 0.0, by_fan_in()),
    ("*.[qk]_proj.weight", 0.0, by_fan_in(1.5)),  # attention that is not flat
    ("*.mlp.down_proj.weight", 0.0, by_fan_in(0.5)),
    ("*.self_attn.o*_proj.weight", 0.0, by_fan_in(0.5)),
    ("encoder.layers.*.fc2.weight", 0.0, by_fan_in(0.5)),
    ("encoder.embed_positions.weight", 0.0, fixed(0.1)),
    ("token2latent.*modulation*.weight", 0.0, by_fan_in(0.5)),
    ("wavegan.*.act.*", 0.0, fixed(0.3)),  # log scale
    ("wavegan.resblocks.*.convs2.*.weight_g", 0.5, fixed(0.02)),
    ("wavegan.conv_post.weight_g", 0.3, fixed(0.02)),
    ("wavegan.*.weight_g", 1.0, fixed(0.05)),
    ("voice.speaker_embed", 0.0, fixed(0.06)),
    ("voice.prompt_latent", 0.0, fixed(1.0)),
    ("global_mean_var", 0.0, fixed(0.3)),
    ("*", 0.0, by_fan_in()),
)


def write_source(config: ModelConfig, seed: int, folder: Path, advance: Callable[[int], object]) -> None:
    """Write the checkpoint of a preset into an empty folder: the same bytes for the same preset and seed."""
    needs = {need.name: need for recipe in recipes(config) for need in recipe.needs if need.name}
    shards = cut([need for group in ("audio_adapter.", "encoder.", "llm.") for need in _upstream_order(needs, group)])
    values = RandomValues(seed)
    (folder / "token2wav" / "prompt").mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs: list[Future[Any]] = [pool.submit(_write_token2wav, config, needs, values, folder / "token2wav", advance)]
        for number, shard in enumerate(shards, start=1):
            jobs.append(pool.submit(write_file, folder / shard_name(number), _shard(shard, values), advance))
        write_tokenizer(folder, config.audio_token_index)
        _write_json(folder / "config.json", upstream_json(config))
        _write_json(folder / "token2wav" / "config.json", token2wav_json(config))
        weight_map = {need.name: shard_name(n) for n, shard in enumerate(shards, start=1) for need in shard}
        total = sum(_bytes(need) for shard in shards for need in shard)
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
        for job in jobs:
            job.result()


def write_converted(preset: str, folder: Path) -> Path:
    """Return a converted checkpoint of a preset in bfloat16, made in an empty folder with its source beside it."""
    from covo_npu.convert.plan import make_plan
    from covo_npu.convert.source import open_source
    from covo_npu.convert.write import write_checkpoint

    src, ckpt = folder / "source", folder / "ckpt"
    src.mkdir()
    ckpt.mkdir()
    write_source(PRESETS[preset], 0, src, lambda count: None)
    source = open_source(src, None, True)
    write_checkpoint(make_plan(source, torch.bfloat16), source, ckpt)
    return ckpt


def size_of(config: ModelConfig) -> int:
    """Return the bytes of all tensors of a preset's source."""
    needs = {need.name: need for recipe in recipes(config) for need in recipe.needs if need.name}
    return sum(_bytes(need) if _in_shards(need.name) else 2 * _bytes(need) for need in needs.values())


def cut(needs: Sequence[Need]) -> list[list[Need]]:
    """Return the tensors in four shards of about one size, each but the last cut in the middle of a layer."""
    ends = np.cumsum([_bytes(need) for need in needs])
    cuts = [0]
    for number, suffix in enumerate(CUT_AFTER, start=1):
        wanted = ends[-1] * number / SHARDS
        places = [i + 1 for i, need in enumerate(needs) if need.name.startswith("llm.") and need.name.endswith(suffix)]
        cuts.append(min((i for i in places if i > cuts[-1]), key=lambda i: abs(ends[i - 1] - wanted)))
    return [list(needs[start:end]) for start, end in zip(cuts, [*cuts[1:], len(needs)], strict=True)]


def shard_name(number: int) -> str:
    """Return the file name of a shard, counted from 1."""
    return f"model-{number:05d}-of-{SHARDS:05d}.safetensors"


class RandomValues:
    """Random values by tensor name: Philox keyed by (seed, name), so neither order nor threads matter."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        base = self._generator("")
        self._normal = base.standard_normal(PERIOD, dtype=np.float32)
        self._flip = np.tile(base.integers(0, 2, PERIOD, dtype=np.uint32) << np.uint32(31), 2)  # sign bits

    def small(self, name: str, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return a whole tensor in float32, every value drawn for it."""
        mean, deviation = _scale(name, shape)
        return mean + deviation * self._generator(name).standard_normal(tuple(shape), dtype=np.float32)

    def integers(self, name: str, below: int, shape: Sequence[int]) -> NDArray[np.int64]:
        """Return whole numbers in [0, below)."""
        return self._generator(name).integers(0, below, tuple(shape), dtype=np.int64)

    def stream(self, need: Need, dtype: torch.dtype) -> ByteStream:
        """Return the bytes of a tensor in bfloat16 or float32."""
        if prod(need.shape) <= PERIOD:
            return Bytes(_bits(torch.from_numpy(self.small(need.name, need.shape)).to(dtype)).data)
        mean, deviation = _scale(need.name, need.shape)
        assert mean == 0, f"{need.name}: signs may only be flipped around zero"
        bits = _bits((torch.from_numpy(self._normal) * deviation).to(dtype))
        shift = np.uint32(32 - 8 * dtype.itemsize)
        chunks = -(-prod(need.shape) // PERIOD)
        places = self._generator(need.name).integers(0, PERIOD, (chunks, 2)).tolist()
        return Tiles(np.tile(bits, 2), (self._flip >> shift).astype(bits.dtype), places, prod(need.shape))

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, zlib.crc32(name.encode())]))


class Tiles:
    """A stream of one period of values again and again, rotated and with signs flipped in another way each time."""

    def __init__(self, bits: NDArray[Any], flip: NDArray[Any], places: list[list[int]], count: int) -> None:
        self._bits, self._flip, self._places, self._count = bits, flip, places, count
        self._at = 0

    @property
    def bytes(self) -> int:
        """How many there are."""
        return self._count * self._bits.itemsize

    def read_into(self, view: memoryview) -> None:
        """Fill the view, whole values only."""
        out = np.frombuffer(view, dtype=self._bits.dtype)
        done = 0
        while done < out.size:
            chunk, inside = divmod(self._at, PERIOD)
            count = min(PERIOD - inside, out.size - done)
            a, b = (place + inside for place in self._places[chunk])
            np.bitwise_xor(self._bits[a : a + count], self._flip[b : b + count], out=out[done : done + count])
            self._at, done = self._at + count, done + count


def kaiser_sinc(taps: int = 12, ratio: int = 2) -> Tensor:
    """Return BigVGAN's anti-alias low-pass [1, 1, taps]: cut-off 0.5 / ratio, transition 0.6 / ratio, Kaiser window.

    Source: arXiv 2206.04658; Kaiser's formulas for attenuation and beta.
    """
    attenuation = 2.285 * (taps // 2 - 1) * math.pi * 4 * (0.6 / ratio) + 7.95
    beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    beta = 0.1102 * (attenuation - 8.7) if attenuation > 50 else beta
    time_ = torch.arange(-(taps // 2), taps // 2) + 0.5
    window = torch.kaiser_window(taps, periodic=False, beta=beta)
    response = window * torch.sinc(time_ / ratio) / ratio
    return (response / response.sum()).view(1, 1, taps)


# --- shards


def _upstream_order(needs: dict[str, Need], prefix: str) -> list[Need]:
    return [need for name, need in needs.items() if name.startswith(prefix)]


def _in_shards(name: str) -> bool:
    return name.startswith(("audio_adapter.", "encoder.", "llm."))


def _bytes(need: Need) -> int:
    return 2 * prod(need.shape)


def _shard(needs: Iterable[Need], values: RandomValues) -> Iterator[ByteStream]:
    """Yield the bytes of a shard as the safetensors library writes it: tensors by name, the header 8-byte aligned."""
    ordered = sorted(needs, key=lambda need: need.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for need in ordered:
        header[need.name] = {
            "dtype": "BF16",
            "shape": list(need.shape),
            "data_offsets": [end, end := end + _bytes(need)],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield Bytes(len(text).to_bytes(8, "little") + text)
    for need in ordered:
        yield values.stream(need, torch.bfloat16)


def _scale(name: str, shape: Sequence[int]) -> tuple[float, float]:
    return next((mean, scale(shape)) for pattern, mean, scale in SCALES if fnmatch.fnmatchcase(name, pattern))


def _bits(tensor: Tensor) -> NDArray[Any]:
    """Return the bits of a tensor as unsigned integers, flat."""
    return tensor.flatten().view({2: torch.uint16, 4: torch.uint32}[tensor.dtype.itemsize]).numpy()


# --- token2wav


def _write_token2wav(
    config: ModelConfig, needs: dict[str, Need], values: RandomValues, folder: Path, advance: Callable[[int], object]
) -> None:
    speech = config.token2wav
    assert speech is not None
    state = {
        name: _tensor(need, values)
        for name, need in needs.items()
        if name.startswith(("token2latent.", "wavegan.")) and "*" not in name
    }
    for stage, rate in enumerate(
        speech.vocoder.upsample_rates
    ):  # a transposed convolution adds up 2 / rate of its taps
        state[f"wavegan.ups.{stage}.0.weight_g"] *= math.sqrt(rate / 2)
    for name in [name for name in state if name.endswith(".act.alpha")]:
        act = name.removesuffix(".act.alpha")
        state[f"{act}.upsample.filter"] = kaiser_sinc()
        state[f"{act}.downsample.lowpass.filter"] = kaiser_sinc()
    state |= {f"token2latent.blocks.{i}.attn.rotary.inv_freq": _inv_freq(speech) for i in range(speech.dit.num_layers)}
    try:
        torch.save({"model": state, "step": 0}, folder / "model.pt")
    except RuntimeError as error:  # torch's word for a disk that is full
        raise CovoError(f"token2wav/model.pt cannot be written ({error}): is the disk full?") from error
    advance(2 * sum(_bytes(Need(name, tuple(tensor.shape))) for name, tensor in state.items()))
    statistics = values.small("global_mean_var", needs["global_mean_var"].shape)[None]
    statistics[:, speech.dit.latent_dim :] = np.exp(statistics[:, speech.dit.latent_dim :]) / 2  # variances
    np.save(folder / "global_mean_var.npy", statistics)
    for part, (file, kinds) in FILES.items():
        name, shape = f"voice.{Path(file).stem}", (1, *needs[f"voice.{part}"].shape)
        made = values.integers(name, speech.dit.num_codes, shape) if "i" in kinds else values.small(name, shape)
        np.save(folder / "prompt" / file, made)


def _tensor(need: Need, values: RandomValues) -> Tensor:
    stream = values.stream(need, torch.float32)
    data = torch.empty(need.shape, dtype=torch.float32)
    stream.read_into(memoryview(data.view(-1).view(torch.uint8).numpy().data))
    return data


def _inv_freq(speech: Token2WavConfig) -> Tensor:
    head_dim = speech.dit.hidden_size // speech.dit.num_heads
    return 1.0 / speech.dit.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
