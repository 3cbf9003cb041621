"""What may be chosen, and every default: once for a loaded model (LoadOptions), once for a question (Ask, Sampling)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from covo_npu.runtime.flow import Flow
    from covo_npu.runtime.voice import Voice

Mode = Literal["a2ta", "a2t"]

MODES: dict[str, str] = {"a2ta": "im_end", "a2t": "endoftext"}  # mode: the special token that ends a reply
SPEAKS = ("a2ta",)  # modes whose replies are spoken, too
DTYPES = ("bfloat16", "float16", "float32")
LOADS = ("mmap", "eager")
GRAPHS = ("auto", "on", "off")
PRODUCTS = ("covo", "pytorch")  # who may multiply on a CPU: our C kernels or PyTorch
SCALE_RANGE = (1e-3, 1e3)  # of what divides logits: in float32 they must stay finite and not all become 0
SCALES = f"{SCALE_RANGE[0]:g} to {SCALE_RANGE[1]:g}"
MAX_WINDOW = 4096  # ids that a sampler looks back at most
CODES_PER_S = 25  # audio codes of a second of speech


def _scales(value: float) -> bool:
    return SCALE_RANGE[0] <= value <= SCALE_RANGE[1]


def require(*checks: tuple[bool, str, str, object]) -> None:
    """Raise ValueError that names every setting out of its range. checks: (holds, setting, rule, what was found)."""
    faults: Iterable[str] = [
        f"{name} must be {rule}, found {value!r}" for holds, name, rule, value in checks if not holds
    ]
    if faults:
        raise ValueError("; ".join(faults))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off."""

    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 1.05  # over the ids of this round's prompt and of its reply so far
    window_penalty: float = 1.05  # on top, over the last `window` ids
    window: int = 8

    def __post_init__(self) -> None:
        require(
            (_scales(self.temperature) or self.temperature == 0, "temperature", f"0, or {SCALES}", self.temperature),
            (self.top_k >= 0, "top_k", "at least 0", self.top_k),
            (0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p),
            (_scales(self.repetition_penalty), "repetition_penalty", SCALES, self.repetition_penalty),
            (_scales(self.window_penalty), "window_penalty", SCALES, self.window_penalty),
            (0 <= self.window <= MAX_WINDOW, "window", f"0 to {MAX_WINDOW}", self.window),
        )


@dataclass(frozen=True, slots=True)
class SpeechBlocks:
    """How a reply is cut for speech while it is generated.

    sizes: new codes with which each block begins, the last one repeated; none: one block, the whole reply. look_ahead:
    the last codes of a block that are held back and solved again with the next. past_s: seconds of what was spoken that
    a block goes on from, prompt_s: the last seconds of the voice's prompt; None: all of it. Of the past never so much
    that a block has more than the 4096 frames that the network was made for.
    """

    sizes: tuple[int, ...] = (15, 15, 30, 60)
    look_ahead: int = 3
    past_s: float | None = 6.0
    prompt_s: float | None = None

    def __post_init__(self) -> None:
        first = self.sizes[0] if self.sizes else self.look_ahead + 1
        past_s, prompt_s = self.past_s, self.prompt_s
        require(
            (all(size >= 1 for size in self.sizes), "sizes", "at least 1 each", self.sizes),
            (0 <= self.look_ahead < first, "look_ahead", "at least 0 and below the first size", self.look_ahead),
            (past_s is None or 0 <= past_s < float("inf"), "past_s", "at least 0", past_s),
            (prompt_s is None or 0 <= prompt_s < float("inf"), "prompt_s", "at least 0", prompt_s),
        )

    def size(self, number: int) -> int | None:
        """Return with how many new codes block `number`, from 0, begins; None: it is the last one, however many."""
        return self.sizes[min(number, len(self.sizes) - 1)] if self.sizes else None


WHOLE = SpeechBlocks(sizes=(), look_ahead=0)  # the whole reply as one block


@dataclass(frozen=True, slots=True)
class Ask:
    """What one question may choose. voice and flow None: the checkpoint's; system None: the default system prompt.

    The system prompt opens a dialogue: its first question decides. blocks: speech is made while the reply is generated,
    cut like this; None: when it is complete, from the whole of it (but Session.stream() takes the default blocks then).
    """

    mode: Mode = "a2ta"
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 2048
    seed: int = 0  # of sampling and of the noise of speech; round n of a dialogue uses seed + n
    system: str | None = None
    voice: Voice | None = None
    flow: Flow | None = None
    blocks: SpeechBlocks | None = None

    def __post_init__(self) -> None:
        require(
            (self.mode in MODES, "mode", f"one of {', '.join(MODES)}", self.mode),
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens),
            (-(2**63) <= self.seed < 2**63 - 2**32, "seed", "a 64-bit integer", self.seed),
        )

    @property
    def speaks(self) -> bool:
        """Whether the reply is spoken, too."""
        return self.mode in SPEAKS


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a checkpoint becomes a model on a device.

    device: cpu, cuda:N, npu:N or auto; dtype: of LLM and encoder, None: the checkpoint's; backend: of the kernels,
    None: the device's fastest; load: on a CPU, mapped or read; check: compare every byte with its checksum;
    speech: load token2wav, too; max_context: tokens that a dialogue may hold; graph: whether work is captured;
    products: who multiplies on the backend cpu, None: who is faster here, which is measured; a name gives the same bits
    in every process; token2wav_dtype: of the matrix products of flow matching, auto: see model.speech_dtypes;
    vocoder_dtype: of the convolutions in the vocoder's residual blocks; nz: hold 16-bit weights of an NPU in its format
    FRACTAL_NZ; tp: tensor-parallel ranks of the LLM, a process each, on the devices from `device` on;
    encoder_device, speech_device: where these networks are, None: with the LLM's rank 0.
    """

    device: str = "auto"
    dtype: str | None = None
    backend: str | None = None
    load: str = "mmap"
    check: bool = True
    speech: bool = True
    max_context: int = 8192  # 0.47 GB of KV cache a slot at the real size in bfloat16
    graph: str = "auto"
    token2wav_dtype: str = "auto"
    vocoder_dtype: str = "float32"
    nz: bool = False
    products: str | None = None
    tp: int = 1
    encoder_device: str | None = None
    speech_device: str | None = None

    def __post_init__(self) -> None:
        require(
            (self.dtype in (None, *DTYPES), "dtype", f"one of {', '.join(DTYPES)}", self.dtype),
            (self.load in LOADS, "load", f"one of {', '.join(LOADS)}", self.load),
            (self.max_context >= 1, "max_context", "at least 1", self.max_context),
            (self.products in (None, *PRODUCTS), "products", f"one of {', '.join(PRODUCTS)}", self.products),
            (self.tp >= 1, "tp", "at least 1", self.tp),
            (self.graph in GRAPHS, "graph", f"one of {', '.join(GRAPHS)}", self.graph),
            (
                self.token2wav_dtype in ("auto", *DTYPES),
                "token2wav_dtype",
                f"auto or one of {', '.join(DTYPES)}",
                self.token2wav_dtype,
            ),
            (self.vocoder_dtype in DTYPES, "vocoder_dtype", f"one of {', '.join(DTYPES)}", self.vocoder_dtype),
        )
