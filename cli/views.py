"""Each noun as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cli.output import block, clean, short, size, table
from registry.schemas import (
    AuditEntry,
    BaseCheck,
    BaseFit,
    BaseInfo,
    Collected,
    CompatibleAdapter,
    CompositionInfo,
    ConversionInfo,
    DeltaInfo,
    DoctorCheck,
    FileInfo,
    JobInfo,
    LineageInfo,
    NamespaceInfo,
    PlanInfo,
    Screening,
    StoreCheck,
    TokenInfo,
    Verdict,
    Verification,
    VersionInfo,
)

__all__ = [
    "audit_table",
    "base_block",
    "base_check_block",
    "base_table",
    "checks_table",
    "collected_block",
    "compatible_table",
    "composition_block",
    "conversion_block",
    "delta_block",
    "fits_table",
    "inspection",
    "job_block",
    "job_table",
    "lineage_table",
    "namespace_table",
    "plan_block",
    "store_check_block",
    "template_lines",
    "token_table",
    "verdict_lines",
    "verification_block",
    "version_block",
    "version_table",
]

WORST = 10


def base_table(bases: Sequence[BaseInfo]) -> str:
    """One line a base."""
    rows = [
        (base.name, short(base.fingerprint), base.architecture, base.dtype, f"{base.parameters:,}", size(base.nbytes))
        for base in bases
    ]
    headers = ("NAME", "FINGERPRINT", "ARCHITECTURE", "DTYPE", "PARAMETERS", "SIZE")
    return table(headers, rows, "no bases yet: register one with 'registry base add PATH'")


def base_block(base: BaseInfo) -> str:
    """All of a base."""
    return block(
        [
            ("name", base.name),
            ("fingerprint", base.fingerprint),
            ("architecture", base.architecture),
            ("dtype", base.dtype),
            ("parameters", f"{base.parameters:,} in {base.tensors} tensors"),
            ("size", size(base.nbytes)),
            ("parent", f"{base.parent} ({base.relation})" if base.parent else None),
            ("license", base.license),
            ("location", base.location),
            ("tokenizer", base.tokenizer_digest),
            ("chat template", base.chat_template_digest),
            ("tensor root", base.tensor_root),
            ("value root", base.value_root),
            ("layout", base.layout_digest),
            ("config", base.config_digest),
            ("registered", f"{base.created_at:%Y-%m-%d %H:%M:%S} UTC"),
        ]
    )


def base_check_block(check: BaseCheck) -> str:
    """Whether it is intact, and what is not."""
    return block(
        [
            ("name", check.name),
            ("intact", "yes" if check.intact else "no"),
            ("fingerprint", check.fingerprint),
            ("found", None if check.intact else check.found),
            ("changed", check.changed),
        ]
    )


def _done(job: JobInfo) -> str | None:
    return f"{size(job.bytes_done)} of {size(job.bytes_total)}" if job.bytes_total else None


def job_table(jobs: Sequence[JobInfo]) -> str:
    """One line a job."""
    rows = [
        (job.id, job.kind, job.state.value, job.step, _done(job), f"{job.created_at:%Y-%m-%d %H:%M:%S}", job.title)
        for job in jobs
    ]
    return table(("JOB", "KIND", "STATE", "STEP", "DONE", "SUBMITTED", "WHAT"), rows, "no jobs")


def job_block(job: JobInfo) -> str:
    """All of a job, with its error or what came of it."""
    error = job.error or {}
    return block(
        [
            ("job", job.id),
            ("kind", job.kind),
            ("what", job.title),
            ("state", job.state.value),
            ("step", job.step),
            ("done", _done(job)),
            ("attempts", job.attempts),
            ("submitted", f"{job.created_at:%Y-%m-%d %H:%M:%S} UTC"),
            ("finished", job.finished_at and f"{job.finished_at:%Y-%m-%d %H:%M:%S} UTC"),
            ("error", error.get("message")),
            ("remedy", error.get("remedy")),
            ("digest", getattr(job.result, "output_digest", None) or getattr(job.result, "fingerprint", None)),
        ]
    )


def token_table(tokens: Sequence[TokenInfo]) -> str:
    """One line a token."""
    rows = [
        (
            token.id,
            token.subject,
            ", ".join(token.scopes),
            "all" if token.namespaces is None else ", ".join(token.namespaces),
            "revoked" if token.revoked_at else f"{token.expires_at:%Y-%m-%d}",
            token.last_used_at and f"{token.last_used_at:%Y-%m-%d %H:%M}",
            token.name,
        )
        for token in tokens
    ]
    headers = ("TOKEN", "SUBJECT", "SCOPES", "NAMESPACES", "EXPIRES", "LAST USED", "NAME")
    return table(headers, rows, "no tokens")


def namespace_table(namespaces: Sequence[NamespaceInfo]) -> str:
    """One line a member."""
    rows = [(item.name, member.subject, member.role.value) for item in namespaces for member in item.members]
    return table(("NAMESPACE", "SUBJECT", "ROLE"), rows, "no namespace has members")


def audit_table(entries: Sequence[AuditEntry]) -> str:
    """One line an entry."""
    rows = [
        (f"{entry.at:%Y-%m-%d %H:%M:%S}", entry.subject, entry.token, entry.action, entry.target,
         ", ".join(f"{name}={value}" for name, value in entry.detail.items() if value is not None))
        for entry in entries
    ]  # fmt: skip
    return table(("AT", "SUBJECT", "TOKEN", "ACTION", "TARGET", "DETAIL"), rows, "nothing was changed yet")


def lineage_table(line: LineageInfo) -> str:
    """One line a relative, the farthest ancestor first."""
    rows = []
    lines = (("ancestor", line.ancestors[::-1]), ("descendant", line.descendants), ("suggested", line.suggestions))
    for what, edges in lines:
        for edge in edges:
            share = f"{edge.evidence.shared_parameters:.1%}" if edge.evidence else None
            how = f"{edge.relation} of {edge.parent}" if edge.parent else None
            rows.append((what, edge.depth or None, edge.name, how, share, "yes" if edge.verified else None))
    headers = ("", "STEPS", "BASE", "DECLARED", "SHARED WEIGHTS", "VERIFIED")
    return table(headers, rows, f"{line.name} has no relatives")


def collected_block(found: Collected) -> str:
    """What went, or would go."""
    return block(
        [
            ("would remove" if found.dry_run else "removed", size(found.nbytes)),
            ("stored files", found.blobs),
            ("uploads", found.uploads),
            ("compositions", found.compositions),
            ("jobs", found.jobs),
            ("records", found.records),
        ]
    )


def _base_of(version: VersionInfo) -> str:
    name = version.base or version.base_name or short(version.base_fingerprint)
    return name if version.base_status.value == "verified" else f"{name} ({version.base_status.value})"


def version_table(versions: Sequence[VersionInfo], empty: str) -> str:
    """One line a version."""
    rows = [
        (
            item.name,
            item.version,
            item.kind,
            item.rank,
            _base_of(item),
            size(item.nbytes),
            short(item.digest),
            ", ".join(item.aliases),
        )
        for item in versions
    ]
    return table(("NAME", "VERSION", "KIND", "RANK", "BASE", "SIZE", "DIGEST", "ALIASES"), rows, empty)


def version_block(version: VersionInfo) -> str:
    """All of a version, with its files."""
    facts = block(
        [
            ("name", version.name),
            ("version", version.version),
            ("digest", version.digest),
            ("aliases", ", ".join(version.aliases)),
            ("kind", version.kind),
            ("rank", version.rank),
            ("alpha", None if version.alpha is None else f"{version.alpha:g}"),
            ("modules", ", ".join(version.target_modules)),
            ("parameters", f"{version.parameters:,}"),
            ("size", size(version.nbytes)),
            ("base", _base_of(version)),
            ("base hash", version.base_fingerprint),
            ("trained on", version.base_name),
            ("task", version.task),
            ("downloads", version.downloads),
            ("license", version.license),
            ("state", None if version.state.value == "published" else f"{version.state}: {version.state_reason}"),
            ("deprecated", version.deprecated),
            ("successor", version.successor),
            ("tags", ", ".join(version.tags)),
            ("seen by", "members of its namespace" if version.private else None),
            ("description", version.description),
            *(("signed by", f"{item.key} ({item.subject})") for item in version.signatures),
            ("published", f"{version.created_at:%Y-%m-%d %H:%M:%S} UTC"),
        ]
    )
    files = f"{files_table(version.files)}{template_lines(version.chat_template_diff)}"
    return "\n\n".join([facts, *_scores([(None, version.screening)]), files])


def _scores(screened: Sequence[tuple[str | None, Screening | None]]) -> list[str]:
    """One line a score of each (what it is of, its screening); nothing where there are none."""
    rows = [
        (score.code, f"{score.value:g}", f"{score.threshold:g}", "yes" if score.alarm else "no", label, score.where)
        for label, screening in screened
        for score in (screening.scores if screening else ())
    ]
    headers = ("SCREENING", "VALUE", "FROM", "ALARM", "OF", "WHERE")
    if all(label is None for label, _ in screened):
        headers, rows = (*headers[:4], "WHERE"), [(*row[:4], row[5]) for row in rows]
    return [table(headers, rows, "")] if rows else []


def template_lines(diff: str | None) -> str:
    """How the chat template differs from the base's, below what else is said; nothing where it does not."""
    if diff is None:
        return ""
    return "\n\nCHAT TEMPLATE, against the base's\n" + "\n".join(f"  {clean(line)}" for line in diff.splitlines())


def files_table(files: Sequence[FileInfo]) -> str:
    """One line a file, digests in full."""
    return table(("FILE", "SIZE", "SHA256"), [(file.name, size(file.size), file.sha256) for file in files], "no files")


def verification_block(found: Verification) -> str:
    """What was checked, and held."""
    return block(
        [
            ("verified", found.ref),
            ("digest", found.digest),
            ("files", found.files),
            ("signed by", found.signed_by),
            ("attestation", "signed, and says what composition.json says" if found.attested else None),
            ("rebuilt", "every byte is the same" if found.rebuilt else None),
            ("not signed", ", ".join(found.unsigned)),
        ]
    )


def _reasons(verdict: Verdict) -> str:
    return "; ".join(reason.message for reason in verdict.reasons)


def verdict_lines(verdict: Verdict) -> str:
    """The level, then each reason with its remedy."""
    lines: list[tuple[str, Any]] = [("level", verdict.level.value)]
    for reason in verdict.reasons:
        lines += [("reason", reason.message), ("remedy", reason.remedy)]
    return block(lines)


def compatible_table(fits: Sequence[CompatibleAdapter], base: str) -> str:
    """One line an adapter: level and reason."""
    rows = [
        (fit.verdict.level.value, f"{fit.adapter.name}@{fit.adapter.version}", fit.adapter.kind, _reasons(fit.verdict))
        for fit in fits
    ]
    return table(("LEVEL", "ADAPTER", "KIND", "REASON"), rows, f"no adapter fits {base} at this level")


def fits_table(fits: Sequence[BaseFit], adapter: str) -> str:
    """One line a base: level and reason."""
    rows = [(fit.verdict.level.value, fit.base.name, fit.base.architecture, _reasons(fit.verdict)) for fit in fits]
    return table(("LEVEL", "BASE", "ARCHITECTURE", "REASON"), rows, f"{adapter} fits no registered base at this level")


def plan_block(plan: PlanInfo) -> str:
    """What compose would do."""
    facts = block(
        [
            ("recipe", plan.recipe_text),
            ("base", f"{plan.base} ({plan.base_fingerprint})"),
            ("method", plan.recipe.method),
            ("dtype", plan.recipe.dtype.value),
            ("export", plan.recipe.export.value),
            ("adapters", plan.recipe.placement.value if plan.recipe.placement.value != "merged" else None),
            ("tensors", f"{plan.touched} of {plan.total} change"),
            *(("added", item) for item in plan.additions),
            ("weights", size(plan.nbytes)),
            ("memory", f"about {size(plan.peak_bytes)} at most"),
            ("accepted", "yes" if plan.accepted else f"no: it needs more than --allow {plan.recipe.allow.value}"),
        ]
    )
    rows = [
        (item.ref, f"{item.weight:g}", item.tensors, item.verdict.level.value, _reasons(item.verdict))
        for item in plan.adapters
    ]
    adapters = table(("ADAPTER", "WEIGHT", "TENSORS", "LEVEL", "REASON"), rows, "no adapters")
    files = table(("FILE", "SIZE"), [(name, size(count)) for name, count in plan.files.items()], "no files")
    scores = _scores([*((item.ref, item.screening) for item in plan.adapters), ("the sum", plan.screening)])
    templates = "".join(template_lines(item.chat_template_diff) for item in plan.adapters)
    return "\n\n".join([facts, adapters, *scores, f"{files}{templates}"])


def composition_block(result: CompositionInfo) -> str:
    """What compose made."""
    record = result.record
    base = record.get("base", {})
    exported = record.get("export", {})
    lost, apart = exported.get("discarded_energy"), [item["name"] for item in exported.get("adapters", ())]
    timing = ", ".join(f"{step} {seconds:.1f}" for step, seconds in result.seconds.items())
    facts = block(
        [
            ("composed", result.out if not result.cached else f"{result.out} (it was there already)"),
            ("published", result.published),
            ("recipe", result.recipe_text),
            ("base", f"{base.get('ref', '-')} ({base.get('fingerprint', '-')})"),
            ("export", result.export),
            ("adapters", f"{exported['placement']}: {', '.join(apart)}" if apart else None),
            ("output", result.output_digest),
            ("size", size(result.nbytes)),
            ("perplexity", _perplexity(record.get("probe"))),
            ("discarded", None if lost is None else f"{lost:.3%} of the energy, by the rank"),
            ("seconds", timing),
        ]
    )
    rows = [
        (
            item.get("ref"),
            f"{item.get('weight', 1):g}",
            (item.get("verdict") or {}).get("level"),
            None if item.get("survival") is None else f"{item['survival']:.1%}",
            short(item.get("digest")),
        )
        for item in record.get("adapters", [])
    ]
    adapters = table(("ADAPTER", "WEIGHT", "LEVEL", "SURVIVAL", "DIGEST"), rows, "no adapters: the base as it is")
    outputs = record.get("outputs", {})
    files = table(
        ("FILE", "SIZE", "SHA256"),
        [(name, size(entry["size"]), entry["sha256"][:12]) for name, entry in outputs.items()],
        "no files",
    )
    return "\n\n".join([facts, adapters, *_scores([("the sum", result.screening)]), files])


def _perplexity(probe: dict[str, Any] | None) -> str | None:
    if probe is None:
        return None
    values = probe["perplexity"]
    return f"{values['base']:g} of the base, {values['composed']:g} composed ({probe['tokens']:,} tokens)"


def conversion_block(result: ConversionInfo) -> str:
    """The LoRA that was made, and the modules that lost most."""
    record = result.record
    least, most = record["ranks"]["least"], record["ranks"]["most"]
    facts = block(
        [
            ("written", result.out),
            ("digest", result.output_digest),
            ("size", size(result.nbytes)),
            ("rank", f"{most}" if least == most else f"{least} to {most}"),
            ("energy kept", f"{result.kept_energy:.3%}"),
            ("saved whole", record.get("saved_whole")),
            ("left out", record.get("left_out")),
        ]
    )
    worst = sorted(record["kept_energy_by_module"].items(), key=lambda item: item[1])[:WORST]
    rows = [(name, f"{kept:.3%}") for name, kept in worst]
    headers = (f"LEAST KEPT OF {record['modules']} MODULES", "ENERGY")
    return f"{facts}\n\n{table(headers, rows, 'no modules')}"


def delta_block(result: DeltaInfo) -> str:
    """What was written, and what it stands for."""
    return block(
        [
            ("written", result.out),
            ("digest", result.output_digest),
            ("size", size(result.nbytes)),
            ("stands for", f"{size(result.checkpoint_nbytes)} of weights"),
            ("tensors", f"{result.tensors} differ from the base's"),
        ]
    )


def checks_table(checks: Sequence[DoctorCheck]) -> str:
    """One line a check, and the remedies of those that failed."""
    text = table(("", "CHECK", "DETAIL"), [("ok" if c.ok else "FAIL", c.name, c.detail) for c in checks], "no checks")
    remedies = [f"{check.name}: {check.remedy}" for check in checks if not check.ok and check.remedy]
    return "\n".join([text, *([""] if remedies else []), *remedies])


def store_check_block(found: StoreCheck) -> str:
    """How much was hashed, and what is damaged: a line each, what it is used by, and what was or can be done."""
    count = f"{found.files} files, {size(found.nbytes)}"
    if not found.damaged:
        return f"{count}: all as they were stored"
    rows = [(item.kind, item.name, item.found, "yes" if item.restored else "no") for item in found.damaged]
    lines = [f"{count}, {len(found.damaged)} damaged", "", table(("KIND", "FILE", "FOUND", "RESTORED"), rows, ""), ""]
    for item in found.damaged:
        done = [("restored", item.restored), ("remedy", item.remedy)]
        facts = block([("used by", item.used_by), ("tensors", item.tensors), *done])
        lines += [f"{item.kind} {clean(item.name)}", facts, ""]
    return "\n".join(lines).rstrip()


def inspection(facts: dict[str, Any]) -> str:
    """What a thing holds: its facts, and a table of its tensors."""
    tensors = facts.get("tensors", [])
    record = facts.get("record")
    pairs: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if name in ("tensors", "record"):
            continue
        if name == "nbytes":
            pairs.append(("size", size(value)))
        elif isinstance(value, bool):
            pairs.append((name, "yes" if value else "no"))
        elif isinstance(value, int) and name == "parameters":
            pairs.append((name, f"{value:,}"))
        else:
            pairs.append((name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else value))
    if record:
        pairs += [("recipe", record.get("recipe_text")), ("output", record.get("output_digest"))]
        pairs += [("warnings", record.get("warnings"))]
    rows = [(item["name"], item["dtype"], " x ".join(map(str, item["shape"]))) for item in tensors]
    return f"{block(pairs)}\n\n{table(('TENSOR', 'DTYPE', 'SHAPE'), rows, 'no tensors')}"
