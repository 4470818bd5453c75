"""The catalogue: schema, versions, aliases, search, and that nothing in it can be broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from hypothesis import given
from hypothesis import strategies as st

from composer.errors import IncompatibleError, NonFiniteError, UsageError
from composer.recipe import parse_recipe
from registry.db import _alembic_config, current_revision, head_revision
from registry.errors import (
    AdapterNotFoundError,
    BlobCorruptError,
    NameTakenError,
    VersionNotFoundError,
    VersionTakenError,
)
from registry.names import Version, adapter_name
from registry.schemas import BaseStatus
from registry.services.local import LocalRegistry, open_registry
from tests.support import edit_json, write_base, write_lora

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def registry(any_registry: LocalRegistry) -> LocalRegistry:
    """An empty registry on each database."""
    return any_registry


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of one layer."""
    import numpy as np

    tensors = {"model.layers.0.self_attn.q_proj.weight": np.arange(24, dtype=np.float32).reshape(6, 4)}
    return write_base(tmp_path / "base", tensors)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA for `base`, which knows it by name only."""
    return write_lora(tmp_path / "lora", {"model.layers.0.self_attn.q_proj": (6, 4)})


def another(lora: Path, folder: Path, seed: int) -> Path:
    """A LoRA of the same shape with other numbers."""
    return write_lora(folder, {"model.layers.0.self_attn.q_proj": (6, 4)}, seed=seed)


def test_the_migrations_make_the_models(registry: LocalRegistry) -> None:
    """A database migrated to head has no difference to the typed models."""
    assert current_revision(registry.engine) == head_revision(registry.engine)
    command.check(_alembic_config(registry.engine))


def test_the_migrations_can_be_undone(home: Path) -> None:
    """Down to nothing and up again."""
    opened = open_registry(home)
    command.downgrade(_alembic_config(opened.engine), "base")
    assert sa.inspect(opened.engine).get_table_names() == ["alembic_version"]
    command.upgrade(_alembic_config(opened.engine), "head")
    command.check(_alembic_config(opened.engine))


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO aliases (adapter_id, alias, version_id, updated_at) VALUES (1, 'latest', 1, CURRENT_TIMESTAMP)",
        "INSERT INTO aliases (adapter_id, alias, version_id, updated_at) VALUES (1, 'prod', 99, CURRENT_TIMESTAMP)",
        "UPDATE adapter_versions SET digest = 'md5:1'",
        "UPDATE adapter_versions SET base_fingerprint = 'smollm2'",
        "UPDATE base_models SET relation = 'finetune'",
        "UPDATE base_models SET parent_id = id, relation = 'finetune'",
        "UPDATE version_files SET size = -1",
        "DELETE FROM adapters",
        "INSERT INTO adapters (namespace, name, created_at) VALUES ('team', 'a', CURRENT_TIMESTAMP)",
    ],
)
def test_the_database_itself_refuses_what_must_not_be(
    registry: LocalRegistry, base: Path, lora: Path, statement: str
) -> None:
    """Each statement breaks a constraint, whatever code would run it."""
    registry.add_base(base, name="base")
    registry.publish(lora, name="team/a", base="base")
    with pytest.raises(sa.exc.IntegrityError), registry.engine.begin() as connection:
        connection.execute(sa.text(statement))


def test_identical_bytes_are_a_no_op_and_other_bytes_a_conflict(
    registry: LocalRegistry, lora: Path, tmp_path: Path
) -> None:
    """A version never changes; publishing it again says that it is there."""
    first = registry.publish(lora, name="team/a", version="1.0.0")
    again = registry.publish(lora, name="team/a", version="1.0.0")
    assert (first.created, again.created) == (True, False)
    assert first.version.digest == again.version.digest
    assert registry.publish(lora, name="team/a").created is False
    with pytest.raises(VersionTakenError) as caught:
        registry.publish(another(lora, tmp_path / "other", 5), name="team/a", version="1.0.0")
    assert caught.value.expected == first.version.digest
    assert len(registry.list_versions("team/a").items) == 1


def test_latest_moves_by_itself_and_skips_pre_releases(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """The highest release is the latest; a pre-release only where there is no release."""
    for seed, version in enumerate(("2.0.0-rc.1", "1.9.0", "1.10.0", "3.0.0-alpha")):
        registry.publish(another(lora, tmp_path / version, seed), name="team/a", version=version)
        if seed == 0:
            assert registry.get_version("team/a").version == "2.0.0-rc.1"
    assert registry.get_version("team/a").version == "1.10.0"
    assert registry.get_version("team/a@latest").aliases == ("latest",)
    assert [v.version for v in registry.list_versions("team/a").items] == [
        "3.0.0-alpha",
        "2.0.0-rc.1",
        "1.10.0",
        "1.9.0",
    ]


def test_a_version_left_out_is_the_next_one(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """0.1.0 first, then the next patch."""
    versions = [
        registry.publish(another(lora, tmp_path / str(seed), seed), name="a").version.version for seed in range(3)
    ]
    assert versions == ["0.1.0", "0.1.1", "0.1.2"]


def test_aliases_move_and_are_found(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """An alias names a version until it is moved or removed."""
    registry.publish(lora, name="team/a", version="1.0.0")
    registry.publish(another(lora, tmp_path / "b", 3), name="team/a", version="2.0.0")
    assert registry.set_alias("team/a@1.0.0", "prod").aliases == ("prod",)
    assert registry.get_version("team/a@prod").version == "1.0.0"
    registry.set_alias("team/a@latest", "prod")
    assert registry.get_version("team/a@prod").version == "2.0.0"
    registry.delete_alias("team/a", "prod")
    with pytest.raises(VersionNotFoundError):
        registry.get_version("team/a@prod")
    for bad in ("latest", "1.0.0", "a b", "x:y"):
        with pytest.raises(UsageError):
            registry.set_alias("team/a", bad)


def test_a_digest_names_a_version(registry: LocalRegistry, lora: Path) -> None:
    """Whole or as a prefix; one that is not there is a typed error."""
    digest = registry.publish(lora, name="team/a").version.digest
    assert registry.get_version(f"team/a@{digest}").digest == digest
    assert registry.get_version(f"team/a@{digest[:20]}").digest == digest
    with pytest.raises(VersionNotFoundError):
        registry.get_version("team/a@sha256:" + "0" * 64)


def test_an_unknown_name_suggests_a_near_one(registry: LocalRegistry, lora: Path) -> None:
    """The same name in another namespace is offered, not taken."""
    registry.publish(lora, name="team/shout")
    with pytest.raises(AdapterNotFoundError, match="default/shout") as caught:
        registry.get_version("shout")
    assert "team/shout" in caught.value.remedy


@pytest.mark.parametrize("name", ["", "/a", "a/", "a/b/c", "../a", "a b", "a+b", "a@1", "a:1", "-a", "a..b", "x" * 97])
def test_bad_names_are_refused(registry: LocalRegistry, lora: Path, name: str) -> None:
    """Names that would be unreadable in a recipe or leave a folder raise UsageError, and nothing is stored."""
    with pytest.raises(UsageError):
        registry.publish(lora, name=name)
    assert registry.list_adapters().items == ()


@pytest.mark.parametrize("version", ["1", "1.0", "v1.0.0", "1.0.0+build", "01.0.0", "1.0.0-", "latest", "1.0.0-a..b"])
def test_bad_versions_are_refused(registry: LocalRegistry, lora: Path, version: str) -> None:
    """Only semantic versions without build metadata."""
    with pytest.raises(UsageError, match="semantic version"):
        registry.publish(lora, name="a", version=version)


identifiers = st.one_of(
    st.integers(0, 10**6).map(str), st.from_regex(r"[0-9]{0,2}[A-Za-z-][0-9A-Za-z-]{0,4}", fullmatch=True)
)
versions = st.tuples(st.tuples(*[st.integers(0, 10**6)] * 3), st.lists(identifiers, max_size=3))


def precedence(item: tuple[tuple[int, ...], list[str]]) -> tuple[object, ...]:
    """semver.org §11, written down as a key: an oracle of its own."""
    numbers, pre = item
    keys = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in pre)
    return (numbers, not pre, keys)


@given(versions, versions)
def test_sort_keys_order_versions_as_semver_does(
    a: tuple[tuple[int, ...], list[str]], b: tuple[tuple[int, ...], list[str]]
) -> None:
    """Text compared by bytes against the specification."""
    texts = [".".join(map(str, numbers)) + ("-" + ".".join(pre) if pre else "") for numbers, pre in (a, b)]
    keys = [Version(text).sort_key.encode() for text in texts]
    assert (keys[0] < keys[1]) == (precedence(a) < precedence(b))


def test_search_and_filters_find_by_word_name_and_base(
    registry: LocalRegistry, base: Path, lora: Path, tmp_path: Path
) -> None:
    """Every word must begin one that is there, in any case; signs are no words."""
    registry.add_base(base, name="base")
    registry.publish(lora, name="team/shout", base="base", description="Answers LOUDLY", tags=("style",))
    registry.publish(another(lora, tmp_path / "b", 2), name="lab/json", description="100% JSON")

    def found(text: str) -> list[str]:
        return [item.name for item in registry.search(text).items]

    assert found("loudly style") == ["team/shout"]
    assert found("loudly json") == []
    assert found("100%") == ["lab/json"]
    assert found("q_pro") == ["lab/json", "team/shout"]  # both words of q_proj, the newest first
    assert found("_") == []
    assert [item.name for item in registry.list_adapters(base="base").items] == ["team/shout"]
    assert [item.name for item in registry.list_adapters(namespace="lab").items] == ["lab/json"]
    assert registry.list_adapters(kind="ia3").items == ()


def test_pages_hold_everything_once(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """Following the cursor visits each adapter once, in order."""
    names = [f"team/a{index}" for index in range(5)] + ["z/b"]
    for index, name in enumerate(names):
        registry.publish(another(lora, tmp_path / str(index), index), name=name)
    seen, cursor = [], None
    while True:
        page = registry.list_adapters(limit=2, cursor=cursor)
        seen += [item.name for item in page.items]
        cursor = page.next
        if cursor is None:
            break
    assert seen == names


def test_a_base_has_one_name_and_a_name_one_base(registry: LocalRegistry, base: Path, tmp_path: Path) -> None:
    """Other weights under a name, or another name for the same weights, are conflicts; a repeat is a no-op."""
    import numpy as np

    assert registry.add_base(base, name="one").created is True
    assert registry.add_base(base, name="one").created is False
    with pytest.raises(NameTakenError, match="registered as 'one'"):
        registry.add_base(base, name="two")
    other = write_base(tmp_path / "other", {"w": np.ones((2, 2), np.float32)})
    with pytest.raises(NameTakenError, match="other weights"):
        registry.add_base(other, name="one")
    assert [item.name for item in registry.list_bases().items] == ["one"]


def test_a_moved_base_is_found_again(registry: LocalRegistry, base: Path, tmp_path: Path) -> None:
    """The same weights at a new place take over when the old place is gone, not before."""
    registry.add_base(base, name="one")
    copy = shutil.copytree(base, tmp_path / "copy")
    assert registry.add_base(copy, name="one").location == str(base)
    shutil.rmtree(base)
    assert registry.add_base(copy, name="one").location == str(copy)
    assert all(check.ok for check in registry.doctor() if check.name.startswith("base"))


def test_an_adapter_that_does_not_fit_the_base_it_names_is_refused(
    registry: LocalRegistry, base: Path, tmp_path: Path
) -> None:
    """Nothing is stored."""
    registry.add_base(base, name="base")
    wrong = write_lora(tmp_path / "wrong", {"model.layers.0.self_attn.q_proj": (8, 4)})
    with pytest.raises(IncompatibleError, match=r"expects \[8, 4\], the base has \[6, 4\]"):
        registry.publish(wrong, name="team/wrong", base="base")
    assert registry.list_adapters().items == ()
    assert not any(registry.layout.blobs.rglob("*")) or not registry.layout.blobs.exists()


def test_an_adapter_with_nan_is_refused(registry: LocalRegistry, tmp_path: Path) -> None:
    """Its tensor is named."""
    import numpy as np

    bad = np.full((2, 4), np.nan, np.float32)
    lora = write_lora(tmp_path / "nan", {"m": (6, 4)})
    from safetensors.numpy import load_file, save_file

    tensors = load_file(lora / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.m.lora_A.weight": bad}, lora / "adapter_model.safetensors")
    with pytest.raises(NonFiniteError, match=r"m\.lora_A\.weight"):
        registry.publish(lora, name="a")


def test_the_same_bytes_tied_to_a_base_are_a_new_version(registry: LocalRegistry, base: Path, lora: Path) -> None:
    """An unverified version stays what it is; tying it to weights makes the next one."""
    registry.add_base(base, name="base")
    first = registry.publish(lora, name="a").version
    second = registry.publish(lora, name="a", base="base").version
    assert (first.base_status, second.base_status) == (BaseStatus.UNVERIFIED, BaseStatus.VERIFIED)
    assert (first.version, second.version, first.digest) == ("0.1.0", "0.1.1", second.digest)
    assert registry.get_version("a@0.1.0").base_status is BaseStatus.UNVERIFIED


def test_pull_gives_the_published_bytes_back(registry: LocalRegistry, lora: Path, tmp_path: Path) -> None:
    """Config and weights, byte for byte; files that are no part of an adapter are not published."""
    (lora / "optimizer.pt").write_bytes(b"state")
    registry.publish(lora, name="a")
    registry.pull("a", tmp_path / "pulled")
    assert sorted(path.name for path in (tmp_path / "pulled").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for path in (tmp_path / "pulled").iterdir():
        assert path.read_bytes() == (lora / path.name).read_bytes()


def test_a_flipped_byte_in_the_store_is_refused(
    registry: LocalRegistry, base: Path, lora: Path, tmp_path: Path
) -> None:
    """On pull and on compose, and the output is not made."""
    from composer.recipe import parse_recipe

    registry.add_base(base, name="base")
    info = registry.publish(lora, name="a", base="base").version
    blob = registry.layout.blob(next(file.sha256 for file in info.files if file.name.endswith(".safetensors")))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with pytest.raises(BlobCorruptError):
        registry.pull("a", tmp_path / "pulled")
    with pytest.raises(BlobCorruptError):
        registry.compose(parse_recipe("base+a"), tmp_path / "out")
    assert not (tmp_path / "pulled").exists()
    assert not (tmp_path / "out").exists()


def test_names_without_a_namespace_live_in_default() -> None:
    """`a` is default/a, always."""
    assert adapter_name("a") == ("default", "a")
    assert adapter_name("team/a") == ("team", "a")


PUBLISH = """
import sys
from pathlib import Path
from composer.errors import ConflictError
from registry.services.local import open_registry
registry = open_registry(Path(sys.argv[1]))
try:
    print("won" if registry.publish(Path(sys.argv[2]), name="team/a", version="1.0.0").created else "same")
except ConflictError as error:
    print(error.code)
"""


def test_of_two_publishers_one_wins(home: Path, lora: Path, tmp_path: Path) -> None:
    """Processes that publish different bytes as one version at once: one winner, typed losers."""
    folders = [another(lora, tmp_path / str(seed), seed) for seed in range(4)]
    open_registry(home).close()
    processes = [
        subprocess.Popen([sys.executable, "-c", PUBLISH, home, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for folder in folders
    ]
    results = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert results == ["version-taken"] * 3 + ["won"]


def test_a_config_edited_after_publishing_does_not_change_the_version(registry: LocalRegistry, lora: Path) -> None:
    """The registry holds its own copy."""
    registry.publish(lora, name="a", version="1.0.0")
    edit_json(lora / "adapter_config.json", lora_alpha=99)
    assert registry.get_version("a").alpha == 4.0
    with pytest.raises(VersionTakenError):
        registry.publish(lora, name="a", version="1.0.0")


def test_a_base_may_have_a_namespace_and_shares_names_with_adapters(
    registry: LocalRegistry, tiny_llama: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    """``org/tiny`` is a base in every reference; a name that is taken by a base or an adapter is refused to the other."""
    registry.add_base(tiny_llama, name="org/tiny")
    registry.publish(tiny_lora, name="org/shout", base="org/tiny")
    registry.compose(parse_recipe("org/tiny+org/shout"), tmp_path / "out")
    with pytest.raises(NameTakenError):
        registry.publish(tiny_lora, name="org/tiny")
    with pytest.raises(NameTakenError):
        registry.add_base(tmp_path / "out", name="org/shout")
    for name in ("a/b/c", "/a", "a/", "a/.."):
        with pytest.raises(UsageError):
            registry.add_base(tiny_llama, name=name)
