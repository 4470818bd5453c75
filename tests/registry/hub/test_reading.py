"""Unmodified clients read from the service: huggingface_hub, transformers and peft with only HF_ENDPOINT set."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from composer.recipe import Dtype, parse_recipe
from registry.services.local import open_registry
from tests.registry.hub.conftest import Hub


@pytest.fixture(scope="module")
def version(hub: Hub) -> Any:
    """The version that `main` stands for."""
    registry = open_registry(hub.home)
    yield registry.get_version("team/shout")
    registry.close()


@pytest.fixture(scope="module")
def read(hub: Hub, version: Any) -> dict[str, Any]:
    """What huggingface_hub read."""
    found: dict[str, Any] = hub.client("read", version.digest)
    return found


def test_a_revision_is_a_version_an_alias_a_digest_or_a_commit(read: dict[str, Any], version: Any) -> None:
    """They all lead to the same files in the folder of one commit, which is the first 40 digits of the digest."""
    files = sorted(file.name for file in version.files)
    assert read["folders"] == {key: [version.digest[7:47], files] for key in read["folders"]}
    assert len(read["folders"]) == 7
    assert read["adapter"]["sha"] == version.digest[7:47]
    assert read["refs"] == dict.fromkeys(["1.0.0", "1.1.0", "2.0.0-rc.1", "prod"], version.digest[7:47])


def test_an_adapter_tells_its_base_by_name_and_by_hash(read: dict[str, Any], version: Any) -> None:
    """Tags that any client can filter by, and the base in the card under the name that it has here."""
    wanted = {
        "base_model:tiny",
        "base_model:adapter:tiny",
        f"base_hash:{version.base_fingerprint}",
        "peft",
        "kind:lora",
    }
    assert wanted | {"license:mit"} <= set(read["adapter"]["tags"])
    assert not any("/" in tag for tag in read["adapter"]["tags"])  # the trainer's folder is nobody's business
    assert read["adapter"]["card"] == "tiny"
    assert f"hash:{version.base_fingerprint}" in read["base"]["tags"]
    assert read["adapter"]["files"] == {file.name: file.size for file in version.files}


def test_a_base_is_served_from_the_files_that_were_registered(read: dict[str, Any], tiny_llama: Path) -> None:
    """The same bytes, and headers readable by ranges."""
    assert Path(read["weights"]).read_bytes() == (tiny_llama / "model.safetensors").read_bytes()
    assert sum(read["parameters"].values()) > 0
    assert read["base"]["files"] == sorted(path.name for path in tiny_llama.iterdir())


def test_trees_histories_and_checks(read: dict[str, Any], version: Any) -> None:
    """Trees list what versions hold; a version is a commit; what is not there is said not to be."""
    assert read["tree"] == sorted(file.name for file in version.files)
    assert read["paths"] == ["adapter_config.json"]
    assert read["commits"] == ["version 1.1.0"]  # the other versions hold the same files
    assert read["exists"] == [True, False, True, False, True, False]
    assert "team/nobody" in read["failures"][0]


def test_transformers_and_peft_load_by_name(hub: Hub, tmp_path: Path) -> None:
    """A base, an adapter on it and what was composed of them, by both libraries with one result."""
    registry = open_registry(hub.home)
    recipe = parse_recipe("tiny+team/shout", dtype=Dtype.FP32)
    assert registry.compose(recipe, tmp_path / "out", publish="team/loud").published == "team/loud"
    registry.close()
    found = hub.client("load", "tiny", "team/shout", COMPOSED="team/loud")
    assert found.pop("composed") < 1e-4
    assert found == {"adapter": 0.0, "changed": True}


def test_downloads_have_ranges_etags_and_heads(hub: Hub, version: Any) -> None:
    """206 with Content-Range, 304 for a known ETag, HEAD without a body, 416 beyond the end."""
    url = f"{hub.url}/team/shout/resolve/1.0.0/adapter_model.safetensors"
    whole = httpx.get(url)
    sha256 = next(file.sha256 for file in version.files if file.name == "adapter_model.safetensors")
    assert hashlib.sha256(whole.content).hexdigest() == sha256
    assert whole.headers["x-repo-commit"] == version.digest[7:47]
    part = httpx.get(url, headers={"Range": "bytes=8-15"})
    assert (part.status_code, part.content) == (206, whole.content[8:16])
    assert part.headers["content-range"] == f"bytes 8-15/{len(whole.content)}"
    head = httpx.head(url)
    assert (head.status_code, head.content, int(head.headers["content-length"])) == (200, b"", len(whole.content))
    assert head.headers["etag"] == whole.headers["etag"]
    assert httpx.get(url, headers={"If-None-Match": head.headers["etag"]}).status_code == 304
    assert httpx.get(url, headers={"Range": f"bytes={len(whole.content)}-"}).status_code == 416
