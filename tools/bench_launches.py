"""covo-bench launches: operators launched and waits for the device, by stage, ours and the stock path's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from covo_npu.runtime.config import ModelConfig
from covo_npu.tools import work
from covo_npu.tools.check_result import json_option, verbose_option
from covo_npu.tools.launches import Counts, count

OK, FAULT = 0, 1

# stage: the most operators it may launch. The stock path's count is given where it bounds ours.
BUDGETS: dict[str, Callable[[ModelConfig, int | None], int | None]] = {
    "prefill": lambda config, stock: 14 * config.llm.num_layers + 30,
    "decode": lambda config, stock: 12 * config.llm.num_layers + 20,
    # 16 a block; before, after and between evaluations the rest
    "flow matching": lambda config, stock: 16 * config.token2wav.dit.num_layers + 12 if config.token2wav else None,
    "vocoder": lambda config, stock: None if stock is None else stock // 2,
}
WAIT_BUDGETS = {"prefill": 0, "decode": 1, "flow matching": 0}


@dataclass(frozen=True, slots=True)
class Row:
    """One stage. The stock path is transformers for encoder and decoder, and a direct port for speech."""

    stage: str
    unit: str
    launches: int
    waits: int
    budget: int | None
    stock_launches: int | None
    stock_waits: int | None

    @property
    def holds(self) -> bool:
        """Whether the stage keeps to its budgets."""
        allowed = WAIT_BUDGETS.get(self.stage)
        return (self.budget is None or self.launches <= self.budget) and (allowed is None or self.waits <= allowed)


def measure(subject: work.Subject, with_stock: bool = True) -> list[Row]:
    """Return one row a stage. Each is run once before it is counted."""
    with torch.inference_mode():
        ours = work.Work(subject)
        stock = stock_counts(subject, ours) if with_stock else {}
        rows = []
        for stage in ours.stages():
            stage.run()
            found, theirs = count(stage.run, subject.device), stock.get(stage.name)
            budget = BUDGETS.get(stage.name, lambda config, stock: None)
            rows.append(
                Row(
                    stage.name,
                    stage.unit,
                    found.launches,
                    found.waits,
                    budget(subject.config, theirs.launches if theirs else None),
                    theirs.launches if theirs else None,
                    theirs.waits if theirs else None,
                )
            )
        return rows


def stock_counts(subject: work.Subject, ours: work.Work) -> dict[str, Counts]:
    """Return the stock path's counts by stage, on our weights. The decoder's sampling is greedy with both penalties.

    Its encoder runs in float32, because the device's convolutions do not take bfloat16.
    """
    from covo_npu.tools.stock_decode import Stock
    from covo_npu.tools.stock_token2wav import StockToken2Wav

    stock: Any = Stock(subject)  # type: ignore[arg-type]  # it reads networks, config, device and dtype
    encoder = stock.encoder.float()
    sizes, ids = subject.config.llm, torch.cat((ours.ids, ours.ids[:1]))[None]
    shape = (1, sizes.num_kv_heads, len(ours.ids), sizes.head_dim)
    rows = tuple(ours.mel.new_zeros(shape) for _ in range(2 * sizes.num_layers))

    def counted(run: Callable[[], object]) -> Counts:
        run()
        return count(run, subject.device)

    def tokens(number: int) -> Counts:
        return counted(lambda: stock.continuation(ids, rows, number))

    counts = {
        "encode": counted(lambda: encoder(ours.mel.float())),
        "prefill": counted(lambda: stock.llm(inputs_embeds=ours.embeddings[None], use_cache=True, logits_to_keep=1)),
        "decode": tokens(5).minus(tokens(4)),
    }
    if subject.networks.token2wav is not None:
        speech = StockToken2Wav(subject.networks.token2wav)

        z, known, time = (x.new_zeros(2, *x.shape) for x in (ours.noise, ours.noise, ours.noise[0, 0]))
        tokens_in = z.new_zeros(*z.shape[:2], speech.config.dit.hidden_size)
        # without guidance and the step, which ours has
        counts["flow matching"] = counted(lambda: speech.velocity(time, z, tokens_in, known))
        counts["vocoder"] = counted(lambda: speech.vocoder(ours.latents))
    return counts


def as_text(rows: list[Row], source: str) -> str:
    """Return a table for a terminal."""
    lines = [f"{'stage':<16} {'once is':<22} {'launches':>8} {'budget':>7} {'stock':>6} {'waits':>6} {'stock':>6}"]
    for row in rows:
        cells = [row.launches, row.budget, row.stock_launches, row.waits, row.stock_waits]
        figures = " ".join(f"{'-' if c is None else c:>{width}}" for c, width in zip(cells, (8, 7, 6, 6, 6)))
        lines.append(f"{row.stage:<16} {row.unit:<22} {figures}{'' if row.holds else '  over budget'}")
    return "\n".join([*lines, f"counted by: {source}"])


@click.command()
@click.option("--ckpt", type=click.Path(path_type=Path), help="Converted checkpoint; by default networks are made up.")
@click.option("--device", default="npu:0", show_default=True, help="npu:N, real or emulated.")
@click.option("--stock/--no-stock", default=True, show_default=True, help="Count the stock path too (transformers).")
@json_option
@verbose_option
def launches(ckpt: Path | None, device: str, stock: bool, as_json: bool, verbose: bool) -> int:
    """Count the operators that an NPU is asked to run, and how often the host waits for it.

    Made-up networks have the real number of layers and small widths: the counts are those of the real model. On the
    emulated NPU (tests/npu/emulated covo-bench launches) counts are exact and nothing is said of speed. Exit code 1 if
    a stage exceeds its budget.
    """
    subject = work.loaded(ckpt, device) if ckpt else work.made_up(device)
    rows = measure(subject, stock)
    source = count(lambda: None, subject.device).source
    click.echo(json.dumps([asdict(row) for row in rows], indent=1) if as_json else as_text(rows, source))
    return OK if all(row.holds for row in rows) else FAULT
