"""Formatting, progress, names of choices, the written reference."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from cli import options
from cli.compose import default_out
from cli.output import block, clean, short, size, table
from cli.progress import ProgressLine
from cli.reference import render
from composer.recipe import Allow, BasePrecision, Compute, Dtype, Export, Flavour, OnnxQuantise, parse_recipe
from registry.schemas import Level, Relation

DOCS = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def test_the_reference_is_current() -> None:
    """docs/cli.md is what the commands' help says now; else run `python -m cli.reference > docs/cli.md`."""
    assert DOCS.read_text(encoding="utf-8") == render()


def test_choices_are_the_enums() -> None:
    """The CLI's literals, kept apart so that --help is fast, equal the enums."""
    assert list(options.DTYPES) == list(Dtype)
    assert list(options.EXPORTS) == list(Export)
    assert list(options.ALLOW) == list(Allow)
    assert list(options.FLAVOURS) == list(Flavour)
    assert list(options.COMPUTE) == list(Compute)
    assert list(options.ONNX_QUANTISE) == list(OnnxQuantise)
    assert list(options.PRECISIONS) == list(BasePrecision)
    assert list(options.RELATIONS) == list(Relation)
    assert [*options.LEVELS, "incompatible"] == list(Level)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5120.0 TiB")]
)
def test_sizes_are_binary(count: int, text: str) -> None:
    """Units go by 1024."""
    assert size(count) == text


def test_tables_align_and_flush_numbers_right() -> None:
    """Widths are those of the widest cell; an empty table is its sentence."""
    assert table(("NAME", "N"), [("a", 1), ("bcdef", 100)], "none") == "NAME     N\na        1\nbcdef  100"
    assert table(("NAME",), [], "none") == "none"


def test_blocks_leave_out_what_is_empty() -> None:
    """Names are padded to the widest kept one; lists take a line an item."""
    assert block([("a", 1), ("long", ["x", "y"]), ("none", None)]) == "a     1\nlong  x\n      y"


def test_short_digests_keep_their_scheme() -> None:
    """Twelve digits after the scheme."""
    assert short("sha256:" + "a" * 64) == "sha256:" + "a" * 12
    assert short(None) == "-"


def test_clean_keeps_letters_of_any_script() -> None:
    """Only what is not printable is replaced."""
    assert clean("für 模型") == "für 模型"
    assert clean("a\x1b[2Jb\r") == "a�[2Jb�"


@pytest.mark.parametrize(
    ("text", "options", "name"),
    [
        ("smollm2+team/shout@1.0.0:0.7", {}, "smollm2+shout"),
        ("smollm2+shout+team/json", {"export": Export.ONNX}, "smollm2+shout+json-onnx"),
        (
            "b",
            {"export": "onnx", "flavour": "genai", "compute": "fp16", "onnx_quantise": "int8"},
            "b-onnx-genai-fp16-int8",
        ),
        ("tiny+a+b", {"export": Export.ONNX, "placement": "separate"}, "tiny+a+b-onnx-separate"),
        ("tiny+a+b", {"export": Export.ONNX, "placement": "multi"}, "tiny+a+b-onnx-multi"),
        ("./models/tiny/+/x/y/fr", {"dtype": Dtype.FP16}, "tiny+fr-fp16"),
        ("smollm2", {}, "smollm2"),
        ("nf4+a", {"base_precision": "original", "requantise": True}, "nf4+a-original-requantised"),
    ],
)
def test_the_output_folder_is_named_after_the_recipe(text: str, options: dict[str, str], name: str) -> None:
    """Last parts of names and folders, then what differs from the default."""
    assert str(default_out(parse_recipe(text, **options))) == name


def test_a_long_recipe_gets_a_name_that_fits() -> None:
    """Cut, with the recipe's digest, so that two long recipes differ."""
    many = "+".join(["base", *(f"team/adapter-{index}" for index in range(60))])
    names = {str(default_out(parse_recipe(text))) for text in (many, f"{many}:0.5")}
    assert len(names) == 2
    assert all(len(name) < 200 for name in names)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _progress(stream: io.StringIO, until: int) -> str:
    """What 0 … until seconds of work show, a call each tenth of a second."""
    now = [0.0]
    line = ProgressLine(stream, clock=lambda: now[0])
    for tenth in range(until * 10):
        now[0] = tenth / 10
        line("merging", tenth << 20, until * 10 << 20)
        line.draw()
    line.__exit__(None, None, None)
    return stream.getvalue()


def test_short_work_shows_no_progress() -> None:
    """Nothing in the first two seconds, on a terminal or off it."""
    assert _progress(_Terminal(), 2) == ""
    assert _progress(io.StringIO(), 2) == ""


def test_a_pipe_gets_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """About one line in ten seconds, without control characters but the newline."""
    text = _progress(io.StringIO(), 25)
    assert len(text.splitlines()) == 3
    assert text.replace("\n", "").isprintable()
    assert text.startswith("merging: 20.0 MiB of 250.0 MiB (8%), 2 s")


def test_a_terminal_gets_one_live_line_that_is_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redrawn in place several times a second; gone at the end."""
    monkeypatch.setenv("TERM", "xterm")
    text = _progress(_Terminal(), 4)
    assert "\n" not in text
    assert text.count("merging") > 5
    assert text.endswith("\r\x1b[K")
