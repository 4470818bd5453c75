"""Adapters kept apart, from the command line and through a service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RECIPE = ("tiny+team/shout+team/json:0.5", "--export", "onnx", "--separate")


def test_the_plan_says_what_is_written_beside_the_base(two: Any) -> None:
    """A file an adapter and no changed tensor; there is no sum to advise against; a plain export is refused."""
    planned = json.loads(two("plan", *RECIPE, "--format", "json").stdout)
    assert (planned["touched"], [item["tensors"] for item in planned["adapters"]]) == (0, [14, 4])
    assert {"shout.onnx_adapter", "json.onnx_adapter", "model.safetensors"} < set(planned["files"])
    full = ("plan", "tiny+team/shout+team/json", "--export", "onnx", "--format", "json")
    merged, apart = (json.loads(two(*full, *more).stdout)["advice"] for more in ((), ("--separate",)))
    assert {item["code"] for item in merged} - {item["code"] for item in apart} == {"several-at-full-weight"}
    two("plan", "tiny+team/shout", "--separate", code=2)
    Path("recipe.yaml").write_text("{base: tiny, adapters: [team/shout], export: onnx, placement: separate}")
    assert json.loads(two("plan", "recipe.yaml", "--format", "json").stdout)["recipe"]["placement"] == "separate"


@pytest.mark.slow
def test_a_service_composes_and_adds_the_same_bytes(two: Any, service: str) -> None:
    """The option reaches the job and its key: one result here and there, and another than that of merging.

    Adapters that are added to a graph of several, here and through the service, give what composing at once gives.
    """
    pytest.importorskip("onnxruntime")
    here = json.loads(two("compose", *RECIPE, "-o", "here", "--format", "json").stdout)
    there = json.loads(two("--url", service, "compose", *RECIPE, "-o", "there", "--format", "json").stdout)
    assert here["output_digest"] == there["output_digest"]
    assert {path.name for path in Path("there").iterdir()} == {path.name for path in Path("here").iterdir()}
    merged = json.loads(two("compose", *RECIPE[:3], "-o", "merged", "--format", "json").stdout)
    assert here["record"]["key"] != merged["record"]["key"]
    found = [(item["ref"], item["weight"], item["digest"][:7]) for item in here["record"]["adapters"]]
    assert found == [("team/shout@0.1.0", 1.0, "sha256:"), ("team/json@0.1.0", 0.5, "sha256:")]
    assert "separate: shout, json" in two("compose", *RECIPE, "-o", "here").stdout
    many = ("--export", "onnx", "--multi", "--format", "json")
    whole = json.loads(two("compose", "tiny+team/shout+team/json:0.5", *many, "-o", "whole").stdout)
    for name, words in (("near", ()), ("far", ("--url", service))):
        two(*words, "compose", "tiny+team/shout", *many, "-o", name)
        added = json.loads(two(*words, "append", name, "team/json:0.5", "--format", "json").stdout)
        assert added["output_digest"] == whole["output_digest"]
        assert added["recipe_text"].endswith("team/shout+team/json:0.5")
        assert json.loads(two("inspect", f"./{name}", "--format", "json").stdout)["intact"]
    assert "multi: shout, json, json-2" in two("append", "near", "team/json").stdout
    two("append", "here", "team/json", code=2)
    two("append", "nowhere", "team/json", code=3)
    two("append", "near", "team/none", code=3)
    assert "every byte is the same" in two("verify", "./near", "--rebuild").stdout
    two("undo", "near", "--adapter", "team/json", "-o", "back")
