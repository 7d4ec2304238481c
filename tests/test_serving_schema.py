"""Requests made up from the OpenAPI document, sensible and not: no answer may be a server's fault."""

import threading
import time

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("schemathesis")
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving_tools import free_port, tiny_checkpoint

from pokemon_nb.serving import Limits, create_app

PATHS = ["/generate", "/generate/stream", "/healthz", "/readyz", "/version"]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    "The application behind a real socket."
    app = create_app(tiny_checkpoint(tmp_path_factory.mktemp("schema")), "cpu", page=False, process=False,
                     limits=Limits(rate="", waiting=200))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started: time.sleep(.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda m: m.value)
@pytest.mark.parametrize("path", PATHS)
def test_no_made_up_request_is_our_fault(url, path, mode):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    assert set(schema) == set(PATHS)
    (operation,) = schema[path].values()
    if operation.method == "get" and mode == GenerationMode.NEGATIVE: pytest.skip("takes nothing that could be wrong")

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None,
              phases=[Phase.generate])
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        answer = case.call(timeout=60)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        kind = answer.headers["content-type"][0]
        if answer.status_code >= 400: assert kind == "application/problem+json", (case.as_curl_command(), kind)
        # documented status, media type and shape; what must be refused is. Not every text is a prompt, though.
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])

    ask()
