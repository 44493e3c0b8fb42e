"""Conversations in OpenAI's form, and the chunks of a streamed answer."""

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from pixellm.errors import BadRequestError
from pixellm.serve.chat import ChunkWriter, completion, read_conversation
from pixellm.serve.protocol import Answer
from pixellm.serve.schemas import ChatBody, ChatMessage, Target

A, B = "data:image/png;base64,AAAA", "data:image/png;base64,BBBB"
messages_of = TypeAdapter(list[ChatMessage]).validate_python


def user(text: str | None, *urls: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text is not None else [])]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_earlier_turns_become_history_and_a_system_message_goes_before_the_first_question() -> None:
    system = {"role": "system", "content": "Be brief."}
    talk = read_conversation(messages_of([system, user("What is it?", A), assistant("A cat [1]."), user("Where?")]))
    assert talk.image_reference == A
    assert talk.image_param == "messages.1.content.0.image_url.url"
    assert talk.history == (("Be brief.\nWhat is it?", "A cat [1]."),)
    assert talk.prompt == "Where?"


def test_a_new_picture_starts_a_new_conversation_and_the_same_one_does_not() -> None:
    old = [user("one?", A), assistant("one")]
    assert read_conversation(messages_of([*old, user("two?", B)])).history == ()
    assert read_conversation(messages_of([*old, user("two?", A)])).history == (("one?", "one"),)


def test_user_messages_in_a_row_are_one_question() -> None:
    talk = read_conversation(messages_of([user(None, A), {"role": "user", "content": "Segment it."}]))
    assert (talk.prompt, talk.history) == ("Segment it.", ())


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([user("no picture")], "image_missing"),
        ([user("two", A, B)], "too_many_images"),
        ([user("q", A), assistant("a")], None),
        ([user("  ", A)], None),
        ([assistant("first"), user("q", A)], "invalid_value"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "image_missing"),
        ([user("q", A), {"role": "assistant", "content": user("x", B)["content"]}, user("q")], "invalid_value"),
    ],
)
def test_conversations_that_cannot_be_answered_are_refused(messages: list[dict[str, Any]], code: str | None) -> None:
    with pytest.raises(BadRequestError) as refused:
        read_conversation(messages_of(messages))
    assert refused.value.code == code
    assert (refused.value.param or "").startswith("messages")


def answer_and_target() -> tuple[Answer, Target]:
    usage = {"prompt_tokens": 90, "completion_tokens": 12, "image_tokens": 64}
    target = Target(index=0, phrase="a cat", score=0.5, box=[0, 0, 2, 2], area=4, mask={"size": [2, 2], "counts": "04"})
    return Answer("3", "a cat [1]", (), usage, {"total": 0.1}, "length"), target


def test_a_completion_is_what_openai_types_say_with_the_masks_beside() -> None:
    answer, target = answer_and_target()
    parsed = ChatCompletion.model_validate(completion("chatcmpl-1", "pixellm", answer, [target]), strict=True)
    choice = parsed.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("a cat [1]", "length")
    assert parsed.usage is not None
    assert parsed.usage.total_tokens == 102
    extra = choice.message.model_extra
    assert extra is not None
    assert extra["segmentation"]["targets"][0]["mask"] == {"size": [2, 2], "counts": "04"}


def test_a_stream_is_openai_chunks_and_ends_with_done() -> None:
    answer, target = answer_and_target()
    body = ChatBody.model_validate({"messages": [user("q", A)], "stream_options": {"include_usage": True}})
    writer = ChunkWriter("chatcmpl-1", "pixellm", body)
    raw = writer.opening() + writer.text("a cät\n") + writer.target(target) + writer.closing(answer)
    events = raw.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [ChatCompletionChunk.model_validate(json.loads(event[6:])) for event in events[:-2]]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "a cät\n"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 90
    assert {chunk.id for chunk in chunks} == {"chatcmpl-1"}
