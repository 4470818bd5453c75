"""Examples for the OpenAPI: of every parameter, body and answer, all of one small world.

    add_examples(openapi)    by the name of a parameter, and by the schema of a body or an answer

Answers are made of the schemas themselves, so an example that is no longer valid fails when it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from composer.recipe import parse_recipe
from registry import __version__
from registry.access import Role, Scope
from registry.api.failures import ErrorBody, ErrorFields
from registry.api.schemas import DoctorReport, Health, Whoami
from registry.schemas import (
    AuditEntry,
    BaseFit,
    BaseInfo,
    BaseStatus,
    Collected,
    CompatibleAdapter,
    DoctorCheck,
    FileInfo,
    JobInfo,
    JobState,
    Level,
    LicenceLevel,
    LicenceVerdict,
    LineageEdge,
    LineageEvidence,
    LineageInfo,
    Member,
    NamespaceInfo,
    NewToken,
    PlanInfo,
    PlannedAdapter,
    PublishResult,
    Readiness,
    Reason,
    Relation,
    SignatureInfo,
    SignedBundle,
    StoreCheck,
    TokenInfo,
    Verdict,
    VersionInfo,
)

__all__ = ["JOB", "PARAMETERS", "add_examples"]

FINGERPRINT = "wf1:ad323b994961eb34f3c4ad5fce6b50dc2e8f9962dfbe9a35d8bf3d6083b6e06b"
DIGEST = "sha256:a92e03b02e77f3f0f0d0c9e2d4c1b0a5968778695a4b3c2d1e0f9a8b7c6d5e4f"
JOB = "0f8fad5bd9cb469fa16570867728950e"
TOKEN = "3f1c9a7be204"
AT = datetime(2026, 1, 15, 12, tzinfo=UTC)
KEY = "0d5045b3ecb5a7b28fd7cf5997cf43773c3650c530019f3fe648e5c77a7e10fe"
BUNDLE = {
    "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
    "verificationMaterial": {"publicKey": {"hint": KEY}, "tlogEntries": []},
    "dsseEnvelope": {
        "payload": "eyJfdHlwZSI6Imh0dHBzOi8vaW4tdG90by5pby9TdGF0ZW1lbnQvdjEifQ==",
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": "MEUCIQDXJ0mU", "keyid": ""}],
    },
}
RECIPE = "smollm2+team/shout@1.0.0:0.7"

PARAMETERS: Mapping[str, Any] = {
    "adapter": "team/shout@1.0.0", "alias": "prod", "base": "smollm2", "filename": "adapter_config.json",
    "job_id": JOB, "kind": "lora", "license": "apache-2.0", "limit": 20, "name": "shout", "namespace": "team",
    "q": "loud answers", "rank": 16, "subject": "alice", "tag": "style", "target": "team/shout@1.0.0",
    "task": "CAUSAL_LM", "token_id": TOKEN, "version": "1.0.0", "level": "exact", "state": "succeeded",
    "background": True, "accept_licences": False, "repair": False,
}  # fmt: skip
BODIES: Mapping[str, Any] = {
    "AliasRequest": {"version": "1.0.0"},
    "CollectRequest": {"grace_days": 7, "keep_jobs_days": 30, "dry_run": True},
    "DeltaRequest": {"finetune": "smollm2-chat", "base": "smollm2"},
    "DeprecationRequest": {"reason": "2.0.0 answers shorter", "successor": "team/shout@2.0.0"},
    "ExtractRequest": {"finetune": "smollm2-chat", "base": "smollm2", "rank": 32},
    "ImportRequest": {"ref": "hf://HuggingFaceTB/SmolLM2-135M-Instruct@main", "name": "smollm2"},
    "MemberRequest": {"role": "publisher"},
    "PublicationRequest": {"name": "team/loud-smollm2"},
    "ReasonRequest": {"reason": "trained on the wrong data"},
    "RecipeRequest": {"recipe": RECIPE, "method": "linear", "export": "safetensors"},
    "ComposeRequest": {"recipe": RECIPE, "export": "safetensors", "probe": "The quick brown fox jumps over the dog."},
    "ProbedRecipe": {
        "recipe": {"base": "smollm2", "adapters": [{"ref": "team/shout"}]},
        "probe": "The quick brown fox jumps over the dog.",
    },
    "ResizeRequest": {"ref": "team/shout@1.0.0", "energy": 0.99},
    "RestoreRequest": {"ref": "team/chat-delta@1.0.0", "base": "smollm2"},
    "SignatureRequest": {"bundle": BUNDLE},
    "TokenRequest": {"name": "ci of team", "subject": "repo:acme/train", "scopes": ["publish"], "namespaces": ["team"]},
    "VisibilityRequest": {"private": True},
}
FORMS: Mapping[str, Mapping[str, Any]] = {
    "/api/v1/bases": {"name": "smollm2", "license": "apache-2.0"},
    "/api/v1/adapters": {"name": "team/shout", "version": "1.0.0", "base": "smollm2", "tags": ["style"]},
}


def _answers() -> dict[str, BaseModel]:
    """One answer of each schema, by its name."""
    base = BaseInfo(
        name="smollm2", fingerprint=FINGERPRINT, tensor_root="1" * 64, value_root="2" * 64, layout_digest="3" * 64,
        config_digest="4" * 64, tokenizer_digest="5" * 64, chat_template_digest="6" * 64,
        architecture="LlamaForCausalLM", dtype="BF16", parameters=134_515_008, tensors=272, nbytes=269_030_016,
        license="apache-2.0", location="/models/smollm2", created_at=AT,
    )  # fmt: skip
    file = FileInfo(name="adapter_config.json", size=904, sha256="7" * 64)
    version = VersionInfo(
        name="team/shout", version="1.0.0", digest=DIGEST, kind="lora", rank=16, alpha=32.0,
        target_modules=("q_proj", "v_proj"), parameters=921_600, nbytes=1_848_000, base_status=BaseStatus.VERIFIED,
        base_fingerprint=FINGERPRINT, base_name="HuggingFaceTB/SmolLM2-135M-Instruct", base="smollm2",
        license="apache-2.0", tags=("style",), description="Answers in capitals.", task="CAUSAL_LM", downloads=42,
        aliases=("latest", "prod"), files=(file,), created_at=AT,
    )  # fmt: skip
    exact = Verdict(level=Level.EXACT, reasons=(Reason(code="exact", message="trained on these weights"),))
    shared = LineageEvidence(same_layout=True, tensors=211, shared_tensors=190, shared_parameters=0.93)
    child = LineageEdge(
        name="smollm2-chat", fingerprint="wf1:" + "8" * 64, depth=1, parent="smollm2", relation=Relation.FINETUNE,
        evidence=shared, verified=True,
    )  # fmt: skip
    token = TokenInfo(
        id=TOKEN, name="ci of team", subject="repo:acme/train", scopes=(Scope.PUBLISH,), namespaces=("team",),
        created_at=AT, expires_at=AT.replace(month=4),
    )  # fmt: skip
    check = DoctorCheck(name="database", ok=True, detail="sqlite, revision 0006")
    recipe = parse_recipe(RECIPE)
    found = (
        base,
        file,
        version,
        exact,
        token,
        PublishResult(version=version, created=True),
        CompatibleAdapter(adapter=version, verdict=exact),
        BaseFit(base=base, verdict=exact),
        SignatureInfo(key=KEY, subject="alice", created_at=AT),
        SignedBundle(key=KEY, subject="alice", created_at=AT, bundle=BUNDLE),
        LineageInfo(name="smollm2", ancestors=(), descendants=(child,), suggestions=()),
        JobInfo(
            id=JOB,
            kind="compose",
            title=RECIPE,
            owner="alice",
            state=JobState.RUNNING,
            recipe=recipe,
            step="merging",
            bytes_done=134_515_008,
            bytes_total=269_030_016,
            attempts=1,
            created_at=AT,
            started_at=AT,
        ),
        PlanInfo(
            recipe=recipe,
            recipe_text=RECIPE,
            base="smollm2",
            base_fingerprint=FINGERPRINT,
            adapters=(
                PlannedAdapter(
                    ref="team/shout@1.0.0", version="1.0.0", digest=DIGEST, weight=0.7, verdict=exact, tensors=60
                ),
            ),
            accepted=True,
            licences=LicenceVerdict(level=LicenceLevel.CLEAR),
            touched=60,
            total=272,
            nbytes=269_030_016,
            peak_bytes=33_554_432,
            files={"model.safetensors": 269_060_552},
        ),
        NewToken(token=f"ar_{TOKEN}_…", info=token),
        NamespaceInfo(name="team", members=(Member(subject="alice", role=Role.OWNER),)),
        AuditEntry(id=1, at=AT, subject="alice", token=TOKEN, action="publish", target="team/shout@1.0.0"),
        Collected(dry_run=True, blobs=3, uploads=0, compositions=1, jobs=2, records=0, nbytes=271_000_000),
        StoreCheck(files=812, nbytes=3_400_000_000),
        Whoami(subject="alice", scopes=(Scope.PUBLISH,), namespaces=("team",), token=TOKEN),
        DoctorReport(ok=True, checks=(check,)),
        Health(version=__version__),
        Readiness(ready=True, database=True, migrations=True, store=True),
    )
    return {type(item).__name__: item for item in found}


FAILURE = ErrorBody(
    error=ErrorFields(
        code="adapter-not-found",
        category="not-found",
        message="no adapter is named team/shuot",
        expected=["team/shout"],
        found="team/shuot",
        remedy="did you mean team/shout?",
    )
)


def add_examples(openapi: dict[str, Any]) -> dict[str, Any]:
    """`openapi` with examples wherever a value can be given or comes back."""
    answers = {name: item.model_dump(mode="json", exclude_unset=True) for name, item in _answers().items()}
    answers["ErrorBody"] = FAILURE.model_dump(mode="json", exclude_unset=True)
    for path, operation in _operations(openapi):
        for parameter in operation.get("parameters", ()):
            value = "smollm2" if path.startswith("/api/v1/bases") and parameter["name"] == "name" else None
            value = PARAMETERS.get(parameter["name"]) if value is None else value
            if value is not None:
                parameter["example"] = value
        for kind, content in operation.get("requestBody", {}).get("content", {}).items():
            example = FORMS[path] if kind.startswith("multipart/") else BODIES[_schema_name(content["schema"])]
            content["example"] = example
        for response in operation["responses"].values():
            content = response.get("content", {}).get("application/json")
            if content is not None and (example := _answer(_schema_name(content["schema"]), answers)) is not None:
                content["example"] = example
    return openapi


def _operations(openapi: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, operations in openapi["paths"].items():
        for operation in operations.values():
            yield path, operation


def _schema_name(schema: Mapping[str, Any]) -> str:
    """The name of a schema, or of the first one of a choice; empty for one without."""
    found = schema.get("$ref") or next((item.get("$ref", "") for item in schema.get("anyOf", ())), "")
    return str(found).rpartition("/")[2]


def _answer(name: str, answers: Mapping[str, Any]) -> Any:
    if name.startswith("Page_"):
        return {"items": [answers[name.removeprefix("Page_").rstrip("_")]], "next": None}
    return answers.get(name)
