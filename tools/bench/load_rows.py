"""The rows of `covo-bench load`: one way each from the start of a process to its first token, told in moments.

Run as a process of its own, `python -m covo_npu.tools.bench.load_rows JSON`. It prints one JSON object of
CLOCK_MONOTONIC moments. All rows hear the same question of 8 s, take the same prompt, and compute one token, a2t.

stock          as the published example does it: build with random weights, move, load the shards one by one.
from_pretrained the same classes through transformers' modern loader: built on meta, weights mapped lazily.
ours           covo_npu's public API on a converted checkpoint, mapped; ours_eager reads it into memory first.

The first two are written over transformers' classes. Both unpickle token2wav but do not build its networks, and their
front end is transformers' own: both omissions are in their favour.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covo_npu.tools.question import RATE, made_up

PLACEHOLDERS = 50  # 8 s at 100 Hz, halved four times


@dataclass(frozen=True, slots=True)
class Task:
    """What to run. src: source checkpoint; ckpt: converted checkpoint; first_token: go on after ready."""

    row: str
    src: str
    ckpt: str
    device: str
    first_token: bool


@dataclass(slots=True)
class Moments:
    """When each step was done. bytes: of the weights that were loaded; token: its id, to see that rows agree."""

    imports: float = 0.0
    init: float = 0.0
    weights: float = 0.0
    ready: float = 0.0
    first_token: float = 0.0
    bytes: int = 0
    loader_s: float = 0.0
    token: int = -1


# --- transformers' classes


def _covo_class(src: Path) -> tuple[Any, Any]:
    """Return (model class, its config): Qwen2, Whisper's encoder and the adapter under the names of the source."""
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    class CovoConfig(PretrainedConfig):
        model_type = "covo_audio"
        sub_configs = {"llm_config": Qwen2Config, "encoder_config": WhisperConfig}  # noqa: RUF012

        def __init__(
            self, llm_config: Any = None, encoder_config: Any = None, adapter: Any = None, **rest: Any
        ) -> None:
            self.llm_config = Qwen2Config(**(llm_config or {}))
            self.encoder_config = WhisperConfig(**(encoder_config or {}))
            self.adapter = adapter or []
            super().__init__(**rest)

    class AdapterLayer(nn.Module):
        def __init__(self, hidden: int, inner: int, out: int) -> None:
            super().__init__()
            self.conv1d = nn.Conv1d(hidden, hidden, 3, stride=2, padding=1)
            self.linear1 = nn.Linear(hidden, inner)
            self.linear2 = nn.Linear(inner, out)

        def forward(self, x: Any) -> Any:
            x = self.conv1d(x.transpose(1, 2)).transpose(1, 2)
            return self.linear2(self.linear1(x.relu()).relu())

    class Adapter(nn.Module):
        def __init__(self, sizes: Any) -> None:
            super().__init__()
            self.downsample_layers = nn.ModuleList(AdapterLayer(*size) for size in sizes)

    class Covo(PreTrainedModel):
        config_class = CovoConfig
        _supports_sdpa = True

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.llm = Qwen2ForCausalLM(config.llm_config)
            self.encoder = WhisperEncoder(config.encoder_config)
            self.audio_adapter = Adapter(config.adapter)
            self.post_init()

        def first_token(self, mel: Any, ids: Any, first: int) -> int:
            """Return the id that follows the prompt; the audio's features replace the embeddings from `first` on."""
            x = self.encoder(mel.to(self.dtype)).last_hidden_state
            for layer in self.audio_adapter.downsample_layers:
                x = layer(x)
            embeddings = self.llm.get_input_embeddings()(ids)
            embeddings[:, first : first + PLACEHOLDERS] = x[:, :PLACEHOLDERS]
            logits = self.llm(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1).logits
            return int(logits[0, -1].argmax())

    config = json.loads((src / "config.json").read_text("utf-8"))
    adapter = _adapter_sizes(src)
    return Covo, CovoConfig(llm_config=config["llm_config"], encoder_config=config["encoder_config"], adapter=adapter)


def _adapter_sizes(src: Path) -> list[tuple[int, int, int]]:
    """Return (hidden, inner, out) of each adapter layer, from the headers of the shards."""
    from safetensors import safe_open

    places = json.loads((src / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]

    def shape(name: str) -> list[int]:
        with safe_open(src / places[name], "pt") as shard:
            return list(shard.get_slice(name).get_shape())

    prefix = "audio_adapter.downsample_layers"
    count = sum(name.startswith(prefix) and name.endswith("linear1.weight") for name in places)
    layers = [(shape(f"{prefix}.{i}.linear1.weight"), shape(f"{prefix}.{i}.linear2.weight")) for i in range(count)]
    return [(one[1], one[0], two[0]) for one, two in layers]


def _transformers(task: Task, load: Callable[[Any, Any, Path, str, Moments], Any]) -> Moments:
    """Return the moments of a row over transformers' classes. load builds the model and notes init and weights."""
    moments, src = Moments(), Path(task.src)
    import torch
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    covo, config = _covo_class(src)
    moments.imports = time.monotonic()
    model = load(covo, config, src, task.device, moments).eval()
    speech = src / "token2wav" / "model.pt"
    lazily = task.row != "stock" and task.device == "cpu"
    token2wav = torch.load(speech, map_location=task.device, weights_only=True, mmap=lazily) if speech.exists() else {}
    shards = {*json.loads((src / "model.safetensors.index.json").read_text("utf-8"))["weight_map"].values()}
    moments.bytes = sum((src / name).stat().st_size for name in shards) + (speech.stat().st_size if token2wav else 0)
    moments.weights = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(src)
    extractor = WhisperFeatureExtractor(feature_size=config.encoder_config.num_mel_bins)
    moments.ready = time.monotonic()
    if task.first_token:
        system = (Path(__file__).parents[2] / "runtime" / "data" / "system_prompt.txt").read_text("utf-8")
        before = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<|begofcAUDIO|>"
        after = "<|endofcAUDIO|><|im_end|>\n<|im_start|>assistant\n"
        head, audio, tail = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (before, "<|cAUDIO|>" * PLACEHOLDERS, after)
        )
        ids = torch.tensor([head + audio + tail], device=task.device)
        mel = extractor(made_up(), sampling_rate=RATE, return_tensors="pt").input_features.to(task.device)
        with torch.inference_mode():
            moments.token = model.first_token(mel, ids, len(head))
        moments.first_token = time.monotonic()
    return moments


def _load_stock(covo: Any, config: Any, src: Path, device: str, moments: Moments) -> Any:
    import torch
    from safetensors.torch import load_file

    model = covo._from_config(config, dtype=torch.bfloat16).to(device)
    moments.init = time.monotonic()
    for shard in sorted(src.glob("model-*.safetensors")):
        model.load_state_dict(load_file(shard), strict=False)
    return model


def _load_pretrained(covo: Any, config: Any, src: Path, device: str, moments: Moments) -> Any:
    import torch

    moments.init = moments.imports  # its own, on meta, cannot be told from the weights
    return covo.from_pretrained(src, config=config, dtype=torch.bfloat16).to(device)


# --- ours


def _ours(task: Task, load: str) -> Moments:
    moments = Moments()
    from covo_npu.runtime import CovoAudio, Sampling, Session

    moments.imports = time.monotonic()
    model = CovoAudio.load(task.ckpt, device=task.device, load=load)
    moments.ready = time.monotonic()
    moments.loader_s = model.weights.report.seconds
    moments.bytes = model.weights.report.bytes
    moments.weights = moments.ready
    moments.init = moments.ready - moments.loader_s
    if task.first_token:
        greedy = Sampling(temperature=0.0, repetition_penalty=1.0, window_penalty=1.0)
        reply = Session(model, mode="a2t", sampling=greedy, max_new_tokens=1).say(made_up(), RATE)
        moments.token = reply.tokens[0]
        moments.first_token = time.monotonic()
    return moments


ROWS: dict[str, Callable[[Task], Moments]] = {
    "stock": lambda task: _transformers(task, _load_stock),
    "from_pretrained": lambda task: _transformers(task, _load_pretrained),
    "ours": lambda task: _ours(task, "mmap"),
    "ours_eager": lambda task: _ours(task, "eager"),
}


def main() -> None:
    """Run the task of the command line and print its moments."""
    task = Task(**json.loads(sys.argv[1]))
    moments = ROWS[task.row](task)
    sys.stdout.write(json.dumps({name: getattr(moments, name) for name in Moments.__slots__}) + "\n")


if __name__ == "__main__":
    main()
