"""Who may ask, how much, and what is written down about it."""

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest
from fake_backend import FixedModels, ScriptedBackend
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pictures import data_url, picture_bytes

from pixellm.errors import AuthenticationError, ConfigError, RateLimitedError
from pixellm.platform.settings import ServeSettings
from pixellm.serve.auth import ApiKey, Caller, Doorkeeper, check_exposure, new_key, read_keys
from pixellm.serve.ingress import build_api
from pixellm.serve.limits import CallerLimits
from pixellm.serve.metrics import ServiceMetrics
from pixellm.serve.tracing import Tracing

BODY = {"image": data_url(picture_bytes()), "prompt": "Segment my secret."}


def test_a_key_is_known_by_its_digest_and_nothing_else_is_let_in(tmp_path: Any) -> None:
    secret, line = new_key("ann")
    assert secret not in line
    path = tmp_path / "keys"
    path.write_text(f"# who\n{line} concurrent=2 per_minute=30\n")
    (key,) = read_keys(ServeSettings(api_keys_file=str(path)), {})
    assert (key.name, key.concurrent, key.per_minute) == ("ann", 2, 30)
    assert read_keys(ServeSettings(), {"PIXELLM_API_KEYS": f"{line};{new_key('bob')[1]}"})[0].name == "ann"
    door = Doorkeeper([key])
    assert door.identify(f"Bearer {secret}", "8.8.8.8") == Caller("ann", key)
    for wrong in (None, "", "Bearer ", f"Basic {secret}", "Bearer px-other", f"Bearer {key.digest}", "Bearer \udcff"):
        with pytest.raises(AuthenticationError):
            door.identify(wrong, "127.0.0.1")  # with keys, this machine needs one too


def test_without_keys_only_this_machine_is_answered_and_only_it_is_listened_to() -> None:
    door = Doorkeeper([])
    for near in ("127.0.0.1", "::1", "127.8.8.8"):
        assert door.identify(None, near).key is None
        check_exposure(near, [])
    for far in (None, "10.0.0.7", "192.168.1.2", "2001:db8::1"):
        with pytest.raises(AuthenticationError):
            door.identify(None, far)
    with pytest.raises(ConfigError, match="pixellm key"):
        check_exposure("0.0.0.0", [])
    check_exposure("0.0.0.0", [ApiKey("a", "0" * 64)])


@pytest.mark.parametrize("line", ["ann", "ann sha256:12", "a b sha256:" + "0" * 64, "ann sha256:" + "0" * 64 + " x=1"])
def test_a_damaged_key_file_is_refused_without_quoting_it(tmp_path: Any, line: str) -> None:
    (tmp_path / "keys").write_text(line)
    with pytest.raises(ConfigError, match="pixellm key") as refused:
        read_keys(ServeSettings(api_keys_file=str(tmp_path / "keys")), {})
    assert line not in str(refused.value)


def test_a_caller_has_so_many_requests_open_and_asks_so_often() -> None:
    limits, ann, bob = CallerLimits(2, 60), Caller("ann"), Caller("bob")
    limits.enter(ann, 0.0)
    limits.enter(ann, 0.0)
    with pytest.raises(RateLimitedError, match="open"):
        limits.enter(ann, 0.0)
    limits.enter(bob, 0.0)  # another caller's account
    limits.leave(ann)
    limits.enter(ann, 0.0)
    burst = CallerLimits(None, 6)
    for _ in range(6):
        burst.enter(ann, 100.0)
    with pytest.raises(RateLimitedError) as refused:
        burst.enter(ann, 101.0)
    assert refused.value.retry_after_s == pytest.approx(9.0)
    burst.enter(ann, 100.0 + 10.0)  # one more every ten seconds
    own = Caller("eve", ApiKey("eve", "0" * 64, concurrent=1))
    limits.enter(own, 0.0)
    with pytest.raises(RateLimitedError):
        limits.enter(own, 0.0)


def exchange(app: Any, *requests: tuple[str, str, dict[str, Any]], at_once: bool = False) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            sending = [client.request(method, path, **rest) for method, path, rest in requests]
            return list(await asyncio.gather(*sending)) if at_once else [await one for one in sending]

    return asyncio.run(run())


def test_over_http_a_key_opens_the_api_and_limits_answer_429_with_a_time() -> None:
    secret, line = new_key("ann")
    settings = ServeSettings(max_per_minute_per_key=2)
    keys = read_keys(settings, {"PIXELLM_API_KEYS": line})
    metrics = ServiceMetrics()
    app = build_api(FixedModels(ScriptedBackend()), settings, metrics, keys)
    mine = {"headers": {"Authorization": f"Bearer {secret}"}, "json": BODY}
    open_ones = [("GET", path, {}) for path in ("/", "/healthz", "/readyz", "/metrics")]
    asked = [("POST", "/v1/segment", mine)] * 3
    refused, *rest = exchange(app, ("POST", "/v1/segment", {"json": BODY}), *open_ones, *asked)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert [response.status_code for response in rest] == [200] * 6 + [429]
    assert rest[-1].json()["error"]["type"] == "rate_limit_error"
    assert int(rest[-1].headers["Retry-After"]) >= 1
    assert "pixellm_rate_limited_total 1.0" in metrics.exposition().decode()
    options = ("OPTIONS", "/v1/segment", {"headers": {"Origin": "https://evil.example"}})
    (answer,) = exchange(app, options)
    assert not [name for name in answer.headers if name.startswith("access-control")]  # no CORS
    for name, value in (("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY")):
        assert refused.headers[name] == answer.headers[name] == value


def test_the_access_log_is_json_without_picture_or_prompt_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    for log_prompts in (False, True):
        app = build_api(
            FixedModels(ScriptedBackend()),
            ServeSettings(access_log="stderr", log_prompts=log_prompts),
            ServiceMetrics(),
        )
        log = logging.getLogger("pixellm.access")
        log.addHandler(caplog.handler)
        caplog.clear()
        evil = {"json": BODY | {"prompt": 'Segment my secret.\n{"status": 200}'}, "headers": {"X-Request-ID": "a\tb"}}
        (response,) = exchange(app, ("POST", "/v1/segment", evil))
        log.removeHandler(caplog.handler)
        (line,) = [record.getMessage() for record in caplog.records if record.name == "pixellm.access"]
        record = json.loads(line)
        assert record["status"] == response.status_code == 200
        assert record["route"] == "/v1/segment"
        assert record["model_version"] == "7-replica"
        assert record["sent_bytes"] == len(response.content)
        assert "\t" not in record["request_id"]
        assert BODY["image"][30:60] not in line
        assert ("my secret" in line) == log_prompts
        assert "\n" not in line


def test_a_request_is_one_trace_with_the_engines_phases_below_it() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("off", exporter)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    with tracing.request("POST", "/v1/segment", {"Traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}) as span:
        span.set_attribute("http.response.status_code", 200)
        tracing.phases({"prefill": 0.25, "decode": 0.5, "total": 0.75})
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"POST /v1/segment", "engine prefill", "engine decode"}
    parent = spans["POST /v1/segment"]
    assert f"{parent.context.trace_id:032x}" == trace_id
    for name, seconds in (("engine prefill", 0.25), ("engine decode", 0.5)):
        child = spans[name]
        assert child.parent is not None
        assert child.parent.span_id == parent.context.span_id
        assert child.end_time is not None
        assert child.start_time is not None
        assert (child.end_time - child.start_time) / 1e9 == pytest.approx(seconds, abs=1e-3)
    with Tracing("off").request("GET", "/", {}) as nothing:
        assert nothing is None
