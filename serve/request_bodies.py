"""From an HTTP request to a `Question`: JSON or multipart read, validated, limited, its picture checked."""

import asyncio
import hashlib
import json
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from pixellm.errors import BadRequestError
from pixellm.platform.settings import ServeSettings
from pixellm.serve.chat import read_conversation
from pixellm.serve.feedback import FeedbackBody
from pixellm.serve.images import check_image, image_from_reference, is_remote
from pixellm.serve.protocol import Question
from pixellm.serve.remote_images import RemoteImages
from pixellm.serve.roster_view import Models
from pixellm.serve.schemas import AnswerOptions, ChatBody, SegmentBody, SegmentFields

_THREAD_ABOVE_BYTES = 256 * 1024
_MAX_FIELDS = 16

BodyT = TypeVar("BodyT", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that may be answered: the question, and how the answer is to be spelt."""

    question: Question
    options: AnswerOptions


class RequestReader:
    """Reads requests under one server's limits.

    Args:
        settings: limits on pixels, prompt and answer length.
        models: what is served; another `model` is refused with 404.
        remote: fetches pictures by URL, where allowed.
    """

    def __init__(self, settings: ServeSettings, models: Models, remote: RemoteImages) -> None:
        self._settings = settings
        self._models = models
        self._remote = remote

    async def segment(self, request: Request) -> Asked:
        """The question of a `POST /v1/segment`, JSON or multipart.

        Raises:
            BadRequestError, pydantic.ValidationError: with the HTTP status that fits (`failures.failure_of`).
        """
        kind = _content_type(request)
        if kind == "multipart/form-data":
            image_bytes, fields = await _read_multipart(request)
            return self._asked(image_bytes, "image", fields.prompt, (), fields)
        _require_json(kind, also="multipart/form-data")
        body = await _parsed(await request.body(), SegmentBody)
        self._models.roster.find(body.model)
        return self._asked(await self._picture(body.image, "image"), "image", body.prompt, (), body)

    async def chat(self, request: Request) -> Asked:
        """The question of a `POST /v1/chat/completions`; `options` is a `ChatBody`.

        Raises:
            As `segment`.
        """
        _require_json(_content_type(request))
        body = await _parsed(await request.body(), ChatBody)
        self._models.roster.find(body.model)
        conversation = read_conversation(body.messages)
        param = conversation.image_param
        image_bytes = await self._picture(conversation.image_reference, param)
        return self._asked(image_bytes, param, conversation.prompt, conversation.history, body)

    async def feedback(self, request: Request) -> tuple[FeedbackBody, bytes]:
        """The body of a `POST /v1/feedback` and its picture.

        Raises:
            As `segment`.
        """
        _require_json(_content_type(request))
        body = await _parsed(await request.body(), FeedbackBody)
        image_bytes = image_from_reference(body.image, param="image")
        check_image(image_bytes, max_pixels=self._settings.max_image_pixels, param="image")
        return body, image_bytes

    async def _picture(self, reference: str, param: str) -> bytes:
        """The encoded picture that a request's text means, data URL or, where allowed, http(s)."""
        if is_remote(reference):
            return await self._remote.fetch(reference.strip(), param=param)
        if len(reference) > _THREAD_ABOVE_BYTES:
            return await asyncio.to_thread(image_from_reference, reference, param=param)
        return image_from_reference(reference, param=param)

    def _asked(
        self,
        image_bytes: bytes,
        image_param: str,
        prompt: str,
        history: tuple[tuple[str, str], ...],
        options: AnswerOptions,
    ) -> Asked:
        self._models.roster.find(options.model)
        num_chars = len(prompt) + sum(len(question) + len(answer) for question, answer in history)
        if num_chars > self._settings.max_prompt_chars:
            raise BadRequestError(
                f"the question and its conversation have {num_chars:,} characters; at most "
                f"{self._settings.max_prompt_chars:,} are accepted (serve.max_prompt_chars)",
                status_code=422,
                param="prompt" if not history else "messages",
                code="prompt_too_long",
            )
        check_image(image_bytes, max_pixels=self._settings.max_image_pixels, param=image_param)
        question = Question(
            image_bytes=image_bytes,
            prompt=prompt,
            history=history,
            max_new_tokens=self._max_new_tokens(options),
            threshold=options.threshold,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            stop=(options.stop,) if isinstance(options.stop, str) else tuple(options.stop or ()),
            picture_digest=hashlib.blake2b(image_bytes, digest_size=16).hexdigest(),
        )
        return Asked(question, options)

    def _max_new_tokens(self, options: AnswerOptions) -> int:
        limit = self._settings.max_new_tokens
        wanted, param = options.max_tokens, "max_tokens"
        if isinstance(options, ChatBody) and options.max_completion_tokens is not None:
            wanted, param = options.max_completion_tokens, "max_completion_tokens"
        if wanted is None:
            return limit
        if wanted > limit:
            raise BadRequestError(
                f"{param} is {wanted}, at most {limit} are served (serve.max_new_tokens)",
                status_code=422,
                param=param,
                code="invalid_value",
            )
        return wanted


async def _read_multipart(request: Request) -> tuple[bytes, SegmentFields]:
    async with request.form(max_files=1, max_fields=_MAX_FIELDS) as form:
        upload = form.get("image")
        if not isinstance(upload, UploadFile):
            raise BadRequestError(
                "the form has no file field 'image'; send the picture as a file", param="image", code="image_missing"
            )
        fields = {name: value for name, value in form.multi_items() if not isinstance(value, UploadFile)}
        return await upload.read(), SegmentFields.model_validate(fields)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _require_json(kind: str, also: str | None = None) -> None:
    if kind != "application/json":
        wanted = "application/json" + (f" or {also}" if also else "")
        raise BadRequestError(
            f"the body's Content-Type is {kind[:80] or 'missing'!r}, wanted {wanted}",
            status_code=415,
            code="unsupported_media_type",
        )


async def _parsed(raw: bytes, kind: type[BodyT]) -> BodyT:
    """Large bodies are parsed in a thread, so that one upload does not hold up everybody's streams."""
    if len(raw) > _THREAD_ABOVE_BYTES:
        return await asyncio.to_thread(_parse, raw, kind)
    return _parse(raw, kind)


def _parse(raw: bytes, kind: type[BodyT]) -> BodyT:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}", code="invalid_json") from None
    return kind.model_validate(body)
