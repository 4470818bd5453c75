"""RemoteRegistry against a real service on a free port: the answers of the local registry, and its own failures."""

from __future__ import annotations

import inspect
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from composer import errors
from composer.errors import UsageError
from composer.recipe import parse_recipe
from registry.client import RemoteRegistry
from registry.errors import AdapterNotFoundError, NameTakenError, VersionTakenError
from registry.interface import Registry
from registry.transfer import ServiceReplyError, ServiceUnreachableError
from tests.support import add_words


@pytest.fixture
def remote(registry: Any) -> Iterator[RemoteRegistry]:
    """A client of a service over the empty registry `registry`."""
    import uvicorn

    from registry.api.app import create_app
    from registry.services.jobs import JobService

    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(registry, JobService(registry), max_upload_bytes=8 << 20)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        client = RemoteRegistry(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        yield client
        client.close()
        server.should_exit = True
        thread.join()


@pytest.fixture
def filled(remote: RemoteRegistry, tiny_llama: Path, tiny_lora: Path) -> RemoteRegistry:
    """A base and an adapter, uploaded."""
    remote.add_base(tiny_llama, name="tiny")
    remote.publish(tiny_lora, name="team/shout", base="tiny", tags=("loud",), description="it shouts")
    return remote


def replies(answer: Callable[[httpx.Request], httpx.Response]) -> RemoteRegistry:
    """A client whose service is a function."""
    return RemoteRegistry("http://service.test", httpx.MockTransport(answer))


def test_a_gguf_base_is_uploaded_as_its_file(remote: RemoteRegistry, tmp_path: Path) -> None:
    """Under its own name, and without a config.json: the service hashes and reads what lies here."""
    from tests.composer.test_gguf import small_model, write_gguf

    folder = write_gguf(tmp_path / "tiny-gguf", small_model(), ("Q4_0",))
    (folder / "config.json").unlink()
    info = remote.add_base(folder)
    assert (info.name, info.dtype, info.architecture) == ("tiny-gguf", "gguf", "LlamaForCausalLM")
    remote.compose(parse_recipe("tiny-gguf"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_it_has_the_whole_protocol() -> None:
    """Every method of Registry, with the same parameters."""
    wanted = {name: value for name, value in vars(Registry).items() if inspect.isfunction(value) and name[0] != "_"}
    assert len(wanted) > 15
    for name, function in wanted.items():
        found = inspect.signature(getattr(RemoteRegistry, name))
        assert found.parameters == inspect.signature(function).parameters, name


def test_a_composition_is_published_over_rest(filled: RemoteRegistry, registry: Any, tmp_path: Path) -> None:
    """One compose job, and one that publishes what it made; the files come back too."""
    result = filled.compose(parse_recipe("tiny+team/shout"), tmp_path / "out", publish="team/loud")
    assert result.published == "team/loud"
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert registry.get_base("team/loud").parent == "tiny"
    assert sorted(job.kind for job in filled.list_jobs().items) == ["base", "compose", "publication"]


def test_reads_equal_those_of_the_local_registry(filled: RemoteRegistry, registry: Any) -> None:
    """client(service(local)) is local."""
    recipe = parse_recipe("tiny+team/shout:0.5")
    reads: dict[str, Callable[[Any], Any]] = {
        "bases": lambda r: r.list_bases(),
        "base": lambda r: r.get_base("tiny"),
        "list": lambda r: r.list_adapters(namespace="team", kind="lora", base="tiny"),
        "search": lambda r: r.search("loud shouts"),
        "version": lambda r: r.get_version("team/shout@latest"),
        "versions": lambda r: r.list_versions("team/shout"),
        "compatible": lambda r: r.compatible("tiny"),
        "bases_for": lambda r: r.bases_for("team/shout"),
        "check": lambda r: r.check("team/shout", "tiny"),
        "plan": lambda r: r.plan(recipe),
        "inspect": lambda r: r.inspect("team/shout@0.1.0"),
        "inspect base": lambda r: r.inspect("tiny"),
    }
    for name, read in reads.items():
        assert read(filled) == read(registry), name
    local, remote = ([check for check in r.doctor() if check.name != "disk"] for r in (registry, filled))
    assert remote[1:] == local  # free space changes from one call to the next


def test_pages_go_on_where_they_ended(filled: RemoteRegistry, other_lora: Path) -> None:
    """One item a page gives what one page of all gives."""
    filled.publish(other_lora, name="team/json", base="tiny")
    first = filled.list_adapters(limit=1)
    second = filled.list_adapters(limit=1, cursor=first.next)
    assert (*first.items, *second.items) == filled.list_adapters().items
    assert second.next is None


def test_aliases_over_rest(filled: RemoteRegistry) -> None:
    """Set, read, delete; a bare name lives in the default namespace."""
    assert "prod" in filled.set_alias("team/shout", "prod").aliases
    assert filled.get_version("team/shout@prod").version == "0.1.0"
    filled.delete_alias("team/shout", "prod")
    with pytest.raises(errors.NotFoundError):
        filled.get_version("team/shout@prod")
    with pytest.raises(AdapterNotFoundError, match="default/shout"):
        filled.get_version("shout")


def test_uploads_report_every_byte(remote: RemoteRegistry, tiny_llama: Path) -> None:
    """Progress rises to the sum of the files."""
    seen: list[tuple[str, int, int]] = []
    assert remote.add_base(tiny_llama, name="tiny", progress=lambda *state: seen.append(state)).created
    done = [count for step, count, _ in seen if step == "uploading"]
    totals = {total for step, _, total in seen if step == "uploading"}
    assert done == sorted(done)
    assert [done[-1]] == list(totals)
    assert done[-1] > (tiny_llama / "model.safetensors").stat().st_size


def test_a_base_that_is_a_folder_is_hashed_here(remote: RemoteRegistry, tiny_llama: Path, tiny_lora: Path) -> None:
    """The service learns the fingerprint and never the path; the version is pending until the base is there."""
    result = remote.publish(tiny_lora, name="team/shout", base=str(tiny_llama))
    assert result.version.base_status.value == "pending"
    assert result.version.base_fingerprint == remote.add_base(tiny_llama, name="tiny").fingerprint
    assert remote.get_version("team/shout").base_status.value == "verified"


def test_pull_is_whole_or_nothing(filled: RemoteRegistry, tiny_lora: Path, tmp_path: Path) -> None:
    """The same bytes; a taken folder is a conflict and stays as it is."""
    info = filled.pull("team/shout", tmp_path / "out")
    for file in info.files:
        assert (tmp_path / "out" / file.name).read_bytes() == (tiny_lora / file.name).read_bytes()
    with pytest.raises(errors.ConflictError):
        filled.pull("team/shout", tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_damage_on_the_way_is_noticed(filled: RemoteRegistry, tmp_path: Path) -> None:
    """One flipped byte in a download: CorruptFileError, and no folder, not even a hidden one."""
    network = httpx.HTTPTransport()

    def flip(request: httpx.Request) -> httpx.Response:
        answer = network.handle_request(request)
        body = bytearray(answer.read())
        if request.url.path.endswith("safetensors"):
            body[-1] ^= 1
        return httpx.Response(answer.status_code, headers=answer.headers, content=bytes(body))

    damaged = RemoteRegistry(filled.url, httpx.MockTransport(flip))
    for take in (
        lambda: damaged.pull("team/shout", tmp_path / "out"),
        lambda: damaged.compose(parse_recipe("tiny+team/shout"), tmp_path / "out"),
    ):
        with pytest.raises(errors.CorruptFileError, match="safetensors"):
            take()
        assert not list(tmp_path.glob("*out*"))
        assert not list(tmp_path.glob(".out*"))


def test_compose_downloads_what_the_local_registry_composes(
    filled: RemoteRegistry, registry: Any, tmp_path: Path
) -> None:
    """Byte for byte, record included; a second time it is known to be there."""
    recipe = parse_recipe("tiny+team/shout:0.5")
    steps: list[str] = []
    far = filled.compose(recipe, tmp_path / "far", progress=lambda step, *_: steps.append(step))
    near = registry.compose(recipe, tmp_path / "near")
    names = sorted(path.name for path in (tmp_path / "near").iterdir())
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == names
    for name in names:
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()
    assert (far.output_digest, far.record, Path(far.out)) == (near.output_digest, near.record, tmp_path / "far")
    assert "downloading" in steps
    assert filled.compose(recipe, tmp_path / "far").cached
    with pytest.raises(errors.ConflictError):
        filled.compose(parse_recipe("tiny+team/shout"), tmp_path / "far")
    assert not filled.compose(parse_recipe("tiny+team/shout"), tmp_path / "far", replace=True).cached
    (tmp_path / "taken").mkdir()
    with pytest.raises(errors.ConflictError):
        filled.compose(recipe, tmp_path / "taken")


def test_a_text_is_probed_where_the_model_is_composed(
    remote: RemoteRegistry, registry: Any, tiny_llama: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    """The record has the perplexities that the local registry measures; another text is another job."""
    base = add_words(shutil.copytree(tiny_llama, tmp_path / "base"), 64)
    remote.add_base(base, name="worded")
    remote.publish(tiny_lora, name="team/shout", version="1.0.0", base="worded")
    recipe = parse_recipe("worded+team/shout")
    found = remote.compose(recipe, tmp_path / "remote", probe="w1 w2 w3 w4").record
    assert found == registry.compose(recipe, tmp_path / "local", probe="w1 w2 w3 w4").record
    assert found["probe"]["tokens"] == 3
    jobs = {remote.submit(recipe, probe=text).id for text in ("w1 w2 w3 w4", "w1 w2 w3 w4", "w1 w2", None)}
    assert len(jobs) == 3
    with pytest.raises(UsageError, match="tokens"):
        remote.compose(recipe, tmp_path / "short", probe="w1")


def test_an_interrupt_cancels_the_job(filled: RemoteRegistry, registry: Any, tmp_path: Path) -> None:
    """Ctrl-C while waiting: the job is asked to stop, and nothing is written."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    asked: list[str] = []
    network = httpx.HTTPTransport()

    def note(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        answer = network.handle_request(request)
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.read())

    watched = RemoteRegistry(filled.url, httpx.MockTransport(note))
    with pytest.raises(KeyboardInterrupt):
        watched.compose(parse_recipe("tiny+team/shout"), tmp_path / "out", progress=interrupt)
    assert asked == ["POST", "DELETE"]
    assert list(tmp_path.glob("*out*")) == []


def test_typed_errors_cross_the_network(
    filled: RemoteRegistry, tiny_llama: Path, tiny_lora: Path, other_lora: Path, tmp_path: Path
) -> None:
    """The same class, with expected, found and remedy, as the local registry raises."""
    with pytest.raises(AdapterNotFoundError) as missing:
        filled.get_version("team/nobody")
    assert missing.value.remedy
    with pytest.raises(VersionTakenError) as taken:
        filled.publish(other_lora, name="team/shout", version="0.1.0", base="tiny")
    assert str(taken.value.expected).startswith("sha256:")
    with pytest.raises(NameTakenError):
        filled.add_base(tiny_llama, name="other")
    with pytest.raises(errors.NotFoundError, match=r"config\.json"):
        filled.add_base(tiny_lora)
    for refused in (
        lambda: filled.check("./x", "tiny"),
        lambda: filled.check("team/shout", "./a/b"),
        lambda: filled.get_base("../x"),
        lambda: filled.compose(parse_recipe("./x+team/shout"), tmp_path / "out"),
    ):
        with pytest.raises(errors.PolicyError):
            refused()


def test_a_failed_job_raises_its_error(registry: Any, filled: RemoteRegistry, tmp_path: Path) -> None:
    """What the composer raised on the service is raised here, and nothing is written."""
    failure = errors.NonFiniteError("the weights overflow", found="inf", remedy="use fp32")
    registry.compose = lambda *_, **__: (_ for _ in ()).throw(failure)
    with pytest.raises(errors.NonFiniteError) as raised:
        filled.compose(parse_recipe("tiny+team/shout"), tmp_path / "out")
    assert raised.value.as_dict() == failure.as_dict()
    assert list(tmp_path.glob("*out*")) == []


def test_an_upload_that_is_too_large_is_told_so(remote: RemoteRegistry, tmp_path: Path, tiny_llama: Path) -> None:
    """The service's 413 arrives although it stopped reading: a policy error, not a broken connection."""
    folder = tmp_path / "large"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "tokenizer.json").write_bytes(b" " * (12 << 20))
    with pytest.raises(errors.PolicyError, match="too large"):
        remote.add_base(folder)


def test_nobody_there_is_told_with_the_url() -> None:
    """Connection refused, a URL that is none, and a connection that breaks."""
    with pytest.raises(ServiceUnreachableError, match=r"127\.0\.0\.1:9") as refused:
        RemoteRegistry("http://127.0.0.1:9").list_bases()
    assert "registry serve" in str(refused.value.remedy)
    for url in ("not a url", "ftp://x", "http://host:port", ""):
        with pytest.raises(errors.UsageError):
            RemoteRegistry(url).list_bases()

    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("reset", request=request)

    with pytest.raises(ServiceUnreachableError, match="broke"):
        replies(broken).list_bases()


@pytest.mark.parametrize("status", [200, 302, 404, 502])
def test_a_stranger_at_the_url_is_recognised(status: int) -> None:
    """A page of HTML is not taken for an answer, whatever its status."""
    stranger = replies(lambda _: httpx.Response(status, html="<h1>Welcome</h1>"))
    with pytest.raises(ServiceReplyError):
        stranger.get_base("tiny")
    with pytest.raises(ServiceReplyError):
        stranger.doctor()


def test_an_error_of_a_newer_service_keeps_its_category() -> None:
    """An unknown code falls back to the class of its category; the message stays."""
    body = {"error": {"code": "brand-new", "category": "policy", "message": "no", "fields": {"message": "x", "a": 1}}}
    with pytest.raises(errors.PolicyError, match="no") as raised:
        replies(lambda _: httpx.Response(403, content=json.dumps(body))).list_bases()
    assert raised.value.fields == {"a": 1, "code": "brand-new"}


def test_a_service_cannot_write_outside_the_folder(filled: RemoteRegistry, tmp_path: Path) -> None:
    """A version whose file names climb out is refused."""
    info = filled.get_version("team/shout").model_dump(mode="json")
    info["files"][0]["name"] = "../escaped"
    evil = replies(
        lambda request: httpx.Response(
            200, content=b"x" if "/files/" in request.url.path else json.dumps(info).encode()
        )
    )
    with pytest.raises(errors.UsageError):
        evil.pull("team/shout", tmp_path / "out")
    assert not (tmp_path / "escaped").exists()
    assert not (tmp_path / "out").exists()
