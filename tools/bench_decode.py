"""covo-bench decode: prefill and decoding against transformers' generate, on the same weights in one process.

A step cannot be faster than reading every weight and the valid rows of the KV cache once; how fast this machine reads
is measured in the same run, before and after, and the best counts. Long contexts are not prefilled: their rows are
random numbers, the same for both paths. The paths take turns, after every weight has been read once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from covo_npu.tools import measure
from covo_npu.tools.measure import Spread

if TYPE_CHECKING:
    from torch import Tensor

    from covo_npu.runtime import CovoAudio
    from covo_npu.tools.stock_decode import Stock

OURS, STOCK = "ours", "generate"
SEED = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A spoken question answered by one path."""

    path: str
    prompt_tokens: int
    ttft_s: float  # from samples to the first id: front end, encoder, adapter, prefill
    operations_per_s: float  # those of the first dialogue's encoder and prefill, by ttft_s
    step_s: float  # median
    tokens: tuple[int, ...]
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Steps:
    """Decoding with a context and a batch by one path."""

    path: str
    context: int
    batch: int
    step_s: Spread
    tokens_per_s: float  # at the median, of all sequences together
    read_per_s: float  # bytes that a step must read, by its median
    tokens: tuple[int, ...]  # of the first sequence
    peak_bytes: int


# --- floors


def read_rate(model: CovoAudio, now: Callable[[], float], num_layers: int = 8) -> float:
    """Return the bytes that the device reads a second: the extreme of weights on the CPU, a copy of them elsewhere."""
    import torch

    weights = [layer.gate_up_proj.weight for layer in list(model.networks.llm.layers)[:num_layers]]
    size = sum(weight.nbytes for weight in weights)
    if model.device.type == "cpu":
        numbers = [weight.view(torch.int32) for weight in weights]
        return rate(lambda: [x.amax() for x in numbers], size, model, now)
    targets = [torch.empty_like(weight) for weight in weights]
    return rate(lambda: [target.copy_(weight) for target, weight in zip(targets, weights)], 2 * size, model, now)


def matrix_rate(model: CovoAudio, now: Callable[[], float], size: int = 2048) -> float:
    """Return the floating-point operations a second of a square matrix product in the model's dtype."""
    import torch

    left, right = (torch.randn(size, size, device=model.device).to(model.dtype) for _ in range(2))
    return rate(lambda: left @ right, 2 * size**3, model, now)


def rate(work: Callable[[], object], amount: int, model: CovoAudio, now: Callable[[], float]) -> float:
    """Return the best of five rates."""

    def once() -> float:
        measure.synchronize(str(model.device))
        started = now()
        work()
        measure.synchronize(str(model.device))
        return amount / (now() - started)

    return measure.best(once, 5)


def step_bytes(model: CovoAudio, context: int, batch: int) -> int:
    """Return the bytes that a step must read: every weight but the embeddings, and the valid rows of each slot."""
    llm, config = model.networks.llm, model.config.llm
    weights = sum(p.nbytes for name, p in llm.named_parameters() if not name.startswith("embed_tokens"))
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * llm.lm_head.weight.element_size()
    return weights + batch * context * row


class Peak:
    """Peak memory of a block in bytes: anonymous memory of the process, or allocated memory of the accelerator."""

    def __init__(self, device: str) -> None:
        import torch

        self.bytes = 0
        self._module = None if device == "cpu" else getattr(torch, torch.device(device).type)
        self._process = measure.PeakMemory()

    def __enter__(self) -> Peak:
        if self._module:
            self._module.reset_peak_memory_stats()
        self._process.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._process.__exit__(*exception)
        self.bytes = self._module.max_memory_allocated() if self._module else self._process.anonymous


# --- what is measured


def answers(model: CovoAudio, stock: Stock, num_tokens: int) -> list[Answer]:
    """Return how both paths answered a question of 8 s; ours twice, the second time with the system prompt shared."""
    import torch

    from covo_npu.runtime import Sampling
    from covo_npu.tools.question import RATE, made_up
    from covo_npu.tools.stock_decode import prefill_operations

    samples, found = made_up(), []

    def add(path: str, prompt: int, ttft_s: float, step_s: float, tokens: Sequence[int], peak: Peak) -> None:
        rate = prefill_operations(model.config, prompt) / ttft_s
        found.append(Answer(path, prompt, ttft_s, rate, step_s, tuple(tokens), peak.bytes))

    def ours(path: str) -> list[int]:
        with Peak(str(model.device)) as peak:
            chat = model.session("a2t", Sampling(), num_tokens)
            started = stock.now()
            question = chat.listen(samples, RATE)
            moments = [stock.now() for token in chat.tokens(question)]
        step_s = measure.spread(between(moments)).median
        add(path, len(question.input_ids), moments[0] - started, step_s, question.tokens, peak)
        return question.input_ids

    input_ids = ours(OURS)
    with Peak(str(model.device)) as peak:
        started = stock.now()
        clock = stock.answer(torch.from_numpy(samples), RATE, input_ids, num_tokens)
    ttft_s, step_s = clock.moments[0] - started, measure.spread(between(clock.moments)).median
    add(STOCK, len(input_ids), ttft_s, step_s, clock.tokens, peak)
    ours(f"{OURS}, second dialogue")
    return found


def steps(model: CovoAudio, stock: Stock, context: int, batch: int, num_tokens: int, runs: int) -> list[Steps]:
    """Return how both paths decode num_tokens ids after `context` random rows in each of `batch` slots, in turns."""
    import torch

    from covo_npu.runtime import Sampling

    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(model.config.audio_token_index, (batch, context + 1), generator=generator).to(model.device)
    decoder = model.decoder(Sampling(), batch)
    rows = tuple(rows[:, :, :context] for rows in (*decoder.cache.keys, *decoder.cache.values))
    gaps: dict[str, list[float]] = {OURS: [], STOCK: []}
    tokens: dict[str, list[int]] = {}
    peaks = {OURS: 0, STOCK: 0}

    def ours() -> list[float]:
        for slot in range(batch):
            decoder.sampler.begin(slot, ids[slot], SEED)
            decoder.place(slot, context, ids[slot, -1:])
        tokens[OURS], moments = [], []
        for _ in range(num_tokens):
            tokens[OURS].append(decoder.step(batch).tokens()[0])
            moments.append(stock.now())
        return moments

    def generate() -> list[float]:
        clock = stock.continuation(ids, rows, num_tokens)
        tokens[STOCK] = clock.tokens
        return clock.moments

    with torch.inference_mode():
        for row in rows:
            row.normal_()
        for _ in range(runs):
            for path, work in ((OURS, ours), (STOCK, generate)):
                with Peak(str(model.device)) as peak:
                    gaps[path] += between(work())
                peaks[path] = max(peaks[path], peak.bytes)
    read = step_bytes(model, context, batch)
    return [
        Steps(path, context, batch, found, batch / found.median, read / found.median, tuple(tokens[path]), peaks[path])
        for path, found in ((path, measure.spread(gaps[path])) for path in (OURS, STOCK))
    ]


def between(moments: Sequence[float]) -> list[float]:
    """Return the times between ids but the first, which is a warm-up."""
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    return gaps[1:] or gaps or [float("nan")]


# --- what is shown


def question_table(found: Sequence[Answer], matrix_rate: float) -> str:
    """Return the table of the question."""
    lines = [
        [
            row.path,
            str(row.prompt_tokens),
            f"{row.ttft_s:.2f}",
            f"{row.operations_per_s / matrix_rate:.0%}" if "second" not in row.path else "-",
            f"{1 / row.step_s:.2f}",
            f"{row.peak_bytes / 1e9:.2f}",
        ]
        for row in found
    ]
    columns = ("a question of 8 s", "prompt", "first token s", "of the matrix rate", "tokens/s", "peak GB")
    return measure.table(columns, lines)


def steps_table(found: Sequence[Steps], rate: float) -> str:
    """Return the table of contexts and batches."""
    lines = [
        [
            str(row.context),
            str(row.batch),
            row.path,
            f"{row.step_s.median * 1e3:.1f} ({row.step_s.low * 1e3:.1f} .. {row.step_s.high * 1e3:.1f})",
            f"{row.tokens_per_s:.2f}",
            f"{row.read_per_s / rate:.0%}",
            f"{row.peak_bytes / 1e9:.2f}",
        ]
        for row in found
    ]
    columns = ("context", "batch", "path", "step ms", "tokens/s", "of the read rate", "peak GB")
    return measure.table(columns, lines)


def verdicts(question: Sequence[Answer], found: Sequence[Steps], rates: dict[str, float]) -> list[str]:
    """Return sentences that compare the paths with each other and with what the machine can do."""
    said = []
    first = {row.path: row for row in question}
    if first:
        ours, stock, second = first[OURS], first[STOCK], first[f"{OURS}, second dialogue"]
        same = common_prefix(ours.tokens, stock.tokens)
        said += [
            f"first token in {ours.ttft_s / stock.ttft_s:.2f} of generate's time, "
            f"{second.ttft_s / stock.ttft_s:.2f} with the system prompt shared",
            f"tokens/s {stock.step_s / ours.step_s:.2f} of generate's; "
            f"the first {same} of {min(len(ours.tokens), len(stock.tokens))} tokens are the same",
        ]
    pairs = list(zip(found[::2], found[1::2]))
    for ours_steps, stock_steps in pairs:
        said.append(
            f"context {ours_steps.context}, batch {ours_steps.batch}: "
            f"{ours_steps.tokens_per_s / stock_steps.tokens_per_s:.2f} times generate's tokens/s, the first "
            f"{common_prefix(ours_steps.tokens, stock_steps.tokens)} of {len(ours_steps.tokens)} tokens the same"
        )
    said.append(
        f"floors: matrix product {rates['matrix'] / 1e9:.0f} GFLOP/s, reading {rates['read'] / 1e9:.1f} GB/s "
        f"(before {rates['read before'] / 1e9:.1f}, after {rates['read after'] / 1e9:.1f})"
    )
    return said


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many elements are equal before the first difference."""
    return next((i for i, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), min(len(first), len(second)))


def plot(found: Sequence[Steps], rate: float, title: str, path: Path) -> None:
    """Write a chart: tokens/s by context at the smallest batch, and by batch at the smallest context."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    smallest = {"context": min(row.context for row in found), "batch": min(row.batch for row in found)}
    for axes, (along, other) in zip(panels, (("context", "batch"), ("batch", "context"))):
        chosen = [row for row in found if getattr(row, other) == smallest[other]]
        for label, colour in ((OURS, "#08519c"), (STOCK, "#9ecae1")):
            rows = sorted((row for row in chosen if row.path == label), key=lambda row: getattr(row, along))
            axes.plot(
                [getattr(r, along) for r in rows], [r.tokens_per_s for r in rows], "o-", color=colour, label=label
            )
            if label == OURS:
                roof = [r.tokens_per_s * rate / r.read_per_s for r in rows]
                axes.plot([getattr(r, along) for r in rows], roof, "--", color="grey", label="at the read rate")
        axes.set_xlabel(f"{along} ({other} {smallest[other]})")
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.suptitle(title, size=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


@click.command()
@click.option("--ckpt", type=click.Path(exists=True, file_okay=False), required=True, help="Converted checkpoint.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda:N or npu:N.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Default: the checkpoint's.")
@click.option("--graph", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option("--tokens", default=32, show_default=True, type=click.IntRange(3), help="Of the reply to the question.")
@click.option("--steps", "num_steps", default=8, show_default=True, type=click.IntRange(3), help="Of each other row.")
@click.option("--runs", default=2, show_default=True, type=click.IntRange(1), help="Turns of both paths in each row.")
@click.option(
    "--context", "contexts", multiple=True, type=click.IntRange(1), default=(512, 2048, 8000), show_default=True
)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 2, 4), show_default=True)
@click.option(
    "--layers", type=click.IntRange(1), help="Use only the first layers of the LLM: a machine in little time."
)
@click.option(
    "--processor-time",
    is_flag=True,
    help="One thread, and its processor time for every time: for a machine that is busy.",
)
@click.option("--question/--no-question", default=True, show_default=True, help="Answer a question of 8 s too.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write every figure and the machine here.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False), help="Write a PNG chart here.")
def decode(
    ckpt: str,
    device: str,
    dtype: str | None,
    graph: str,
    tokens: int,
    num_steps: int,
    runs: int,
    contexts: tuple[int, ...],
    batches: tuple[int, ...],
    layers: int | None,
    processor_time: bool,
    question: bool,
    json_path: str | None,
    plot_path: str | None,
) -> None:
    """Prefill and decoding against transformers' generate, on the same weights in one process.

    Every --context is measured at the first --batch, every other --batch at the first --context.
    """
    import torch

    from covo_npu.runtime import CovoAudio
    from covo_npu.tools.stock_decode import Stock

    say: Callable[[str], None] = lambda text: click.echo(text, err=True)  # noqa: E731
    longest = max(contexts) + num_steps + 1
    model = CovoAudio.load(ckpt, device, dtype, speech=False, check=False, graph=graph, max_context=max(longest, 2048))
    if layers:
        _keep(model, layers)
    say(f"{model.report.backend}, {model.report.dtype}, {model.report.bytes / 1e9:.2f} GB")
    _touch(model)
    now = time.perf_counter
    if processor_time:
        now = time.process_time
        torch.set_num_threads(1)
    stock = Stock(model, now)
    rates = {"read before": read_rate(model, now), "matrix": matrix_rate(model, now)}
    answered = answers(model, stock, tokens) if question else []
    for row in answered:
        say(f"{row.path}: first token after {row.ttft_s:.2f} s, then {row.step_s * 1e3:.1f} ms")
    found: list[Steps] = []
    for context, batch in [(c, batches[0]) for c in contexts] + [(contexts[0], b) for b in batches[1:]]:
        say(f"context {context}, batch {batch}")
        found += steps(model, stock, context, batch, num_steps, runs)
        say("; ".join(f"{row.path} {row.step_s.median * 1e3:.1f} ms" for row in found[-2:]))
    rates["read after"] = read_rate(model, now)
    rates["matrix"] = max(rates["matrix"], matrix_rate(model, now))
    rates["read"] = max(rates["read before"], rates["read after"])
    machine = measure.machine_report(str(model.device))
    said = verdicts(answered, found, rates)
    if model.capture:
        report = model.capture.report
        said.append(f"{report.graphs} graphs captured in {report.seconds:.2f} s, {report.bytes / 1e6:.0f} MB")
    if answered:
        click.echo(question_table(answered, rates["matrix"]) + "\n")
    click.echo(steps_table(found, rates["read"]))
    if processor_time:
        said.append("all times are processor times of one thread")
    click.echo("\n".join(["", *said, measure.machine_line(machine)]))
    if json_path:
        measure.write_json(
            json_path,
            {
                "bench": "decode",
                "machine": machine,
                "time": "processor time, one thread" if processor_time else "wall time",
                "dtype": model.report.dtype,
                "layers": model.config.llm.num_layers,
                "backend": model.report.backend,
                "floors_per_s": rates,
                "question": [asdict(row) for row in answered],
                "steps": [asdict(row) for row in found],
                "said": said,
            },
        )
    if plot_path:
        plot(found, rates["read"], f"Decoding, {model.report.dtype}, {machine['device']}", Path(plot_path))


def _keep(model: CovoAudio, num_layers: int) -> None:
    """Cut the LLM down to its first layers."""
    from covo_npu.runtime.layers import Stack

    model.networks.llm.layers = Stack(list(model.networks.llm.layers)[:num_layers])
    llm = replace(model.config.llm, num_layers=min(num_layers, model.config.llm.num_layers))
    model.config = replace(model.config, llm=llm)


def _touch(model: CovoAudio) -> None:
    """Read every weight once, so that no path pays for the first touch of a mapped file."""
    tensors: list[Tensor] = [parameter for parameter in model.networks.parameters() if parameter.numel()]
    for tensor in tensors:
        tensor.amax()
