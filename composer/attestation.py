"""The provenance of a composed model as an in-toto statement: what came out, of which inputs, by which recipe and tool.

It says what composition.json says, in the form that supply-chain tools read; registry.signing puts it into a signed
envelope. Source: in-toto.io/Statement/v1, slsa.dev/provenance/v1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer.errors import CorruptFileError

__all__ = ["provenance_statement"]

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
NAME = "urn:adapter-registry"


def provenance_statement(record: Mapping[str, Any], record_sha256: str) -> dict[str, Any]:
    """The statement about a composition.

    record: composition.json, whose file has `record_sha256`. Bases are named by their fingerprint (`wf1`), adapters by
    the digest of their files (`manifest-sha256`), outputs by the sha256 of their bytes.
    Raises CorruptFileError for a record that lacks these.
    """
    try:
        tool = record["tool"]
        return {
            "_type": STATEMENT,
            "subject": [_resource(name, sha256=entry["sha256"]) for name, entry in sorted(record["outputs"].items())],
            "predicateType": PREDICATE,
            "predicate": {
                "buildDefinition": {
                    "buildType": f"{NAME}:{record['schema']}",
                    "externalParameters": {"recipe": record["recipe"], "recipe_text": record["recipe_text"]},
                    "internalParameters": {
                        "licences": record.get("licences"),
                        "warnings": record["warnings"],
                        "output_digest": record["output_digest"],
                    },
                    "resolvedDependencies": [*_bases(record["base"]), *map(_adapter, record["adapters"])],
                },
                "runDetails": {
                    "builder": {"id": NAME, "version": tool},
                    "byproducts": [_resource("composition.json", sha256=record_sha256)],
                },
            },
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            "composition.json does not say what was composed of what",
            expected="the record that 'registry compose' wrote",
            found=f"{type(error).__name__}: {error}",
            remedy="compose it again",
        ) from None


def _bases(base: Mapping[str, Any]) -> list[dict[str, Any]]:
    known = [base, *([base["original"]] if "original" in base else [])]
    return [_resource(entry["ref"], wf1=entry["fingerprint"].removeprefix("wf1:")) for entry in known]


def _adapter(entry: Mapping[str, Any]) -> dict[str, Any]:
    annotations = {name: entry.get(name) for name in ("weight", "licence", "verdict", "survival")}
    digest = {"manifest-sha256": entry["digest"].removeprefix("sha256:")}
    return {**_resource(entry["ref"], **digest), "annotations": annotations}


def _resource(name: str, **digest: str) -> dict[str, Any]:
    return {"name": name, "digest": digest}
