"""Generated requests, valid and invalid by the OpenAPI document: never a 500, and all responses match the document."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from served import Client, service, write_release, write_world

from rayrec.serving.service import Service
from rayrec.storage.workspace import Workspace

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]

BATCHES = ("/v1/plays", "/v1/recommendations/batch", "/v1/tastes")

FEW_EXAMPLES = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    workspace = Workspace(tmp_path_factory.mktemp("fuzz") / "workspace")
    write_world(workspace)
    write_release(workspace)
    with service(workspace) as replica:
        yield replica


@pytest.fixture
def document(replica: Service) -> schemathesis.BaseSchema:
    app = Client(replica).app

    async def call_from_loopback(scope: Any, receive: Any, send: Any) -> None:
        headers = [(name, b"localhost" if name == b"host" else value) for name, value in scope["headers"]]
        await app({**scope, "client": ("127.0.0.1", 1), "headers": headers}, receive, send)

    return schemathesis.openapi.from_asgi("/openapi.json", call_from_loopback)


def try_requests(operation: Any, mode: GenerationMode, checks: list[Any]) -> None:
    @settings(FEW_EXAMPLES)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        case.validate_response(case.call(), checks=checks)

    check()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_causes_a_server_error(document: schemathesis.BaseSchema, mode: GenerationMode) -> None:
    paths = set()
    for result in document.get_all_operations():
        operation = result.ok()
        paths.add(operation.path)

        # An invalid entry of a batch fails alone, so the request as a whole succeeds.
        checks = CHECKS[:-1] if operation.path in BATCHES else CHECKS
        with suppress(Unsatisfiable):  # a GET without parameters has no invalid form
            try_requests(operation, mode, checks)
    assert {*BATCHES, "/v1/recommendations", "/v1/rank", "/v1/songs/popular", "/v1/songs/new", "/healthz"} <= paths
