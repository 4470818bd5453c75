"""Names that are mistaken for others: refused for a stranger's namespace, told at every creation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from composer.errors import UsageError
from registry.access import Principal, Scope
from registry.confusables import near, skeleton
from registry.errors import ConfusableNameError
from registry.names import adapter_name
from registry.services.local import LocalRegistry
from tests.support import write_base, write_lora

MODULE = "model.layers.0.self_attn.q_proj"
PUBLISH = frozenset({Scope.PUBLISH})
ALICE, MALLORY = Principal("alice", PUBLISH), Principal("mallory", PUBLISH)


@pytest.mark.parametrize("other", ["team_a", "Team-A", "team.a", "teama", "tearn-a", "TEAM--A"])
def test_names_that_read_alike_have_one_skeleton(other: str) -> None:
    """Case, separators, and letters that look like two."""
    assert skeleton(other) == skeleton("team-a")
    assert near(other, "team-a")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("mistral", "mistra1", True),
        ("google", "go0gle", True),
        ("acme", "acmee", True),
        ("acme", "amce", True),
        ("acme", "acne", True),
        ("acme", "cme", False),  # three letters are one slip from everything
        ("acme", "acmeee", False),
        ("acme", "camec", False),
        ("team", "team", False),
        ("shout", "json", False),
    ],
)
def test_one_slip_is_near(one: str, other: str, expected: bool) -> None:
    """A letter more, less, other, swapped or look-alike; in both directions."""
    assert near(one, other) is near(other, one) is expected


@pytest.mark.parametrize("name", ["tеam/shout", "team/shоut", "team\u200b/shout", "ｔeam/shout"])
def test_letters_of_other_scripts_are_no_names(name: str) -> None:
    """Cyrillic е and о, a space of no width, a wide t: what looks like ASCII and is not."""
    with pytest.raises(UsageError, match="not an adapter name"):
        adapter_name(name)


@pytest.fixture
def folder(registry: LocalRegistry, tmp_path: Path) -> Path:
    """An adapter, in a registry where alice has published it as team-a/shout."""
    registry.add_base(write_base(tmp_path / "base", {f"{MODULE}.weight": np.ones((6, 4), np.float32)}), name="base")
    adapter = write_lora(tmp_path / "adapter", {MODULE: (6, 4)})
    registry.acting_as(ALICE).publish(adapter, name="team-a/shout", base="base")
    return adapter


def test_a_strangers_namespace_that_reads_alike_is_refused(registry: LocalRegistry, folder: Path) -> None:
    """Which one it is like is said; its owner may have it, an admin may give it, and nothing was claimed."""
    for name in ("team_a/shout", "TEAM.A/json", "tearna/shout"):
        with pytest.raises(ConfusableNameError, match="could be taken for 'team-a'") as caught:
            registry.acting_as(MALLORY).publish(folder, name=name, base="base")
        assert caught.value.category == "conflict"
    assert [item.name for item in registry.list_namespaces().items] == ["team-a"]
    told = registry.acting_as(ALICE).publish(folder, name="team_a/shout", base="base").warnings
    assert "the new namespace 'team_a' can be taken for 'team-a'" in told


def test_one_slip_is_told_at_creation_alone(registry: LocalRegistry, folder: Path) -> None:
    """For a namespace and for an adapter in it; the next version is no new name."""
    first = registry.acting_as(MALLORY).publish(folder, name="team-b/shout", base="base")
    assert "the new namespace 'team-b' can be taken for 'team-a'" in first.warnings
    second = registry.acting_as(MALLORY).publish(folder, name="team-b/sh0ut", base="base")
    assert "team-b/sh0ut can be taken for team-b/shout" in second.warnings
    again = registry.acting_as(MALLORY).publish(folder, name="team-b/sh0ut", version="3.0.0", base="base")
    assert not any("taken for" in line for line in again.warnings)


def test_a_private_namespace_is_not_named(registry: LocalRegistry, folder: Path) -> None:
    """The refusal says that there is one, and the warnings say nothing."""
    registry.acting_as(ALICE).publish(folder, name="secret-lab/x", base="base", private=True)
    with pytest.raises(ConfusableNameError) as caught:
        registry.acting_as(MALLORY).publish(folder, name="secretlab/x", base="base")
    assert "secret-lab" not in str(caught.value.as_dict())
    told = registry.acting_as(MALLORY).publish(folder, name="secret-labs/x", base="base").warnings
    assert not any("taken for" in line for line in told)
