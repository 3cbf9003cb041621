"""Options that command lines share, each declared once. Every default is that of a record of runtime/options.py.

`loading`, `asking`, `speaking` and `cutting` are groups: the command gets one record in place of the values of its
options. A value out of its range is told by the record; here it becomes a usage error that names the option.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from covo_npu.kernels import kept_for_good
from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import output
from covo_npu.runtime.cli import console
from covo_npu.runtime.options import DTYPES, GRAPHS, LOADS, MODES, PRODUCTS, Ask, LoadOptions, Sampling, SpeechBlocks

if TYPE_CHECKING:
    from covo_npu.runtime.flow import Flow
    from covo_npu.runtime.model import CovoAudio

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

LOAD, ASK, BLOCKS = LoadOptions(), Ask(), SpeechBlocks()
ALL = "all"
THREADS = f"{__name__}.threads"  # under which the context of a command keeps it
STDOUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")  # other names of "-"
MAX_THREADS = max(256, os.cpu_count() or 1)  # many more than there are end the process
MAX_FLOW_STEPS = 1000
SOLVERS = ("midpoint", "euler")  # of flow.SOLVERS, which imports torch; the first is the usual one


# --- what every command line has


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command with --json, --verbose and --version. It gets `json_file`: where console.show writes, or None.

    console.run reads --verbose from the arguments.
    """
    version = click.version_option(package_name="covo-npu", message="%(prog)s %(version)s")
    return JSON(VERBOSE(version(command)))


def ckpt(required: bool = True) -> Decorator:
    """Return the option --ckpt; the command gets `ckpt`: a path, or None."""
    return click.option("--ckpt", required=required, type=PATH, help="Folder of a converted checkpoint.")


def _json_target(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Return the target, after a look whether it can be written: that is told before any work is done."""
    if value in STDOUT:
        value = "-"
    if value == "-" and sys.stdout is None:
        raise CovoError("--json -: stdout is closed")
    if value is not None and value != "-":
        output.require_writable(value, console.is_report)
    return value


def _set_threads(context: click.Context, option: click.Parameter, value: int | None) -> None:
    context.meta[THREADS] = value
    if value is not None:
        with kept_for_good():
            import torch  # here, so that --help need not wait for it

        torch.set_num_threads(value)


def chosen_threads() -> int | None:
    """Return what --threads says in the command that runs, None if it says nothing."""
    threads: int | None = click.get_current_context().meta.get(THREADS)
    return threads


def _system_text(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Return the text of --system TEXT or --system @FILE, without a byte order mark."""
    if value is None or not value.startswith("@"):
        if value is not None and console.SURROGATE.search(value):
            raise click.UsageError("--system: is not text in the encoding of this system")
        return value
    try:
        return Path(value[1:]).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise CovoError(f"{value[1:]}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}") from None


def _sizes(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    """Return the numbers of "15,15,30"."""
    try:
        return tuple(int(size) for size in value.split(","))
    except ValueError:
        raise click.BadParameter(f"expected numbers of codes like 15,15,30, found {value!r}") from None


def _seconds(context: click.Context, option: click.Parameter, value: str) -> float | None:
    """Return the seconds; None for "all"."""
    try:
        return None if value == ALL else float(value)
    except ValueError:
        raise click.BadParameter(f"expected seconds or {ALL}, found {value!r}") from None


PATH = click.Path(path_type=Path)  # one that is missing is told by who reads it: exit code 1
JSON: Decorator = click.option(
    "--json", "json_file", metavar="FILE|-", callback=_json_target, help="Write all results as one JSON object."
)
VERBOSE: Decorator = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, help="Log the stages with times; show tracebacks."
)

# --- groups: name of the value -> option

LOADING: dict[str, Decorator] = {
    "device": click.option("--device", default=LOAD.device, show_default=True, help="auto, cpu, cuda:N or npu:N."),
    "dtype": click.option(
        "--dtype", type=click.Choice(DTYPES), default=LOAD.dtype, help="Of LLM and encoder. Default: the checkpoint's."
    ),
    "backend": click.option(
        "--backend", default=LOAD.backend, help="cpu, cuda, npu, native, reference. Default: the fastest of the device."
    ),
    "products": click.option(
        "--products", type=click.Choice(PRODUCTS), default=LOAD.products,
        help="On the CPU: who multiplies, for the same bits in every process. Default: measured, see -v.",
    ),
    "load": click.option(
        "--load", type=click.Choice(LOADS), default=LOAD.load, show_default=True,
        help="On the CPU: map the weights, or read them into memory first.",
    ),
    "check": click.option(
        "--check/--no-check", default=LOAD.check, show_default=True, help="Compare weights with their checksums."
    ),
    "max_context": click.option(
        "--max-context", type=int, default=LOAD.max_context, show_default=True, help="Tokens that a dialogue may hold."
    ),
    "graph": click.option(
        "--graph", type=click.Choice(GRAPHS), default=LOAD.graph, show_default=True,
        help="Replay encoder, decode steps and evaluations of speech as captured graphs. auto: where the device can.",
    ),
    "token2wav_dtype": click.option(
        "--token2wav-dtype", type=click.Choice(("auto", *DTYPES)), default=LOAD.token2wav_dtype, show_default=True,
        help="Of the matrix products of flow matching. auto: --dtype if given, else bfloat16 where that is faster.",
    ),
    "vocoder_dtype": click.option(
        "--vocoder-dtype", type=click.Choice(DTYPES), default=LOAD.vocoder_dtype, show_default=True,
        help="Of the convolutions in the vocoder's residual blocks. 16 bits: faster, less exact: covo-check speech.",
    ),
    "nz": click.option(
        "--nz", is_flag=True, default=LOAD.nz,
        help="On an NPU: hold 16-bit weights in its format FRACTAL_NZ. Nobody has measured it yet.",
    ),
    "tp": click.option(
        "--tp", type=int, default=LOAD.tp, show_default=True,
        help="Tensor-parallel ranks: a process each, on the devices from --device on. As converted: covo-convert --tp.",
    ),
    "encoder_device": click.option(
        "--encoder-device", default=LOAD.encoder_device, help="For the audio encoder. Default: that of --device."
    ),
    "speech_device": click.option(
        "--speech-device", default=LOAD.speech_device, help="For the networks of speech. Default: that of --device."
    ),
    "threads": click.option(
        "--threads", type=click.IntRange(1, MAX_THREADS), expose_value=False, callback=_set_threads,
        help="CPU threads. Default: all cores.",
    ),
}  # fmt: skip

ASKING: dict[str, Decorator] = {
    "mode": click.option(
        "--mode", type=click.Choice(list(MODES)), default=ASK.mode, show_default=True,
        help="Answer in text and speech, or in text only.",
    ),
    "max_new_tokens": click.option(
        "--max-new-tokens", type=int, default=ASK.max_new_tokens, show_default=True, help="Of one reply."
    ),
    "temperature": click.option(
        "--temperature", type=float, default=ASK.sampling.temperature, show_default=True,
        help="0 takes the likeliest token.",
    ),
    "top_p": click.option(
        "--top-p", type=float, default=ASK.sampling.top_p, show_default=True, help="1 switches it off."
    ),
    "top_k": click.option(
        "--top-k", type=int, default=ASK.sampling.top_k, show_default=True, help="0 switches it off."
    ),
    "repetition_penalty": click.option(
        "--repetition-penalty", type=float, default=ASK.sampling.repetition_penalty, show_default=True,
        help="For the tokens of the prompt and of the reply so far.",
    ),
    "window_penalty": click.option(
        "--window-penalty", type=float, default=ASK.sampling.window_penalty, show_default=True,
        help="On top, for the last tokens.",
    ),
    "window": click.option(
        "--window", type=int, default=ASK.sampling.window, show_default=True, help="How many last tokens."
    ),
    "seed": click.option(
        "--seed", type=int, default=ASK.seed, show_default=True, help="Of sampling and of the speech's noise."
    ),
    "system": click.option("--system", metavar="TEXT|@FILE", callback=_system_text, help="Another system prompt."),
}  # fmt: skip

SPEAKING: dict[str, Decorator] = {
    "voice": click.option(
        "--voice", type=PATH,
        help="Folder with prompt_token, prompt_latent and speaker_embed (.npy). Default: the checkpoint's voice.",
    ),
    "flow_steps": click.option(
        "--flow-steps", type=click.IntRange(1, MAX_FLOW_STEPS),
        help="Steps of the ODE of speech; midpoint runs the network twice a step. Default: the checkpoint's.",
    ),
    "flow_solver": click.option(
        "--flow-solver", type=click.Choice(SOLVERS),
        help=f"euler runs the network once a step: half the time, a little another sound. Default: {SOLVERS[0]}.",
    ),
    "fixed_context": click.option(
        "--fixed-context", is_flag=True,
        help="Solve the voice's prompt, and what was spoken, once and apart from new speech: much less work, an "
        "approximation that nobody has heard with the published weights.",
    ),
}  # fmt: skip

CUTTING: dict[str, Decorator] = {
    "sizes": click.option(
        "--sizes", metavar="N,N,...", callback=_sizes, default=",".join(map(str, BLOCKS.sizes)), show_default=True,
        help="Streamed speech: audio codes, 25 a second, with which each block begins; the last number repeats.",
    ),
    "look_ahead": click.option(
        "--look-ahead", type=int, default=BLOCKS.look_ahead, show_default=True,
        help="Streamed speech: last codes of a block that are spoken with the next one.",
    ),
    "past_s": click.option(
        "--past-s", metavar=f"SECONDS|{ALL}", callback=_seconds,
        default=ALL if BLOCKS.past_s is None else f"{BLOCKS.past_s:g}", show_default=True,
        help="Streamed speech: how much of what was spoken a block goes on from.",
    ),
    "prompt_s": click.option(
        "--prompt-s", metavar=f"SECONDS|{ALL}", callback=_seconds,
        default=ALL if BLOCKS.prompt_s is None else f"{BLOCKS.prompt_s:g}", show_default=True,
        help="Streamed speech: how much of the voice's prompt a block goes on from; its last seconds.",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SpeechOptions:
    """What is said of speech on a command line, and only a loaded checkpoint can complete. None: the checkpoint's."""

    voice: Path | None = None
    flow_steps: int | None = None
    flow_solver: str | None = None
    fixed_context: bool = False

    def completed(self, ask: Ask, model: CovoAudio) -> Ask:
        """Return what is asked, with the voice read and the ODE's way filled up from the checkpoint's.

        Raises ConfigError if the voice cannot be used.
        """
        from covo_npu.runtime.voice import read_voice

        speech = model.networks.token2wav
        assert speech is not None, "the model speaks"
        voice = read_voice(self.voice, speech.config.dit) if self.voice else None
        return replace(ask, voice=voice, flow=self.flow(speech.flow))

    def flow(self, usual: Flow) -> Flow:
        """Return how the ODE is solved. usual: the checkpoint's way."""
        steps, solver = self.flow_steps or usual.steps, self.flow_solver or usual.solver
        return replace(usual, steps=steps, solver=solver, fixed_context=self.fixed_context or usual.fixed_context)


def loading(*names: str) -> Decorator:
    """Return the options of LOADING of these names, all of them without names; the command gets `options: LoadOptions`.

    --threads is done when the arguments are read.
    """
    return _group("options", LoadOptions, LOADING, names)


def asking(*names: str) -> Decorator:
    """Return the options of ASKING of these names, all of them without names; the command gets `ask: Ask`."""
    return _group("ask", _ask, ASKING, names)


def speaking(*names: str) -> Decorator:
    """Return the options of SPEAKING of these names, all of them without names.

    The command gets `speech: SpeechOptions`.
    """
    return _group("speech", SpeechOptions, SPEAKING, names)


def cutting(*names: str) -> Decorator:
    """Return the options of CUTTING of these names, all of them without names.

    The command gets `blocks: SpeechBlocks`.
    """
    return _group("blocks", SpeechBlocks, CUTTING, names)


def _ask(**values: Any) -> Ask:
    sampling = {field.name: values.pop(field.name) for field in fields(Sampling) if field.name in values}
    return Ask(sampling=Sampling(**sampling), **values)


def _group(
    parameter: str, build: Callable[..., object], table: Mapping[str, Decorator], names: tuple[str, ...]
) -> Decorator:
    """Return a decorator that adds options to a command, which gets as `parameter` what `build` makes of them."""
    chosen = {name: table[name] for name in names or table}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_record(**values: Any) -> Any:
            own = {name: values.pop(name) for name in chosen if name in values}
            return command(**values, **{parameter: _built(build, own)})

        decorated: Callable[..., Any] = with_record
        for option in reversed(chosen.values()):
            decorated = option(decorated)
        return decorated

    return decorate


def _built(build: Callable[..., object], values: dict[str, Any]) -> object:
    try:
        return build(**values)
    except ValueError as error:
        as_options = re.sub(r"\w+(?= must be)", lambda name: "--" + name[0].replace("_", "-"), str(error))
        raise click.UsageError(as_options) from None
