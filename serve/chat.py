"""OpenAI's chat completions on top of a picture question: messages in, message and chunks out.

A conversation is about one picture, the last one sent. Masks ride beside the words as `segmentation: {targets: […]}`
on the message, or on a chunk's delta as soon as a target is complete; a client of
OpenAI's plain schema sees text.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixellm.errors import BadRequestError
from pixellm.serve.protocol import Answer
from pixellm.serve.schemas import ChatBody, ChatMessage, Target

SSE_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat as the engine takes it: one picture, earlier turns, the question to answer now.

    `image_reference` is the URL text of the picture, `image_param` the place in the request where it stood.
    """

    image_reference: str
    image_param: str
    history: tuple[tuple[str, str], ...]
    prompt: str


def read_conversation(messages: Sequence[ChatMessage]) -> Conversation:
    """Orders chat messages into turns about one picture.

    System messages are put in front of the first question (the model was trained with one fixed preamble); user
    messages in a row are joined. A new picture starts a new conversation: turns before it are dropped.

    Raises:
        BadRequestError: there is no picture, no question, two pictures in one message, or the last word is not the
            user's.
    """
    turns: list[list[str]] = []
    preamble: list[str] = []
    image: tuple[str, str] | None = None
    for position, message in enumerate(messages):
        text, pictures = _parts(message, position)
        if message.role in ("system", "developer"):
            preamble.append(text)
            continue
        if message.role == "assistant":
            _append_answer(turns, text, position)
            continue
        if pictures:
            if image is not None and pictures[0][0] != image[0]:
                turns = []
            image = pictures[0]
        if turns and len(turns[-1]) == 1:
            turns[-1][0] = f"{turns[-1][0]}\n{text}".strip()
        else:
            turns.append([text])
    if image is None:
        raise BadRequestError(
            "no message holds a picture; add a content part {'type': 'image_url', 'image_url': {'url': 'data:…'}}",
            param="messages",
            code="image_missing",
        )
    if not turns or len(turns[-1]) != 1 or not turns[-1][0].strip():
        raise BadRequestError("the last message must be the user's, with a question as text", param="messages")
    turns[0][0] = "\n".join([*preamble, turns[0][0]]).strip()
    history = tuple((turn[0], turn[1]) for turn in turns[:-1])
    return Conversation(image[0], image[1], history, turns[-1][0])


def _append_answer(turns: list[list[str]], text: str, position: int) -> None:
    if not turns or len(turns[-1]) != 1:
        raise BadRequestError(
            "an assistant message must follow a user message", param=f"messages.{position}", code="invalid_value"
        )
    turns[-1].append(text)


def _parts(message: ChatMessage, position: int) -> tuple[str, list[tuple[str, str]]]:
    """The text of a message and its pictures as (url, place in the request)."""
    if message.content is None or isinstance(message.content, str):
        return message.content or "", []
    texts: list[str] = []
    pictures: list[tuple[str, str]] = []
    for index, part in enumerate(message.content):
        where = f"messages.{position}.content.{index}"
        if part.type == "text":
            texts.append(part.text or "")
        elif part.image_url is None:
            raise BadRequestError("an image_url part lacks image_url.url", param=where, code="image_missing")
        elif message.role != "user":
            raise BadRequestError("only user messages may hold a picture", param=where, code="invalid_value")
        else:
            pictures.append((part.image_url.url, f"{where}.image_url.url"))
    if len(pictures) > 1:
        raise BadRequestError(
            "a message holds several pictures; ask about one picture at a time",
            param=f"messages.{position}.content",
            code="too_many_images",
        )
    return "\n".join(texts), pictures


def completion(request_id: str, model: str, answer: Answer, targets: Sequence[Target]) -> dict[str, Any]:
    """The body of a chat completion that is not streamed."""
    message = {
        "role": "assistant",
        "content": answer.text,
        "refusal": None,
        "segmentation": {"targets": [target.model_dump() for target in targets], "dropped": answer.dropped},
    }
    return {
        "id": request_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}],
        "usage": openai_usage(answer.usage),
    }


def openai_usage(usage: Mapping[str, int]) -> dict[str, Any]:
    """Token counts under OpenAI's names; picture tokens are part of the prompt's and given beside."""
    prompt, generated = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"image_tokens": usage.get("image_tokens", 0)},
    }


class ChunkWriter:
    """Spells one streamed chat completion as server-sent events.

    Args:
        request_id: the same in every chunk.
        model: id of the model that answers.
        options: of the request: whether a last chunk gives the token counts.
    """

    def __init__(self, request_id: str, model: str, options: ChatBody) -> None:
        self._frame = {
            "id": request_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._include_usage = options.stream_options is not None and options.stream_options.include_usage

    def opening(self) -> bytes:
        """The first chunk: the role."""
        return self._choice({"role": "assistant", "content": ""})

    def text(self, text: str) -> bytes:
        """More words."""
        return self._choice({"content": text})

    def target(self, target: Target) -> bytes:
        """One finished mask."""
        return self._choice({"segmentation": {"targets": [target.model_dump()]}})

    def closing(self, answer: Answer) -> bytes:
        """The last chunks: why it ended, the token counts where asked for, and `[DONE]`."""
        chunks = self._choice({}, answer.finish_reason, {"timings": dict(answer.timings_s)})
        if self._include_usage:
            chunks += sse({**self._frame, "choices": [], "usage": openai_usage(answer.usage)})
        return chunks + SSE_DONE

    def _choice(
        self, delta: Mapping[str, Any], finish_reason: str | None = None, extra: Mapping[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return sse({**self._frame, "choices": [choice], **(extra or {})})


def sse(body: Mapping[str, Any]) -> bytes:
    """One server-sent event that carries a JSON object."""
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
