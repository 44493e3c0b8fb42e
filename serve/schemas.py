"""The bodies of the HTTP API: `/v1/segment`, and the part of OpenAI's chat schema that a picture question needs.

`/v1/segment` refuses unknown fields, so that a misspelt `treshold` is not silently ignored; the chat route ignores what
it does not use, because OpenAI clients send many fields.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pixellm.serve.mask_formats import MaskFormat


class AnswerOptions(BaseModel):
    """What both routes let a caller choose. `max_tokens` None means the server's limit."""

    mask_format: MaskFormat = Field("rle", description="how each mask is spelt: COCO RLE, 1-bit PNG, or polygons")
    threshold: float = Field(0.5, gt=0, lt=1, description="probability above which a pixel belongs to a mask")
    max_tokens: int | None = Field(None, ge=1, description="length limit of the answer, mask tokens included")
    temperature: float = Field(0.0, ge=0, le=2, description="0 takes the likeliest token each time")
    top_p: float = Field(1.0, gt=0, le=1, description="samples from the likeliest tokens up to this probability")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="makes sampling repeatable")
    stop: str | list[str] | None = Field(None, description="the answer ends before the first of these")
    model: str | None = Field(None, max_length=512, description="a served model's id (GET /v1/models)")


class SegmentBody(AnswerOptions):
    """`POST /v1/segment` as JSON; multipart sends the same fields with `image` as a file."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(
        description="the picture as a data URL: data:image/jpeg;base64,…", json_schema_extra={"format": "uri"}
    )
    prompt: str = Field(min_length=1, description="the question, e.g. “Segment the cat and the laptop.”")


class SegmentFields(AnswerOptions):
    """The fields beside the file of a multipart `POST /v1/segment`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)


class Target(BaseModel):
    """One thing that the answer names, with its mask at the uploaded picture's size as a person sees it."""

    index: int = Field(description="0, 1, …; its place in the text is written [index + 1]")
    phrase: str = Field(description="the words of the answer that name it")
    score: float = Field(description="mean probability over the mask's pixels")
    box: list[float] | None = Field(description="[x0, y0, x1, y1] in pixels; null for an empty mask")
    area: int = Field(description="pixels inside")
    mask: Any = Field(description="{size, counts} | data:image/png;base64,… | list of rings [x0, y0, x1, y1, …]")


class SegmentAnswer(BaseModel):
    """The answer of `POST /v1/segment`; timings in seconds."""

    id: str
    model: str
    text: str
    targets: list[Target]
    usage: dict[str, int]
    timings: dict[str, float]
    finish_reason: Literal["stop", "length"]
    dropped: str | None = Field(None, description="what did not fit into max_tokens, if anything")


class ImageUrl(BaseModel):
    """The picture of a content part."""

    url: str
    detail: str | None = None


class ContentPart(BaseModel):
    """One part of a message: text or a picture."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class ChatMessage(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None


class ChatBody(AnswerOptions):
    """`POST /v1/chat/completions`: OpenAI's schema, plus `mask_format` and `threshold`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens")
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=1, description="answers per question; only 1 is served")

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, fields: Any) -> Any:
        """OpenAI's schema lets optional fields be null, and its clients send them so."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}
