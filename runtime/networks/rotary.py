"""Tables of rotary position embedding in the half-rotation form."""

import torch
from torch import Tensor


def rotary_table(
    length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [length, head_dim], both halves filled, computed in float32 on the host.

    Source: arXiv 2104.09864; the half form of transformers Qwen2RotaryEmbedding.
    """
    inverse_frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    angles = torch.arange(length, dtype=torch.float32, device="cpu")[:, None] * inverse_frequency
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
