"""Unmodified clients find adapters by their base's name, its hash and any tag; and `hf` does it all from a shell."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from registry.services.local import open_registry
from tests.registry.hub.conftest import Hub, serve


@pytest.fixture(scope="module")
def shelf(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_lora: Path, other_lora: Path
) -> Iterator[Hub]:
    """A base, three adapters on it, and one whose base is a name."""
    folder = tmp_path_factory.mktemp("shelf")
    registry = open_registry(folder / "home")
    registry.add_base(tiny_llama, name="tiny")
    registry.publish(tiny_lora, name="team/shout", base="tiny", tags=("loud",))
    registry.publish(other_lora, name="team/whisper", base="tiny")
    registry.publish(other_lora, name="lab/json", base="tiny", tags=("loud",))
    registry.publish(other_lora, name="lab/json", tags=("quiet",), read_paths=False)  # the latest has no hash
    for out in ("one", "two"):
        registry.pull("team/whisper", folder / out)
    registry.close()
    yield from serve(folder / "home", folder / "clients")


def test_filters_are_tags_and_the_tags_tell_the_base(shelf: Hub) -> None:
    """By name and by hash of the base, by the card's tags, by author and words; all of them together."""
    registry = open_registry(shelf.home)
    fingerprint = registry.get_base("tiny").fingerprint
    registry.close()
    found = shelf.client("listing", fingerprint)
    adapters = ["lab/json", "team/shout", "team/whisper"]
    assert found["all"] == [*adapters, "tiny"]
    assert found["limit"] == adapters[:2]
    assert found["author"] == found["base"] == found["hash"] == adapters[1:]
    assert found["search"] == found["both"] == found["tag"] == ["team/shout"]
    assert (found["peft"], found["bases"]) == (adapters, ["tiny"])
    assert found["other"] == found["none"] == []
    assert found["created"] == ["lab/json", "team/whisper", "team/shout", "tiny"]
    assert found["changed"] == ["lab/json", "team/whisper", "team/shout"]
    assert found["downloads"] == ["team/whisper", "lab/json", "team/shout", "tiny"]
    assert found["counts"] == {"team/whisper": 2, "lab/json": 0, "team/shout": 0, "tiny": 0}
    assert "no filter by 'pipeline_tag'" in found["task"]
    assert {"loud", "kind:lora", "base_model:adapter:tiny"} <= set(found["tags"]["team/shout"])


def test_pages_lead_on_until_the_end(shelf: Hub) -> None:
    """One item a page gives what one page of all gives; each page names the next by a link."""
    for order in ("", "&sort=createdAt", "&sort=lastModified", "&sort=downloads&direction=-1"):
        whole = httpx.get(f"{shelf.url}/api/models?limit=100{order}")
        url, pages = f"{shelf.url}/api/models?limit=1{order}", []
        while url:
            page = httpx.get(url)
            pages += page.json()
            url = page.links.get("next", {}).get("url", "")
        assert pages == whole.json()
        assert len(pages) >= 4
    for query in (
        "cursor=x:y",
        "cursor=date:1",
        "sort=createdAt&cursor=adapter:team/shout",
        "sort=size",
        "direction=1",
    ):
        assert httpx.get(f"{shelf.url}/api/models?{query}").status_code == 400


def test_hf_lists_downloads_and_uploads(shelf: Hub, tmp_path: Path, other_lora: Path) -> None:
    """`hf models ls`, `hf download` and `hf upload`, as a person types them; a refusal says why."""
    listed = shelf.hf("models", "ls", "--filter", "base_model:adapter:tiny", "--format", "json")
    assert "team/shout" in listed.stdout, listed.stderr
    done = shelf.hf("download", "team/shout", "--local-dir", tmp_path / "shout")
    assert done.returncode == 0, done.stderr
    folder = Path(shutil.copytree(other_lora, tmp_path / "new"))
    done = shelf.hf("upload", "team/new", folder, HF_TOKEN="hf_anything")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shout" / "adapter_model.safetensors").is_file()
    (folder / "adapter_config.json").write_text('{"peft_type": "UNHEARD_OF"}')
    done = shelf.hf("upload", "team/new", folder)
    assert done.returncode != 0
    assert "UNHEARD_OF" in done.stderr + done.stdout
