"""Adapter: encoder states at 50 Hz to the LLM's hidden size at 6.25 Hz."""

from torch import Tensor, nn
from torch.nn.functional import relu

from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.checkpoint.config import AdapterConfig
from covo_npu.runtime.networks.layers import Conv1d, Linear, Stack


class AdapterLayer(nn.Module):
    """Halve the rate, then two linear maps."""

    def __init__(self, config: AdapterConfig, output_size: int, kernels: Kernels) -> None:
        super().__init__()
        self.conv = Conv1d(kernels, config.input_size, config.input_size, 3, stride=2, padding=1)
        self.linear1 = Linear(kernels, config.input_size, config.intermediate_size)
        self.linear2 = Linear(kernels, config.intermediate_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, ceil(S / 2), C_out]. x: [B, S, C]."""
        x = relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.linear2(relu(self.linear1(x)))


class Adapter(nn.Module):
    """Layers of stride 2; only the last one changes the width."""

    def __init__(self, config: AdapterConfig, kernels: Kernels) -> None:
        super().__init__()
        sizes = [config.input_size] * (config.num_layers - 1) + [config.output_size]
        self.layers = Stack(AdapterLayer(config, size, kernels) for size in sizes)

    def forward(self, encoder_states: Tensor) -> Tensor:
        """Return audio features [B, S / 2^layers rounded up each time, C_llm]. encoder_states: [B, S, C]."""
        for layer in self.layers:
            encoder_states = layer(encoder_states)
        return encoder_states
