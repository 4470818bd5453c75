"""Recipes: plan, compose, append, undo; and inspect, which looks at what came of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from cli.options import (
    ALLOW,
    COMPUTE,
    DTYPES,
    EXPORTS,
    FLAVOURS,
    ONNX_QUANTISE,
    PRECISIONS,
    Settings,
    common_options,
    pass_settings,
)
from cli.output import emit
from composer.errors import UsageError

if TYPE_CHECKING:
    from composer.recipe import Recipe

__all__ = ["COMMANDS", "default_out"]

F = TypeVar("F", bound=Callable[..., Any])

INCOMPATIBLE = 4
MAX_OUT = 100
RECIPE_FILES = (".yaml", ".yml", ".json")


def recipe_options(command: F) -> F:
    """The argument RECIPE and what its text leaves open."""
    command = click.option(
        "--min-survival",
        type=click.FloatRange(0, 1),
        default=0.1,
        show_default=True,
        metavar="SHARE",
        help="What --requantise must leave of each adapter.",
    )(command)
    command = click.option("--requantise", is_flag=True, help="Write the result quantised as the base is.")(command)
    command = click.option(
        "--original",
        metavar="NAME|PATH",
        help="The base that a quantised one was made of; default: its declared parent.",
    )(command)
    command = click.option(
        "--base-precision",
        type=click.Choice(PRECISIONS),
        default="quantised",
        show_default=True,
        help="Merge into what a quantised base decodes to, or into its original.",
    )(command)
    command = click.option(
        "--allow",
        type=click.Choice(ALLOW),
        default="same-values",
        show_default=True,
        help="The weakest compatibility to accept.",
    )(command)
    command = click.option(
        "--untie", is_flag=True, help="Write both ends of a tied pair where an adapter changes one of them."
    )(command)
    command = click.option(
        "--multi",
        "placement",
        flag_value="multi",
        help="With --export onnx: one graph of the base with all adapters in it, chosen for each row of a batch.",
    )(command)
    command = click.option(
        "--separate",
        "placement",
        flag_value="separate",
        default="merged",
        help="With --export onnx: one graph of the base, and a file for each adapter that a session activates.",
    )(command)
    command = click.option(
        "--rank", type=click.IntRange(min=1, max=1 << 16), help="Of the LoRA that --export peft writes; default: exact."
    )(command)
    command = click.option(
        "--min-agreement",
        type=click.FloatRange(0, 1),
        default=0.5,
        show_default=True,
        metavar="SHARE",
        help="How often a graph that rounds must choose torch's token.",
    )(command)
    command = click.option(
        "--onnx-quantise", type=click.Choice(ONNX_QUANTISE), help="Of an ONNX graph: its matrices, in blocks of 32."
    )(command)
    command = click.option(
        "--compute",
        type=click.Choice(COMPUTE),
        default="fp32",
        show_default=True,
        help="Of an ONNX graph: what it computes in.",
    )(command)
    command = click.option(
        "--flavour",
        type=click.Choice(FLAVOURS),
        default="portable",
        show_default=True,
        help="Of an ONNX graph: standard operators, or what onnxruntime-genai reads.",
    )(command)
    command = click.option("--export", type=click.Choice(EXPORTS), default="safetensors", show_default=True)(command)
    command = click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="keep",
        show_default=True,
        help="The weights' number format; keep is the base's.",
    )(command)
    command = click.option(
        "-p",
        "--parameter",
        "parameters",
        multiple=True,
        metavar="NAME=VALUE",
        help="A parameter of the method, such as density=0.2.",
    )(command)
    command = click.option("--method", default="linear", show_default=True, help="How deltas are combined.")(command)
    return click.argument("recipe")(command)


def to_recipe(text: str, parameters: tuple[str, ...], **words: Any) -> Recipe:
    """A Recipe of the command's words, or of a file and the options that were given beside it."""
    from composer import recipe

    enums = {
        "dtype": recipe.Dtype,
        "export": recipe.Export,
        "placement": recipe.Placement,
        "flavour": recipe.Flavour,
        "compute": recipe.Compute,
        "onnx_quantise": recipe.OnnxQuantise,
        "allow": recipe.Allow,
        "base_precision": recipe.BasePrecision,
    }
    words = {name: enums[name](word) if name in enums and word else word for name, word in words.items()}
    words["parameters"] = dict(map(_pair, parameters))
    if Path(text).suffix in RECIPE_FILES and Path(text).is_file():
        source = click.get_current_context().get_parameter_source
        return recipe.load_recipe(
            Path(text), {key: words[key] for key in words if source(key) is ParameterSource.COMMANDLINE}
        )
    return recipe.parse_recipe(text, **words)


def _pair(text: str) -> tuple[str, float | str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="-p")
    for number in (int, float):  # as YAML and JSON have them, so that one recipe has one digest
        try:
            return name, number(value)
        except ValueError:
            continue
    return name, value


def default_out(recipe: Recipe) -> Path:
    """A folder in the current one that is named after the recipe: ``smollm2+shout``, ``smollm2+shout-onnx``."""
    from composer.recipe import is_path

    def word(ref: str) -> str:
        if is_path(ref):
            return Path(ref).expanduser().resolve().name or "root"
        return ref.rsplit("/", maxsplit=1)[-1].replace(":", "-")[:40]

    name = "+".join([word(recipe.base), *(word(term.ref) for term in recipe.adapters)])
    if len(name) > MAX_OUT:
        name = f"{name[:MAX_OUT]}-{recipe.digest[:8]}"
    dtype = "" if recipe.dtype.value == "keep" else f"-{recipe.dtype.value}"
    export = "" if recipe.export.value == "safetensors" else f"-{recipe.export.value}"
    export += "" if recipe.placement.value == "merged" else f"-{recipe.placement.value}"
    export += "" if recipe.flavour.value == "portable" else f"-{recipe.flavour.value}"
    export += "" if recipe.compute.value == "fp32" else f"-{recipe.compute.value}"
    export += "" if recipe.onnx_quantise is None else f"-{recipe.onnx_quantise.value}"
    method = "" if recipe.method == "linear" else f"-{recipe.method.replace('@', '-')}"
    rank = "" if recipe.rank is None else f"-r{recipe.rank}"
    precision = "-original" if recipe.base_precision.value == "original" else ""
    requantised = "-requantised" if recipe.requantise else ""
    return Path(f"{name}{method}{dtype}{export}{rank}{precision}{requantised}")


@click.command()
@recipe_options
@common_options
@pass_settings
def plan(settings: Settings, recipe: str, **words: Any) -> None:
    """Show what composing RECIPE would do; nothing is written.

    RECIPE is BASE+ADAPTER[@VERSION][#TASK][:WEIGHT][+ADAPTER…] or a YAML file. Exits with 4 when the verdict is weaker
    than --allow.
    """
    from cli.views import plan_block

    info = settings.registry.plan(to_recipe(recipe, **words))
    emit(settings, info, lambda: plan_block(info), lambda: "accepted" if info.accepted else "refused", info.warnings)
    if not info.accepted:
        click.get_current_context().exit(INCOMPATIBLE)


@click.command()
@recipe_options
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="A new folder; default: named after the recipe, in this one."
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a composed model.")
@click.option("--accept-licences", is_flag=True, help="Go on even where licences conflict.")
@click.option("--queue", is_flag=True, help="Only queue it, for a worker to run; prints the job.")
@click.option(
    "--probe",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A plain text: its perplexity before and after goes into composition.json.",
)
@click.option("--publish", metavar="NAME", help="Make the result a base of that name; with --export peft an adapter.")
@common_options
@pass_settings
def compose(
    settings: Settings,
    recipe: str,
    out: Path | None,
    force: bool,
    accept_licences: bool,
    queue: bool,
    probe: Path | None,
    publish: str | None,
    **words: Any,
) -> None:
    """Compose RECIPE into a new folder: weights, companions and composition.json; or one LoRA with --export peft.

    RECIPE is BASE+ADAPTER[@VERSION][#TASK][:WEIGHT][+ADAPTER…], such as smollm2+team/shout@1.0.0:0.7+./my-adapter, or a
    YAML file that may give weights by module. The folder appears whole or not at all. What is published is loaded by
    its name from 'registry serve'; 'registry jobs publish' publishes what was queued.
    """
    from cli.views import composition_block, job_block

    wanted = to_recipe(recipe, **words)
    if queue:
        if publish is not None:
            raise UsageError(
                "a queued composition is published once it is done",
                expected="--queue or --publish",
                found="both",
                remedy="registry jobs publish JOB NAME",
            )
        from registry.api.rules import refuse_paths

        job = settings.registry.submit(refuse_paths(wanted), accept_licences=accept_licences, probe=_text(probe))
        emit(settings, job, lambda: job_block(job), lambda: job.id)
        return
    folder = out or default_out(wanted)
    with settings.progress() as progress:
        result = settings.registry.compose(
            wanted,
            folder,
            replace=force,
            accept_licences=accept_licences,
            probe=_text(probe),
            publish=publish,
            progress=progress,
        )
    emit(settings, result, lambda: composition_block(result), lambda: result.out, result.warnings)


def _text(path: Path | None) -> str | None:
    """What a file to probe holds: UTF-8, its first million characters."""
    if path is None:
        return None
    from composer.probe import MAX_PROBE

    try:
        with path.expanduser().open(encoding="utf-8") as file:
            return file.read(MAX_PROBE)
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} cannot be read as text: {error}", param_hint="--probe") from None


@click.command()
@click.argument("folder", metavar="COMPOSED", type=click.Path(path_type=Path))
@click.option("--adapter", "adapters", multiple=True, help="Take out only this one; may be repeated.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--force", is_flag=True, help="Replace OUT if it is a composed model.")
@common_options
@pass_settings
def undo(settings: Settings, folder: Path, adapters: tuple[str, ...], out: Path, force: bool) -> None:
    """Take adapters out of the composed model in COMPOSED again; without --adapter, all of them.

    What is left is composed anew from the inputs that composition.json names by their hashes, so it is exact: without
    any adapter, the base's own tensors, which is verified. The base must be registered.
    """
    from cli.views import composition_block
    from registry.undo import undo as take_out

    with settings.progress() as progress:
        result = take_out(settings.registry, folder, out, adapters=adapters, replace=force, progress=progress)
    emit(settings, result, lambda: composition_block(result), lambda: result.out, result.warnings)


@click.command()
@click.argument("folder", metavar="COMPOSED", type=click.Path(path_type=Path))
@click.argument("adapters", metavar="ADAPTER…", nargs=-1, required=True)
@click.option(
    "--allow",
    type=click.Choice(ALLOW),
    default="same-values",
    show_default=True,
    help="The weakest compatibility to accept.",
)
@click.option("--accept-licences", is_flag=True, help="Go on even where licences conflict.")
@common_options
@pass_settings
def append(settings: Settings, folder: Path, adapters: tuple[str, ...], allow: str, accept_licences: bool) -> None:
    """Add adapters to the graph in COMPOSED, which was composed with --export onnx --multi.

    ADAPTER is written as in a recipe. What is there is not touched: vectors are added at the end of their files, and
    the new adapters take the next numbers. The files are then those of composing all at once.
    """
    from cli.views import composition_block
    from composer.recipe import Allow
    from registry.appending import append as add

    with settings.progress() as progress:
        result = add(
            settings.registry,
            folder,
            adapters,
            allow=Allow(allow),
            accept_licences=accept_licences,
            progress=progress,
        )
    emit(settings, result, lambda: composition_block(result), lambda: result.out, result.warnings)


@click.command()
@click.argument("ref", metavar="REF|PATH")
@common_options
@pass_settings
def inspect(settings: Settings, ref: str) -> None:
    """Show what an adapter, a base or a composed model holds, tensor by tensor.

    The files of a composed model are hashed and compared with composition.json.
    """
    from cli.views import inspection

    facts = settings.registry.inspect(ref)
    name = str(facts.get("digest") or facts.get("fingerprint") or facts.get("path") or ref)
    emit(settings, facts, lambda: inspection(facts), lambda: name)


COMMANDS = {"plan": plan, "compose": compose, "append": append, "undo": undo, "inspect": inspect}
