"""Every route over real HTTP semantics (ASGI), with a scripted backend: bodies, statuses, headers, streams, metrics."""

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest
from fake_backend import FixedModels, ScriptedBackend, target_part
from pictures import data_url, picture_bytes
from pycocotools import mask as coco

from pixellm.errors import BadRequestError, OverloadedError, RequestTimeoutError
from pixellm.platform.settings import ServeSettings
from pixellm.serve.ingress import build_api
from pixellm.serve.metrics import ServiceMetrics

PICTURE = picture_bytes(7, 5)
URL = data_url(PICTURE)
SETTINGS = ServeSettings(
    max_new_tokens=64, max_body_bytes=200_000, max_image_pixels=10_000, max_prompt_chars=500, min_replicas=1
)


def mask() -> np.ndarray:
    mask_HW = np.zeros((5, 7), dtype=bool)
    mask_HW[1:3, 2:6] = True
    return mask_HW


def make_backend(**fields: Any) -> ScriptedBackend:
    return ScriptedBackend(targets=(target_part(0, "a thing", mask()),), **fields)


def send(backend: ScriptedBackend, method: str, path: str, **request: Any) -> httpx.Response:
    app = build_api(FixedModels(backend), SETTINGS, ServiceMetrics())

    async def exchange() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(exchange())


def segment(backend: ScriptedBackend | None = None, **fields: Any) -> httpx.Response:
    return send(backend or make_backend(), "POST", "/v1/segment", json={"image": URL, "prompt": "Segment it."} | fields)


def chat(backend: ScriptedBackend | None = None, **fields: Any) -> httpx.Response:
    content = [{"type": "text", "text": "Segment it."}, {"type": "image_url", "image_url": {"url": URL}}]
    body = {"model": "scripted", "messages": [{"role": "user", "content": content}]} | fields
    return send(backend or make_backend(), "POST", "/v1/chat/completions", json=body)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def test_json_and_multipart_ask_the_same_question() -> None:
    backend = make_backend()
    fields = {"prompt": "Segment it.", "threshold": 0.25, "max_tokens": 9, "temperature": 0.5, "seed": 3}
    as_json = send(backend, "POST", "/v1/segment", json={"image": URL, **fields})
    as_form = send(backend, "POST", "/v1/segment", files={"image": PICTURE}, data=fields)
    assert (as_json.status_code, as_form.status_code) == (200, 200)
    assert backend.questions[0] == backend.questions[1]
    question = backend.questions[0]
    assert (question.image_bytes, question.prompt, question.threshold) == (PICTURE, "Segment it.", 0.25)
    assert (question.max_new_tokens, question.temperature, question.seed) == (9, 0.5, 3)
    body = as_json.json()
    assert body["id"] != as_form.json()["id"]
    assert body["text"] == "Here is a thing [1]."
    assert body["usage"] == {"prompt_tokens": 100, "completion_tokens": 6, "image_tokens": 64}
    (target,) = body["targets"]
    assert (target["index"], target["phrase"], target["score"], target["area"]) == (0, "a thing", 0.875, 8)
    assert target["box"] == [2.0, 1.0, 6.0, 3.0]
    rle = target["mask"]
    np.testing.assert_array_equal(coco.decode({"size": rle["size"], "counts": rle["counts"].encode()}), mask())
    assert as_json.headers["X-Model-Version"] == "7-replica"


def test_masks_come_in_the_format_that_was_asked_for() -> None:
    assert segment(mask_format="polygon").json()["targets"][0]["mask"] == [[2, 1, 6, 1, 6, 3, 2, 3]]
    assert segment(mask_format="png").json()["targets"][0]["mask"].startswith("data:image/png;base64,")
    assert chat(mask_format="polygon").json()["choices"][0]["message"]["segmentation"]["targets"][0]["mask"] == [
        [2, 1, 6, 1, 6, 3, 2, 3]
    ]


REFUSED = [
    ({"image": "http://example.com/a.png"}, 400, "image", "image_url_not_allowed"),
    ({"image": data_url(b"not a picture")}, 415, "image", "unsupported_image_format"),
    ({"image": data_url(picture_bytes(200, 100))}, 413, "image", "image_too_large"),
    ({"image": 5}, 422, "image", "invalid_value"),
    ({"prompt": ""}, 422, "prompt", "invalid_value"),
    ({"prompt": None}, 422, "prompt", "invalid_value"),
    ({"prompt": "x" * 501}, 422, "prompt", "prompt_too_long"),
    ({"threshold": 1}, 422, "threshold", "invalid_value"),
    ({"threshold": "high"}, 422, "threshold", "invalid_value"),
    ({"mask_format": "gif"}, 422, "mask_format", "invalid_value"),
    ({"max_tokens": 65}, 422, "max_tokens", "invalid_value"),
    ({"max_tokens": 0}, 422, "max_tokens", "invalid_value"),
    ({"treshold": 0.5}, 422, "treshold", "invalid_value"),
    ({"model": "gpt-4o"}, 404, "model", "model_not_found"),
]


@pytest.mark.parametrize(("fields", "status", "param", "code"), REFUSED)
def test_each_wrong_field_is_named_with_the_fitting_status(
    fields: dict[str, Any], status: int, param: str, code: str
) -> None:
    response = segment(**fields)
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert response.headers["X-Model-Version"] == "7"


@pytest.mark.parametrize(
    ("request_parts", "status", "code"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"content": b"\xff\xfe", "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"content": b"[]", "headers": {"content-type": "application/json"}}, 422, "invalid_value"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "unsupported_media_type"),
        ({"content": b"x"}, 415, "unsupported_media_type"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, None),
        ({"files": {"picture": PICTURE}, "data": {"prompt": "p"}}, 400, "image_missing"),
        ({"files": {"image": PICTURE}, "data": {}}, 422, "invalid_value"),
        ({"json": {"image": "x" * 300_000, "prompt": "p"}}, 413, "body_too_large"),
        ({"files": {"image": b"x" * 300_000}, "data": {"prompt": "p"}}, 413, "body_too_large"),
    ],
)
def test_bodies_that_cannot_be_read_are_refused(request_parts: dict[str, Any], status: int, code: str | None) -> None:
    response = send(make_backend(), "POST", "/v1/segment", **request_parts)
    assert response.status_code == status
    assert error_of(response)["code"] == code


def test_a_body_without_a_length_is_cut_off_at_the_limit() -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while True:
            sent += 10_000
            yield b" " * 10_000

    response = send(
        make_backend(), "POST", "/v1/segment", content=endless(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert sent <= 220_000


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (OverloadedError("full", retry_after_s=7), 503, "overloaded_error"),
        (RequestTimeoutError("slow"), 504, "timeout_error"),
        (BadRequestError("truncated picture", code="invalid_input"), 400, "invalid_request_error"),
        (RuntimeError("secret"), 500, "server_error"),
    ],
)
@pytest.mark.parametrize("ask", [segment, chat, lambda backend: chat(backend, stream=True)])
def test_what_goes_wrong_behind_the_ingress_has_its_status_on_every_route(
    ask: Any, error: Exception, status: int, kind: str
) -> None:
    response = ask(make_backend(errors={"Segment": error}))
    assert response.status_code == status
    assert error_of(response)["type"] == kind
    assert "secret" not in response.text
    assert response.headers.get("Retry-After") == ("7" if status == 503 else None)


def test_a_stream_sends_words_and_each_mask_right_after_its_marker() -> None:
    response = chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["X-Model-Version"] == "7-replica"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events[:-2]]
    kinds = [
        delta.get("content") or [target["index"] for target in delta.get("segmentation", {}).get("targets", [])]
        for delta in deltas
    ]
    assert kinds == [[], "Here ", "is ", "a ", "thing ", "[1]", [0], ".", []]


def test_a_stream_that_breaks_says_so_inside_the_stream() -> None:
    response = chat(make_backend(breaks_after=3), stream=True)
    assert response.status_code == 200
    *_, last, end = response.text.split("\n\n")
    assert end == ""
    assert json.loads(last[6:])["error"]["type"] == "server_error"
    assert "[DONE]" not in response.text


def test_fields_that_openai_clients_send_are_ignored_and_two_answers_are_refused() -> None:
    assert chat(frequency_penalty=0, user="me", response_format={"type": "text"}).status_code == 200
    assert chat(n=2).status_code == 422
    assert error_of(chat(max_completion_tokens=65))["param"] == "max_completion_tokens"
    backend = make_backend()
    chat(backend, max_completion_tokens=5, max_tokens=60, stop=["."], top_p=0.5)
    assert (backend.questions[0].max_new_tokens, backend.questions[0].stop, backend.questions[0].top_p) == (
        5,
        (".",),
        0.5,
    )


def test_what_openai_clients_leave_open_may_be_null() -> None:
    names = ["temperature", "top_p", "n", "stream", "seed", "stop", "max_tokens", "stream_options"]
    response = chat(**dict.fromkeys(names))
    assert response.status_code == 200, response.text
    assert chat(stream=True, stream_options={"include_usage": None}).status_code == 200
    assert error_of(chat(messages=None))["param"] == "messages"


def test_models_health_and_unknown_routes() -> None:
    backend = make_backend()
    listed = send(backend, "GET", "/v1/models").json()
    assert listed["data"][0]["id"] == "scripted"
    assert listed["data"][0]["version"] == "7"
    assert listed["data"][0]["lineage"]["run_id"] == "abc"
    assert send(backend, "GET", "/v1/models/scripted").json() == listed["data"][0]
    assert error_of(send(backend, "GET", "/v1/models/other"))["code"] == "model_not_found"
    assert send(backend, "GET", "/healthz").status_code == 200
    assert send(backend, "GET", "/readyz").json()["replicas"] == 1
    backend.replicas = 0
    assert send(backend, "GET", "/readyz").status_code == 503
    assert send(backend, "GET", "/healthz").status_code == 200
    assert send(backend, "GET", "/nothing").status_code == 404
    assert "error" in send(backend, "GET", "/nothing").json()
    assert send(backend, "DELETE", "/v1/segment").status_code == 405
    for path in ("/page/../replica.py", "/page/%2e%2e/replica.py", "/page/nothing.js", "/..%2f..%2fetc%2fpasswd"):
        assert send(backend, "GET", path).status_code == 404


def test_the_page_loads_only_from_its_own_server() -> None:
    response = send(make_backend(), "GET", "/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in response.headers["Content-Security-Policy"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in response.headers
    for name in ("page.js", "page.css", "api.js", "overlay.js", "rle.js", "saving.js", "words.js", "icon.svg"):
        file = send(make_backend(), "GET", f"/page/{name}")
        assert file.status_code == 200
        assert "https://" not in file.text.replace("https://example", "")


def test_the_openapi_document_describes_both_bodies_without_dangling_references() -> None:
    document = send(make_backend(), "GET", "/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert {"SegmentBody", "ChatBody", "SegmentAnswer", "ChatMessage"} <= set(schemas)
    references = {part.split('"')[0] for part in json.dumps(document).split('"$ref": "')[1:]}
    assert references
    assert all(reference.removeprefix("#/components/schemas/") in schemas for reference in references)


def test_requests_are_counted_by_route_and_status() -> None:
    metrics = ServiceMetrics()
    models = FixedModels(make_backend(errors={"busy": OverloadedError("x")}))
    app = build_api(models, SETTINGS, metrics)

    async def exchange() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for prompt in ("one", "two", "busy"):
                await client.post("/v1/segment", json={"image": URL, "prompt": prompt})
            await client.get("/some/random/path")
            return (await client.get("/metrics")).text

    text = asyncio.run(exchange())
    assert 'pixellm_requests_total{route="/v1/segment",status="200"} 2.0' in text
    assert 'pixellm_requests_total{route="/v1/segment",status="503"} 1.0' in text
    assert 'pixellm_requests_total{route="unknown",status="404"} 1.0' in text
    assert "pixellm_targets_total 2.0" in text
    assert "pixellm_requests_in_flight 1.0" in text  # the scrape itself
