"""The commands over a real registry: what they print in each format, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import weight_bytes


@pytest.fixture
def published(run: Any, tiny_llama: Path, tiny_lora: Path) -> Any:
    """A registry with one base and one adapter; gives `run`."""
    run("base", "add", tiny_llama, "--name", "tiny")
    run("publish", tiny_lora, "--name", "team/shout", "--version", "1.0.0", "--base", "tiny", "--tag", "loud")
    return run


def test_a_base_is_registered_once(run: Any, tiny_llama: Path) -> None:
    """The second `base add` of the same weights says so and changes nothing; quiet prints the fingerprint."""
    first = json.loads(run("base", "add", tiny_llama, "--name", "tiny", "--format", "json").stdout)
    again = json.loads(run("base", "add", tiny_llama, "--name", "tiny", "--format", "json").stdout)
    assert (first["created"], again["created"]) == (True, False)
    assert run("base", "show", "tiny", "--format", "quiet").stdout.strip() == first["fingerprint"]
    assert run("base", "list", "--format", "quiet").stdout.split() == ["tiny"]
    assert first["fingerprint"][:16] in run("base", "list").stdout
    assert first["fingerprint"] in run("base", "show", first["fingerprint"]).stdout


def test_a_publish_of_the_same_bytes_is_no_news(published: Any, tiny_lora: Path) -> None:
    """Publishing is idempotent, and other words for the same version are a conflict only if the bytes differ."""
    result = published("publish", tiny_lora, "--name", "team/shout", "--version", "1.0.0", "--base", "tiny")
    assert "already" in result.stdout


def test_other_bytes_under_a_version_are_a_conflict(published: Any, other_lora: Path) -> None:
    """A version never changes: exit code 7."""
    result = published("publish", other_lora, "--name", "team/shout", "--version", "1.0.0", "--base", "tiny", code=7)
    assert result.stdout == ""
    assert "error: " in result.stderr


def test_listings_agree_in_every_format(published: Any) -> None:
    """list, search and versions name the same version to people, programs and scripts."""
    listings = (
        "list",
        "list --namespace team --kind lora --base tiny",
        "search loud shout",
        "versions team/shout",
    )
    for words in map(str.split, listings):
        assert published(*words, "--format", "quiet").stdout.split() == ["team/shout@1.0.0"]
        assert [item["name"] for item in json.loads(published(*words, "--format", "json").stdout)] == ["team/shout"]
        assert "team/shout" in published(*words).stdout
    assert published("search", "nosuchword").stdout.startswith("nothing holds")
    assert published("list", "--namespace", "nobody", "--format", "json").stdout.strip() == "[]"


def test_global_options_stand_before_or_after_the_command(published: Any) -> None:
    """`--format quiet list` is `list --format quiet`, and the later one wins."""
    expected = published("list", "--format", "quiet").stdout
    assert published("--format", "quiet", "list").stdout == expected
    assert published("--format", "json", "list", "--format", "quiet").stdout == expected


def test_an_alias_points_moves_and_goes(published: Any) -> None:
    """alias, show by alias, alias --delete."""
    digest = published("show", "team/shout", "--format", "quiet").stdout
    published("alias", "team/shout@1.0.0", "prod")
    assert published("show", "team/shout@prod", "--format", "quiet").stdout == digest
    published("alias", "team/shout", "prod", "--delete")
    published("show", "team/shout@prod", code=3)


def test_pull_gives_back_the_published_bytes(published: Any, tiny_lora: Path) -> None:
    """Every pulled file equals the one that was published; a taken folder is a conflict."""
    published("pull", "team/shout@1.0.0")
    pulled = sorted(Path("shout").iterdir())
    assert "adapter_model.safetensors" in [path.name for path in pulled]
    assert all(path.read_bytes() == (tiny_lora / path.name).read_bytes() for path in pulled)
    published("pull", "team/shout", "-o", "shout", code=7)


def test_compatibility_is_told_from_both_sides(published: Any) -> None:
    """compatible, bases and check agree on the level and give a reason."""
    assert published("compatible", "tiny", "--format", "quiet").stdout.split() == ["team/shout@1.0.0"]
    assert published("bases", "team/shout", "--format", "quiet").stdout.split() == ["tiny"]
    assert published("check", "team/shout", "tiny", "--format", "quiet").stdout.split() == ["exact"]
    assert "exact" in published("compatible", "tiny").stdout
    assert "reason" in published("check", "team/shout", "tiny").stdout


def test_plan_shows_and_writes_nothing(published: Any) -> None:
    """A plan names the adapter, the level and the files; the folder stays empty."""
    plan = json.loads(published("plan", "tiny+team/shout:0.5", "--format", "json").stdout)
    assert plan["accepted"]
    assert plan["adapters"][0]["weight"] == 0.5
    assert "team/shout@1.0.0" in published("plan", "tiny+team/shout:0.5").stdout
    assert list(Path().iterdir()) == []


def test_compose_names_its_folder_after_the_recipe(published: Any, tiny_llama: Path, tiny_lora: Path) -> None:
    """Names and plain folders compose alike, to the same weights; the output is reported in full."""
    out = Path(published("compose", "tiny+team/shout:0.5", "--format", "quiet").stdout.strip())
    assert out.name == "tiny+shout"
    folders = published("compose", f"{tiny_llama}+{tiny_lora}:0.5", "--format", "quiet").stdout.strip()
    assert Path(folders).name == "tiny-llama+tiny-lora"
    assert (Path(folders) / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    record = json.loads((out / "composition.json").read_text())
    text = published("compose", "tiny+team/shout:0.5", "-o", "again").stdout
    for expected in (record["output_digest"], "team/shout@1.0.0", "exact", "model.safetensors", "merge", "again"):
        assert expected in text


def test_methods_take_parameters_and_recipes_may_be_files(published: Any) -> None:
    """`-p` reaches the recipe and the record; a file says the same, and an option beside it wins."""
    words = ("compose", "tiny+team/shout:0.5", "--method", "ties", "-p", "density=0.5", "--format", "quiet")
    out = Path(published(*words).stdout.strip())
    assert out.name == "tiny+shout-ties"
    assert json.loads((out / "composition.json").read_text())["recipe"]["parameters"] == {"density": 0.5}
    Path("recipe.yaml").write_text(
        "{base: tiny, adapters: [{ref: team/shout, weight: 0.5}], method: ties, parameters: {density: 0.9}}"
    )
    other = published("compose", "recipe.yaml", "-p", "density=0.5", "-o", "other", "--format", "quiet").stdout.strip()
    assert weight_bytes(Path(other)) == weight_bytes(out)
    published("compose", "recipe.yaml", "-o", "third")
    assert weight_bytes(Path("third")) != weight_bytes(out)
    published("plan", "tiny+team/shout", "--method", "ties", "-p", "density", code=2)
    assert (
        "density: float in (0, 1]"
        in published("plan", "tiny+team/shout", "--method", "ties", "-p", "k=1", code=2).stderr
    )


def test_compose_does_not_replace_what_is_there(published: Any) -> None:
    """Another recipe into the same folder is a conflict without --force; with it the folder is replaced whole."""
    published("compose", "tiny+team/shout", "-o", "out")
    before = (Path("out") / "model.safetensors").read_bytes()
    published("compose", "tiny+team/shout:0.5", "-o", "out", code=7)
    assert (Path("out") / "model.safetensors").read_bytes() == before
    published("compose", "tiny+team/shout:0.5", "-o", "out", "--force")
    assert (Path("out") / "model.safetensors").read_bytes() != before
    assert "already" in published("compose", "tiny+team/shout:0.5", "-o", "out").stdout


def test_inspect_reads_names_and_folders(published: Any, tiny_lora: Path) -> None:
    """An adapter by name or folder, a base, and a composed model, whose files are compared with its record."""
    assert json.loads(published("inspect", "team/shout", "--format", "json").stdout)["type"] == "adapter"
    assert "lora_A" in published("inspect", tiny_lora).stdout
    assert json.loads(published("inspect", "tiny", "--format", "json").stdout)["type"] == "base"
    published("compose", "tiny+team/shout", "-o", "out")
    assert "intact        yes" in published("inspect", "./out").stdout


def test_doctor_ends_with_1_when_something_is_wrong(published: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """A healthy registry passes; one whose base went away does not, and the remedy is printed."""
    published("doctor")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_llama.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    published("base", "add", copy, "--name", "gone")
    (copy / "model.safetensors").unlink()
    result = published("doctor", code=1)
    assert "FAIL" in result.stdout
    assert "base gone" in published("doctor", "--format", "quiet", code=1).stdout


def test_every_command_works_through_a_service(run: Any, service: str, tiny_llama: Path, tiny_lora: Path) -> None:
    """publish, list, compatible, plan, compose, pull: the same words with --url give the same results."""
    remote = ("--url", service)
    run("base", "add", tiny_llama, "--name", "tiny", *remote)
    run("publish", tiny_lora, "--name", "team/shout", "--base", "tiny", *remote)
    reads = (
        "list, search shout, show team/shout, versions team/shout, base list, base show tiny, inspect tiny, "
        "inspect team/shout, compatible tiny, bases team/shout, check team/shout tiny, plan tiny+team/shout"
    )
    for words in map(str.split, reads.split(", ")):
        assert run(*words, *remote).stdout == run(*words).stdout, words
    run("compose", "tiny+team/shout", "-o", "far", *remote)
    run("compose", "tiny+team/shout", "-o", "near")
    assert (Path("far") / "model.safetensors").read_bytes() == (Path("near") / "model.safetensors").read_bytes()
    assert (Path("far") / "composition.json").read_bytes() == (Path("near") / "composition.json").read_bytes()
    run("pull", "team/shout", "-o", "pulled", *remote)
    assert (Path("pulled") / "adapter_model.safetensors").read_bytes() == (
        tiny_lora / "adapter_model.safetensors"
    ).read_bytes()
    run("doctor", *remote)
    run("show", "team/nobody", *remote, code=3)
    run("compose", f"{tiny_llama}+team/shout", *remote, code=6)


def test_undo_gives_the_base_back(published: Any, service: str, tiny_llama: Path) -> None:
    """Here and through a service; an adapter that is no part of it is not found."""
    from tests.support import read_tensors

    published("compose", "tiny+team/shout", "-o", "composed")
    published("undo", "composed", "-o", "back")
    published("--url", service, "undo", "composed", "-o", "remote")
    expected = read_tensors(tiny_llama)
    for out in ("back", "remote"):
        found = read_tensors(Path(out))
        assert all(found[name].equal(tensor) for name, tensor in expected.items())
    published("undo", "composed", "--adapter", "team/none", "-o", "never", code=3)
