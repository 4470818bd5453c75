"""Run what was composed: run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import Settings, common_options, pass_settings
from cli.output import block, emit, table

if TYPE_CHECKING:
    from composer.running import Encoding, Runnable, Sampling

__all__ = ["COMMANDS"]

PROVIDERS = ("cpu", "cuda")  # composer.exporters.onnx.session.PROVIDERS, which a test compares
MAX_PROMPT = 1 << 24
SHOWN = 6  # numbers of an embedding


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--raw", is_flag=True, help="The prompt as it is, without the chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, metavar="N")
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="Draw tokens; 0 takes the most likely one."
)
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Draw from the likeliest tokens of this share."
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the draws; default: others each time.")
@click.option(
    "--provider", type=click.Choice(PROVIDERS), default="cpu", show_default=True, help="Where; never another instead."
)
@click.option("--adapter", metavar="NAME", help="One that OUT keeps apart (--separate, --multi); default: the base.")
@click.option("--threads", type=click.IntRange(min=1), help="Within an operator; default: ONNX Runtime's.")
@click.option("--no-check", is_flag=True, help="Do not compare the files with composition.json first.")
@common_options
@pass_settings
def run(
    settings: Settings,
    folder: Path,
    prompt: str,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    provider: Any,
    adapter: str | None,
    threads: int | None,
    no_check: bool,
) -> None:
    """Give PROMPT to the model that was composed with --export onnx into OUT, in ONNX Runtime.

    A model that generates answers token by token; an encoder gives the scores of its labels, or an embedding (the mean
    over all tokens). PROMPT - is read from stdin.
    """
    from composer.running import Sampling, open_runnable

    sampling = Sampling(temperature, top_p, seed)
    if prompt == "-":
        prompt = click.get_text_stream("stdin").read(MAX_PROMPT)
    runnable = open_runnable(folder.expanduser(), provider, adapter=adapter, threads=threads, check=not no_check)
    if runnable.architecture.generates:
        _generate(settings, runnable, prompt, raw=raw, max_new_tokens=max_new_tokens, sampling=sampling)
    else:
        _encode(settings, runnable, prompt)


def _generate(
    settings: Settings, runnable: Runnable, prompt: str, *, raw: bool, max_new_tokens: int, sampling: Sampling
) -> None:
    from composer.running import Piece, answer

    for item in answer(runnable, prompt, raw=raw, max_new_tokens=max_new_tokens, sampling=sampling):
        if isinstance(item, Piece):
            if settings.format != "json":
                click.echo(_printable(item.text), nl=False)
        elif settings.format == "json":
            emit(settings, {**asdict(item), "provider": runnable.provider}, str, str)
        else:
            click.echo()


def _printable(text: str) -> str:
    """Lines and tabs stay; other control characters must not steer the terminal."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "�" for sign in text)


def _encode(settings: Settings, runnable: Runnable, text: str) -> None:
    from composer.running import encode

    found = encode(runnable, text)
    value = {**{name: value for name, value in asdict(found).items() if value is not None}}
    emit(settings, {**value, "provider": runnable.provider}, lambda: _shown(found), lambda: _identifying(found))


def _shown(found: Encoding) -> str:
    if found.labels is not None:
        ranked = sorted(found.labels.items(), key=lambda item: -item[1])
        return table(("LABEL", "SCORE"), [(label, f"{score:.4f}") for label, score in ranked], "no labels")
    if found.token_labels is not None:
        rows = [(token, label, f"{score:.4f}") for token, label, score in found.token_labels]
        return table(("TOKEN", "LABEL", "SCORE"), rows, "no tokens")
    values = found.embedding or ()
    first = " ".join(f"{value:.4f}" for value in values[:SHOWN])
    return block([("tokens", found.tokens), ("embedding", f"{len(values)} numbers: {first} …")])


def _identifying(found: Encoding) -> list[str]:
    if found.labels is not None:
        return [max(found.labels, key=found.labels.__getitem__)]
    if found.token_labels is not None:
        return [label for _, label, _ in found.token_labels]
    return [repr(value) for value in found.embedding or ()]


COMMANDS = {"run": run}
