"""The stock decode path on our own weights: transformers' WhisperEncoder, Qwen2 and generate, over the same memory.

A fused tensor holds its parts one after the other, so the parts are views: both paths read the same bytes, and one copy
of the weights serves both. The two penalties are logit processors, as upstream applies them.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from covo_npu.runtime import CovoAudio, Sampling, audio
from covo_npu.runtime.checkpoint.config import ModelConfig


class WindowPenalty(transformers.LogitsProcessor):
    """The repetition penalty over the last ids only."""

    def __init__(self, penalty: float, window: int) -> None:
        self._penalty, self._window = transformers.RepetitionPenaltyLogitsProcessor(penalty), window

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._penalty(input_ids[:, -self._window :], scores)


class Clock(transformers.generation.streamers.BaseStreamer):
    """The moments at which ids arrived on the host, and the ids of the first sequence. The prompt is not counted."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.tokens: list[int] = []
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.moments.append(time.perf_counter())
        self.tokens.append(int(value.flatten()[0]))

    def end(self) -> None:
        """Nothing is left to do."""


class Stock:
    """The stock networks of a loaded model."""

    def __init__(self, model: CovoAudio) -> None:
        self.model = model
        self.llm, self.encoder = _llm(model), _encoder(model)

    @torch.inference_mode()
    def answer(self, samples: Tensor, rate: int, input_ids: list[int], num_tokens: int) -> Clock:
        """Return the clock of a reply of num_tokens ids, from samples to text, nothing computed before."""
        model, ids = self.model, torch.tensor([input_ids], device=self.model.device)
        waveform = audio.prepare(audio.to_mono(samples), rate)
        spots = ids[0] == model.manifest.special_tokens["cAUDIO"]
        mels = audio.features(waveform, model.config.encoder.num_mels)
        states = [self.encoder(mel[None].to(model.device, model.dtype)).last_hidden_state for mel in mels]
        features = torch.cat([model.networks.encoder.adapter(state)[0] for state in states])
        embeddings = self.llm.get_input_embeddings()(ids)
        embeddings[0, spots] = features[: int(spots.sum())]
        return self._generate(num_tokens, inputs=ids, inputs_embeds=embeddings)

    @torch.inference_mode()
    def continuation(self, input_ids: Tensor, rows: tuple[Tensor, ...], num_tokens: int) -> Clock:
        """Return the clock of num_tokens ids after K rows in the cache.

        input_ids: [B, K + 1]; rows: keys, then values of all layers, [B, G, K, D].
        """
        cache, half = transformers.DynamicCache(config=self.llm.config), len(rows) // 2
        for layer, (keys, values) in enumerate(zip(rows[:half], rows[half:])):
            cache.update(keys, values, layer)
        return self._generate(num_tokens, inputs=input_ids, past_key_values=cache)

    def _generate(self, num_tokens: int, **prompt: Any) -> Clock:
        clock, sampling = Clock(), Sampling()
        processors = transformers.LogitsProcessorList(
            [
                transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
                WindowPenalty(sampling.window_penalty, sampling.window),
            ]
        )
        self.llm.generate(
            **prompt,
            attention_mask=torch.ones_like(prompt["inputs"]),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=processors,
            streamer=clock,
        )
        return clock


def _llm(model: CovoAudio) -> Any:
    sizes, device = model.config.llm, model.device
    config_class: Any = transformers.Qwen2Config
    config = config_class(
        vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers, num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads, head_dim=sizes.head_dim, rms_norm_eps=sizes.rms_norm_eps,
        max_position_embeddings=sizes.max_position_embeddings, tie_word_embeddings=False, dtype=model.dtype,
        rope_theta=sizes.rope_theta,
    )  # fmt: skip
    source, tensors = model.networks.llm.state_dict(), {"lm_head.weight": model.networks.llm.lm_head.weight}
    for name in ("embed_tokens.weight", "norm.weight"):
        tensors[f"model.{name}"] = source[name]
    heads = [size * sizes.head_dim for size in (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)]
    for i in range(sizes.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            for part, rows in zip("qkv", source[f"{ours}qkv_proj.{kind}"].split(heads)):
                tensors[f"{theirs}self_attn.{part}_proj.{kind}"] = rows
        for part, rows in zip(("gate", "up"), source[f"{ours}gate_up_proj.weight"].chunk(2)):
            tensors[f"{theirs}mlp.{part}_proj.weight"] = rows
        tensors[f"{theirs}self_attn.o_proj.weight"] = source[f"{ours}o_proj.weight"]
        tensors[f"{theirs}mlp.down_proj.weight"] = source[f"{ours}down_proj.weight"]
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            tensors[theirs + name] = source[ours + name]
    with torch.device("meta"):
        network = transformers.Qwen2ForCausalLM(config)
    network.load_state_dict(tensors, strict=True, assign=True)
    network.model.rotary_emb = Qwen2RotaryEmbedding(config).to(device)
    return network.eval()


def _encoder(model: CovoAudio) -> Any:
    sizes = model.config.encoder
    config = transformers.WhisperConfig(
        d_model=sizes.hidden_size, encoder_layers=sizes.num_layers, encoder_attention_heads=sizes.num_heads,
        encoder_ffn_dim=sizes.intermediate_size, num_mel_bins=sizes.num_mels,
        max_source_positions=sizes.max_positions, dtype=model.dtype,
    )  # fmt: skip
    tensors = {}
    for name, tensor in model.networks.encoder.encoder.state_dict().items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", tensor.chunk(3)):
                if part != "k" or "weight" in name:  # k has no bias: ours is zeros
                    tensors[name.replace("qkv_proj", f"self_attn.{part}_proj")] = rows
        else:
            # our convolutions may be wider
            tensors[name.replace("o_proj", "self_attn.out_proj")] = tensor.to(model.dtype)
    with torch.device("meta"):
        network = WhisperEncoder(config)
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval()


def prefill_operations(config: ModelConfig, num_tokens: int, num_segments: int = 1, known: int = 0) -> int:
    """Return the floating-point operations from mel to the first logits: matrix products, two a multiply-add.

    known: of the tokens, how many are in the cache before.
    """
    encoder, adapter, llm = config.encoder, config.adapter, config.llm
    C, S = encoder.hidden_size, encoder.max_positions
    layer = S * (4 * C * C + 2 * C * encoder.intermediate_size) + 2 * S * S * C
    products = 2 * S * 3 * encoder.num_mels * C + S * 3 * C * C + encoder.num_layers * layer
    for i in range(adapter.num_layers):
        S, C = -(-S // 2), adapter.input_size
        out = adapter.output_size if i == adapter.num_layers - 1 else C
        products += S * (3 * C * C + adapter.intermediate_size * (C + out))
    products *= num_segments
    width = llm.num_heads * llm.head_dim
    rows = (llm.num_heads + 2 * llm.num_kv_heads) * llm.head_dim + width + 3 * llm.intermediate_size
    new = num_tokens - known
    attention = (num_tokens**2 - known**2) * width  # half of scores and of values: a token sees what came before it
    products += llm.num_layers * (new * llm.hidden_size * rows + attention) + llm.hidden_size * llm.vocab_size
    return 2 * products
