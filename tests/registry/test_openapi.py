"""The description of the API: examples that are valid everywhere, and requests drawn from it that find no 500."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import schemathesis
import sqlalchemy as sa
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from registry.api.app import create_app
from registry.api.examples import JOB, PARAMETERS
from registry.models import JobRow
from registry.services.jobs import JobService
from registry.services.local import open_registry
from tests.support import write_base, write_lora

MODULE = "model.layers.0.self_attn.q_proj"
CHECKS = (not_a_server_error, response_schema_conformance, content_type_conformance, status_code_conformance)
JSON = "application/json"
EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "6"))  # of each operation; more in a longer run


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """An open service over what the examples name: a base, its fine-tune, an adapter with an alias, and a job."""
    folder = tmp_path_factory.mktemp("described")
    registry = open_registry(folder / "home")
    for seed, name in enumerate(("smollm2", "smollm2-chat")):
        weights = np.full((6, 4), 1.0 + seed, np.float32)
        registry.add_base(write_base(folder / name, {f"{MODULE}.weight": weights}), name=name)
    lora = write_lora(folder / "lora", {MODULE: (6, 4)})
    registry.publish(lora, name="team/shout", version="1.0.0", base="smollm2", tags=("style",))
    registry.set_alias("team/shout@1.0.0", "prod")
    jobs = JobService(registry, slots=0)
    job = jobs.submit_verify("smollm2")
    with registry.engine.begin() as connection:
        connection.execute(sa.update(JobRow).where(JobRow.id == job.id).values(id=JOB))
    yield create_app(registry, jobs)
    registry.close()


def operations(app: FastAPI) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, path, operation) of each."""
    for path, found in app.openapi()["paths"].items():
        yield from ((method, path, operation) for method, operation in found.items())


def test_whatever_is_given_or_comes_back_has_a_valid_example(app: FastAPI) -> None:
    """Parameters but cursors, bodies, and answers with a schema of their own; each example is an instance of it."""
    components = {"components": app.openapi()["components"]}
    count = 0
    for method, path, operation in operations(app):
        where = f"{method} {path}"
        shown = [(item["name"], item["schema"], item.get("example")) for item in operation.get("parameters", ())]
        for part in (operation.get("requestBody", {}), *operation["responses"].values()):
            for kind, content in part.get("content", {}).items():
                if kind in (JSON, "multipart/form-data") and "additionalProperties" not in content["schema"]:
                    shown.append((kind, content["schema"], content.get("example")))
        for what, schema, example in shown:
            if what == "cursor":
                continue
            assert example is not None, f"{where}: {what} has no example"
            if what == "multipart/form-data":
                schema = {**schema, "required": [name for name in schema["required"] if name != "files"]}
            jsonschema_rs.validate({**components, **schema}, example)
            count += 1
    assert count > 150


def test_every_parameter_in_the_examples_is_one_of_the_api(app: FastAPI) -> None:
    """No example outlives what it was of."""
    used = {item["name"] for _, _, operation in operations(app) for item in operation.get("parameters", ())}
    assert set(PARAMETERS) <= used


def drawn(operation: Any, statuses: Counter[int]) -> Callable[[], None]:
    """A test of one operation: half of its requests are about names that are there."""
    there = {item.name: item.definition["example"] for item in operation.path_parameters}

    @given(case=operation.as_strategy(), known=st.booleans())
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def check(case: Any, known: bool) -> None:
        if known:
            case.path_parameters.update(there)
        statuses[case.call_and_validate(checks=CHECKS).status_code] += 1

    return check


def test_no_request_that_the_description_allows_is_a_500(app: FastAPI) -> None:
    """Each answer has a status, a type and a shape that the description states."""
    schema = schemathesis.openapi.from_dict(json.loads(json.dumps(app.openapi())))
    schema.app = app
    statuses: Counter[int] = Counter()
    for found in schema.get_all_operations():
        drawn(found.ok(), statuses)()
    assert sum(statuses.values()) > 25 * EXAMPLES
    assert statuses[200] > EXAMPLES
