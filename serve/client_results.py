"""What a client gets: answers with numpy masks, and the pure part of talking HTTP (bodies, errors, waits).

The field names are those of `pixellm.SegmentationResult` and `pixellm.TargetMask`; nothing here imports torch.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from pixellm.errors import (
    AuthenticationError,
    BadRequestError,
    DataError,
    OverloadedError,
    PixelLMError,
    RequestTimeoutError,
    ServingError,
)
from pixellm.platform.masks import BoolMask, rle_decode

ImageLike = str | Path | bytes | Image.Image

_RETRIED_STATUSES = (429, 503)
_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True)
class RemoteTarget:
    """One target of an answer.

    Attributes:
        index: place in the answer, from 0; the text's marker is `[index + 1]`.
        phrase: words that name it.
        mask: bool [H, W] at the picture's own size, in the orientation a person sees.
        score: mean probability over the mask's pixels.
        box_xyxy: smallest box in pixels; None for an empty mask.
        area_px: pixels of the mask.
        rle: COCO's compressed run lengths.
    """

    index: int
    phrase: str
    mask: BoolMask
    score: float
    box_xyxy: tuple[float, float, float, float] | None
    area_px: int
    rle: dict[str, Any]


@dataclass(frozen=True)
class RemoteResult:
    """A finished answer.

    Attributes:
        id: the server's id of the answer.
        model: id of the model.
        model_version: version that answered (`X-Model-Version`).
        text: the words, with `[k]` where target k - 1 belongs.
        targets: in order of appearance.
        usage: `prompt_tokens`, `completion_tokens`, `image_tokens`.
        timings_s: the engine's seconds by phase (empty from the chat route).
        finish_reason: "stop" or "length".
    """

    id: str
    model: str
    model_version: str
    text: str
    targets: tuple[RemoteTarget, ...]
    usage: dict[str, int]
    timings_s: dict[str, float]
    finish_reason: str


@dataclass(frozen=True)
class RemoteText:
    """Words that follow the words streamed so far."""

    text: str


def encoded_image(image: ImageLike) -> bytes:
    """The bytes to upload: a file's as they are, a PIL picture as PNG.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()
    try:
        return Path(image).expanduser().read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the picture {image}: {error.strerror}; give a path, bytes or a PIL image"
        ) from None


def chat_messages(image: bytes, prompt: str, history: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """A conversation about one picture in OpenAI's form; the picture goes with the first question."""
    kind = Image.MIME.get(_format_of(image), "image/jpeg")
    url = f"data:{kind};base64,{base64.b64encode(image).decode()}"
    messages: list[dict[str, Any]] = []
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": prompt})
    first = messages[0]["content"]
    messages[0]["content"] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": first}]
    return messages


def _format_of(image: bytes) -> str:
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.format or ""
    except OSError:  # the server will say what is wrong with it
        return ""


def read_target(target: Mapping[str, Any]) -> RemoteTarget:
    """One target of a body whose masks are RLE."""
    box = target["box"]
    return RemoteTarget(
        index=int(target["index"]),
        phrase=str(target["phrase"]),
        mask=rle_decode(target["mask"]),
        score=float(target["score"]),
        box_xyxy=None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
        area_px=int(target["area"]),
        rle=dict(target["mask"]),
    )


def read_segment(response: httpx.Response) -> RemoteResult:
    """The answer of `/v1/segment`."""
    body = read_body(response)
    return RemoteResult(
        id=body["id"],
        model=body["model"],
        model_version=response.headers.get("X-Model-Version", ""),
        text=body["text"],
        targets=tuple(read_target(target) for target in body["targets"]),
        usage=dict(body["usage"]),
        timings_s=dict(body["timings"]),
        finish_reason=body["finish_reason"],
    )


def read_completion(response: httpx.Response) -> RemoteResult:
    """The answer of `/v1/chat/completions`, not streamed."""
    body = read_body(response)
    choice = body["choices"][0]
    return RemoteResult(
        id=body["id"],
        model=body["model"],
        model_version=response.headers.get("X-Model-Version", ""),
        text=choice["message"]["content"],
        targets=tuple(read_target(target) for target in choice["message"]["segmentation"]["targets"]),
        usage=plain_usage(body["usage"]),
        timings_s={},
        finish_reason=choice["finish_reason"],
    )


def plain_usage(usage: Mapping[str, Any]) -> dict[str, int]:
    """OpenAI's token counts under the engine's names."""
    return {
        "prompt_tokens": int(usage["prompt_tokens"]),
        "completion_tokens": int(usage["completion_tokens"]),
        "image_tokens": int(usage["prompt_tokens_details"]["image_tokens"]),
    }


class StreamReader:
    """Turns the lines of a streamed completion into events; pure, one instance per answer."""

    def __init__(self, model_version: str) -> None:
        self._model_version = model_version
        self._texts: list[str] = []
        self._targets: list[RemoteTarget] = []
        self._last: dict[str, Any] = {}
        self._usage: dict[str, int] = {}
        self._timings: dict[str, float] = {}
        self._finish_reason = ""

    def feed(self, line: str) -> list[RemoteText | RemoteTarget | RemoteResult]:
        """Takes one line in; returns what it adds, `RemoteResult` last.

        Raises:
            PixelLMError: the server reports an error inside the stream.
        """
        if not line.startswith("data: "):
            return []
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return [self._result()]
        chunk = json.loads(data)
        if "error" in chunk:
            raise error_of(_status_of(chunk["error"]), chunk["error"], None)
        self._last = chunk
        self._timings.update(chunk.get("timings") or {})
        if chunk.get("usage"):
            self._usage = plain_usage(chunk["usage"])
        events: list[RemoteText | RemoteTarget | RemoteResult] = []
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if delta.get("content"):
                self._texts.append(delta["content"])
                events.append(RemoteText(delta["content"]))
            for target in (delta.get("segmentation") or {}).get("targets", []):
                self._targets.append(read_target(target))
                events.append(self._targets[-1])
            self._finish_reason = choice["finish_reason"] or self._finish_reason
        return events

    def _result(self) -> RemoteResult:
        return RemoteResult(
            id=self._last.get("id", ""),
            model=self._last.get("model", ""),
            model_version=self._model_version,
            text="".join(self._texts),
            targets=tuple(self._targets),
            usage=self._usage,
            timings_s=self._timings,
            finish_reason=self._finish_reason,
        )


def read_body(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a response.

    Raises:
        PixelLMError: the response is an error, as the exception that fits.
    """
    if not response.is_success:
        raise failure_from(response)
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ServingError(f"{response.request.url} did not answer with a JSON object; is it a pixellm service?")
    return body


def failure_from(response: httpx.Response) -> PixelLMError:
    """The exception for an error response."""
    try:
        error = response.json()["error"]
        return error_of(response.status_code, {"message": None, **error}, response.headers.get("Retry-After"))
    except (ValueError, KeyError, TypeError):
        message = f"{response.request.url} answered {response.status_code}: {response.text[:200]}"
        return error_of(response.status_code, {"message": message}, response.headers.get("Retry-After"))


def error_of(status_code: int, error: Mapping[str, Any], retry_after: str | None) -> PixelLMError:
    """The exception for an error object."""
    message = str(error.get("message"))
    if status_code == 401:
        return AuthenticationError(message)
    if status_code in _RETRIED_STATUSES:
        return OverloadedError(message, retry_after_s=_seconds(retry_after) or 1.0)
    if status_code == 504:
        return RequestTimeoutError(message)
    if status_code < 500:
        return BadRequestError(message, status_code=status_code, param=error.get("param"), code=error.get("code"))
    return ServingError(message)


def _status_of(error: Mapping[str, Any]) -> int:
    """The HTTP status that an error inside a stream would have had."""
    by_type = {"overloaded_error": 503, "timeout_error": 504, "server_error": 500, "rate_limit_error": 429}
    return by_type.get(str(error.get("type")), 400)


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:  # an HTTP date; nobody needs it to the second
        return None


def _is_worth_another(response: httpx.Response) -> bool:
    """Busy; or the ingress died under the question, which Ray Serve's proxy says as 500 in plain text."""
    if response.status_code in _RETRIED_STATUSES:
        return True
    return response.status_code == 500 and response.headers.get("content-type", "").startswith("text/plain")


def wait_before_retry_s(response: httpx.Response | None, attempt: int, max_retries: int, jitter: float) -> float | None:
    """How long to wait before sending a request again.

    Args:
        response: what came back; None when the connection failed.
        attempt: 0 for the first try.
        max_retries: tries after the first.
        jitter: in [0, 1), spreads clients that were refused together.

    Returns:
        Seconds, at least what `Retry-After` asks for; None: do not send it again.
    """
    if attempt >= max_retries or not (response is None or _is_worth_another(response)):
        return None
    wanted = None if response is None else _seconds(response.headers.get("Retry-After"))
    backoff = 0.25 * 2**attempt
    return min(_LONGEST_WAIT_S, max(wanted or 0.0, backoff) * (1 + 0.25 * jitter))
