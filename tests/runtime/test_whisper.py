"""The encoder against transformers' Whisper on random weights, at a small size and one layer at the real one."""

from __future__ import annotations

import pytest
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder as Upstream

from covo_npu.kernels import native, reference
from covo_npu.runtime.checkpoint.config import EncoderConfig
from covo_npu.runtime.networks.whisper import WhisperEncoder

SMALL = EncoderConfig(2, 64, 4, 128, 80, 50)
REAL_LAYER = EncoderConfig(1, 1280, 20, 5120, 128, 1500)


def upstream(config: EncoderConfig) -> Upstream:
    torch.manual_seed(4)
    model = Upstream(
        WhisperConfig(
            d_model=config.hidden_size, encoder_layers=config.num_layers, encoder_attention_heads=config.num_heads,
            encoder_ffn_dim=config.intermediate_size, num_mel_bins=config.num_mels,
            max_source_positions=config.max_positions, attn_implementation="sdpa",
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.3)
    return model.eval()


def ours(model: Upstream, config: EncoderConfig, kernels=native) -> WhisperEncoder:
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not any(f".{p}_proj." in name for p in "qkv"):
            tensors[name.replace("self_attn.out_proj", "o_proj")] = tensor
    for i in range(config.num_layers):
        attention = model.layers[i].self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        tensors[f"layers.{i}.qkv_proj.weight"] = torch.cat([part.weight for part in parts])
        biases = [torch.zeros(config.hidden_size) if part.bias is None else part.bias for part in parts]
        tensors[f"layers.{i}.qkv_proj.bias"] = torch.cat(biases)
    with torch.device("meta"):
        network = WhisperEncoder(config, kernels)
    network.load_state_dict({name: t.detach() for name, t in tensors.items()}, strict=True, assign=True)
    return network


@pytest.mark.parametrize(
    ("config", "kernels"),
    [(SMALL, native), (SMALL, reference), (REAL_LAYER, native)],
    ids=["small-native", "small-reference", "layer of the real size"],
)
@torch.inference_mode()
def test_encoder_equals_transformers(config: EncoderConfig, kernels) -> None:
    model = upstream(config)
    mel = torch.randn(1, config.num_mels, 2 * config.max_positions, generator=torch.Generator().manual_seed(6))
    expected = model(mel).last_hidden_state
    found = ours(model, config, kernels)(mel)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@torch.inference_mode()
def test_segments_of_a_batch_do_not_meet() -> None:
    network = ours(upstream(SMALL), SMALL)
    mel = torch.randn(3, SMALL.num_mels, 2 * SMALL.max_positions, generator=torch.Generator().manual_seed(6))
    alone = torch.cat([network(segment[None]) for segment in mel])
    assert (network(mel) - alone).norm() <= 1e-5 * alone.norm()
