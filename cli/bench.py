"""How fast models run here: bench."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import Settings, common_options, pass_settings
from cli.output import emit, table

if TYPE_CHECKING:
    from composer.latency import Latency

__all__ = ["COMMANDS"]

RUNTIMES = ("torch", "onnx")  # composer.latency.RUNTIMES, which a test compares


@click.command()
@click.argument("folders", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice(RUNTIMES),
    help="Only this one; may be repeated. Default: torch, and onnx where there is a graph.",
)
@click.option("--prompt", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--new", type=click.IntRange(min=0), default=32, show_default=True, help="Tokens decoded after it.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Prompts at once.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Medians are of so many.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of both runtimes; default: theirs.")
@common_options
@pass_settings
def bench(
    settings: Settings,
    folders: tuple[Path, ...],
    runtimes: tuple[str, ...],
    prompt: int,
    new: int,
    batch: int,
    rounds: int,
    threads: int | None,
) -> None:
    """Measure how fast the models in OUT... run here, each against the first.

    OUT is a composed model or a checkpoint folder: give the base first, then merged ones and those with bottlenecks
    beside their weights. Times are medians of rounds that take all models in turn; both runtimes compute in float32.
    """
    from composer.latency import Workload, measure_latency

    workload = Workload(prompt, new, batch, rounds, threads)
    with settings.progress() as progress:
        report = (lambda step: progress(step, 0, 0)) if progress else None
        rows = measure_latency([folder.expanduser() for folder in folders], workload, runtimes, report)
    value = {"workload": asdict(workload), "models": [asdict(row) for row in rows]}
    emit(settings, value, lambda: _table(rows), lambda: [f"{row.prefill_s * 1e3:.2f}" for row in rows])


def _table(rows: list[Latency]) -> str:
    headers = ("MODEL", "RUNTIME", "PREFILL MS", "AGAINST FIRST", "TOKENS/S", "TIME A TOKEN")
    cells = [
        (
            row.model,
            row.runtime,
            f"{row.prefill_s * 1e3:.2f}",
            f"{row.prefill_against:.2f}×",
            None if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}",
            None if row.token_against is None else f"{row.token_against:.2f}×",
        )
        for row in rows
    ]
    return table(headers, cells, "nothing to measure")


COMMANDS = {"bench": bench}
