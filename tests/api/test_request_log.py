"""Lines and spans of requests."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from decoding.errors import ConfigError
from decoding.messages import TokenEvent
from decoding.request import GenerateRequest
from server.app import build_app
from server.fake_client import Line, Pause, Script
from server.limits import Limits
from server.log import REQUESTS, JsonFormatter, TextFormatter, answering, set_up_log
from server.tracing import RequestTracer, open_tracer
from tests.api.harness import SETTINGS, api, fake, live, saying, tokenizer

SECRET = "the quick brown fox"


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """What a log of JSON says of requests."""
    found: list[dict[str, Any]] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = JsonFormatter().format(record)
            assert "\n" not in text
            assert text.isascii()
            found.append(json.loads(text))

    logger, keeper = logging.getLogger(REQUESTS), Keeper()
    level = logger.level
    logger.addHandler(keeper)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(keeper)
    logger.setLevel(level)


def test_a_request_has_a_line_when_it_ends(lines: list[dict[str, Any]]) -> None:
    with api(saying(SECRET, "b")) as client:
        client.post("/v1/completions", json={"prompt": SECRET}, headers={"x-request-id": "mine-1"})
    (line,) = lines
    assert (line["level"], line["logger"], line["request_id"], line["status"]) == ("info", REQUESTS, "mine-1", 200)
    assert (line["method"], line["route"], line["model"]) == ("POST", "/v1/completions", "demo")
    assert line["prompt_tokens"] > 1
    assert line["completion_tokens"] > 1
    assert (line["cached_tokens"], line["finish_reasons"]) == (2, ["length"])
    assert (line["steps"], line["drafted"], line["accepted"]) == (2, 5, 3)
    assert 0 < line["time_to_first_token"] <= line["duration"]
    assert 0 <= line["queued"] <= line["time_to_first_token"]
    assert line.keys().isdisjoint({"error", "limit", "trace_id"})
    assert "quick" not in json.dumps(line)


def test_a_refusal_has_a_short_line_and_a_failure_its_code(lines: list[dict[str, Any]]) -> None:
    with api(saying("a", "b", reason="error")) as client:
        client.post("/v1/completions", json={"prompt": SECRET, "temperature": -1})
        client.post("/v1/completions", json={"prompt": SECRET, "stream": True})
    refused, failed = lines
    assert refused["status"] == 400
    assert "prompt_tokens" not in refused
    assert refused["error"] == "invalid_value"
    assert (failed["status"], failed["error"], failed["finish_reasons"]) == (200, "internal_error", ["error"])


def test_a_line_names_the_clients_trace(lines: list[dict[str, Any]]) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    with api(saying("a")) as client:
        for parent in (f"00-{trace}-b7ad6b7169203331-01", f"00-{'0' * 32}-b7ad6b7169203331-01", "x" * 5000):
            client.post("/v1/completions", json={"prompt": "x"}, headers={"traceparent": parent})
    assert [line.get("trace_id") for line in lines] == [trace, None, None]


def test_a_request_without_room_names_the_limit(lines: list[dict[str, Any]]) -> None:
    with api(saying("a"), replace(SETTINGS, limits=Limits(max_body_memory=100))) as client:
        client.post("/v1/completions", json={"prompt": "x" * 200})
    (line,) = lines
    assert (line["status"], line["error"], line["limit"]) == (429, "server_overloaded", "max_body_memory")


def test_lines_that_are_written_while_a_request_is_answered_name_it() -> None:
    """A mistake's traceback is logged by the HTTP server, which knows of no request."""

    def broken(request: GenerateRequest) -> Iterable[Line]:
        raise ValueError("nobody foresaw this")

    texts: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.extend(form().format(record) for form in (JsonFormatter, TextFormatter))

    logger, keeper = logging.getLogger("uvicorn.error"), Keeper()
    logger.addHandler(keeper)
    try:
        with live(broken) as url:
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "mine-2"})
    finally:
        logger.removeHandler(keeper)
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine-2")
    as_json, as_text = texts[:2]
    assert json.loads(as_json)["request_id"] == "mine-2"
    assert "nobody foresaw this" in json.loads(as_json)["exception"]
    assert as_text.startswith("ERROR: [mine-2] ")
    assert answering.get() is None, "no other task is told of it"


def test_probes_have_no_lines_unless_they_fail(lines: list[dict[str, Any]]) -> None:
    engine = fake()
    with api(engine) as client:
        for route in ("/health", "/ready", "/live", "/metrics"):
            client.get(route)
        assert not lines
        engine.die()
        client.get("/health")
    assert [line["status"] for line in lines] == [503]


def test_an_exception_is_one_line() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError as error:
        record = logging.LogRecord("saccade", logging.ERROR, "", 1, "%s\nc", ("x",), (ValueError, error, None))
    text = JsonFormatter().format(record)
    assert "\n" not in text
    found = json.loads(text)
    assert (found["message"], found["level"]) == ("x\nc", "error")
    assert "ValueError: a\nb" in found["exception"]


@pytest.mark.parametrize(
    ("form", "level", "ours", "requests"),
    [
        ("text", "info", logging.INFO, logging.WARNING),
        ("text", "debug", logging.DEBUG, logging.DEBUG),
        ("json", "info", logging.INFO, logging.INFO),
        ("json", "error", logging.ERROR, logging.ERROR),
    ],
)
def test_levels(form: Any, level: Any, ours: int, requests: int) -> None:
    loggers = [logging.getLogger(name) for name in (None, "saccade", REQUESTS)]
    kept = [logger.level for logger in loggers]
    formatters = [handler.formatter for handler in loggers[0].handlers]
    try:
        set_up_log(form, level)
        assert (loggers[1].level, loggers[2].level) == (ours, requests)
        assert loggers[0].level == max(ours, logging.WARNING)
        assert all(isinstance(each.formatter, JsonFormatter) == (form == "json") for each in loggers[0].handlers)
    finally:
        for logger, before in zip(loggers, kept, strict=True):
            logger.setLevel(before)
        for handler, formatter in zip(loggers[0].handlers, formatters, strict=True):
            handler.setFormatter(formatter)


def traced(script: Script, *bodies: dict[str, Any], **headers: str) -> list[ReadableSpan]:
    """The spans of requests, each one's own after those of its parts."""
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(SimpleSpanProcessor(exporter))
    app = build_app(fake(script), tokenizer(), SETTINGS, tracer=tracer)
    client = TestClient(app, raise_server_exceptions=False)
    for body in bodies:
        client.post("/v1/completions", json=body, headers=headers)
    client.get("/health")
    spans = list(exporter.get_finished_spans())
    tracer.close()
    return spans


def test_a_request_is_a_span_under_its_clients() -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = {"prompt": SECRET, "max_tokens": 7, "temperature": 0.5, "top_k": 9, "seed": 2**64 - 1}
    *_, span = traced(saying(SECRET, "b"), body, traceparent=f"00-{trace}-{parent}-01")
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace, parent)
    assert (span.name, span.kind.name, span.status.status_code.name) == ("text_completion demo", "SERVER", "UNSET")
    found = dict(span.attributes or {})
    assert found["gen_ai.operation.name"] == "text_completion"
    assert (found["gen_ai.request.model"], found["gen_ai.request.max_tokens"]) == ("demo", 7)
    assert (found["gen_ai.request.temperature"], found["gen_ai.request.top_k"]) == (0.5, 9)
    assert "gen_ai.request.seed" not in found, "OTLP has no integers of that size"
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert (found["http.route"], found["http.response.status_code"]) == ("/v1/completions", 200)
    assert (found["saccade.drafted"], found["saccade.accepted"]) == (5, 3)
    assert (found["server.address"], found["server.port"]) == ("testserver", 80)
    assert "quick" not in str(found)


def test_the_parts_of_a_request_are_spans_of_its_own() -> None:
    def script(request: GenerateRequest) -> Iterable[Line]:
        for number, line in enumerate(saying("a", "b c", "d")(request)):
            assert isinstance(line, TokenEvent)
            yield Pause(0.02)
            yield replace(line, queued_seconds=0.0 if number else 0.005)

    *parts, whole = traced(script, {"prompt": SECRET, "stream": True, "seed": 7})
    assert [each.name for each in parts] == ["queue", "prefill", "decode"]
    assert whole.context is not None
    assert {each.parent.span_id for each in parts if each.parent} == {whole.context.span_id}
    assert {each.context.trace_id for each in parts if each.context} == {whole.context.trace_id}
    edges = [(each.start_time or 0, each.end_time or 0) for each in parts]
    assert edges[0][1] == pytest.approx(edges[1][0], abs=2)
    assert edges[1][1] == pytest.approx(edges[2][0], abs=2)
    assert (whole.start_time or 0) <= edges[0][0] < edges[0][1] < edges[1][1] < edges[2][1] <= (whole.end_time or 0)
    assert edges[0][1] - edges[0][0] == pytest.approx(5e6, abs=2)
    found, decode = dict(whole.attributes or {}), dict(parts[2].attributes or {})
    assert found["gen_ai.request.seed"] == 7
    assert found["gen_ai.latency.time_in_queue"] == pytest.approx(0.005)
    assert found["gen_ai.latency.time_in_model_decode"] == pytest.approx((edges[2][1] - edges[2][0]) / 1e9, abs=1e-6)
    assert decode["gen_ai.usage.output_tokens"] == found["gen_ai.usage.output_tokens"]
    assert decode["saccade.steps"] == 2


def test_a_trace_that_its_client_does_not_record_is_not_recorded_here() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    assert traced(saying("a"), {"prompt": "x"}, traceparent=parent) == []


def test_spans_of_requests_that_fail() -> None:
    refused, *_, failed = traced(
        saying("a", "b", reason="error"), {"prompt": "x", "n": 0}, {"prompt": "x", "stream": True}, traceparent="no"
    )
    assert (refused.name, refused.status.status_code.name, refused.parent) == ("POST /v1/completions", "UNSET", None)
    assert (failed.status.status_code.name, dict(failed.attributes or {})["error.type"]) == ("ERROR", "internal_error")


def test_spans_reach_a_collector() -> None:
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Nothing: pytest shows what is printed."""

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        tracer = open_tracer(f"http://127.0.0.1:{server.server_port}")
        app = build_app(fake(saying("a")), tokenizer(), SETTINGS, tracer=tracer)
        TestClient(app).post("/v1/completions", json={"prompt": "x"})
        tracer.close()
        server.shutdown()
        thread.join()
    ((path, request),) = received
    (resource,) = request.resource_spans
    assert path == "/v1/traces"
    names = [span.name for span in resource.scope_spans[0].spans]
    assert names == ["queue", "prefill", "decode", "text_completion demo"]
    assert "saccade" in [each.value.string_value for each in resource.resource.attributes if each.key == "service.name"]


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://127.0.0.1:4317", "http://"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="4318/v1/traces"):
        open_tracer(endpoint)
