"""What crosses between the ingress and an engine replica: encoded pictures in, words and run lengths out.

Masks travel as COCO RLE only (a few hundred bytes); the ingress renders other formats, so that GPU replicas spend no
time on them. Everything pickles and holds no tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict


class Rle(TypedDict):
    """COCO's compressed run-length encoding, as pycocotools reads it."""

    size: list[int]
    counts: str


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one picture.

    Args:
        image_bytes: the picture as it was uploaded (JPEG, PNG, …), not decoded.
        prompt: the question in plain words.
        history: earlier turns about the same picture, (question, answer) each, oldest first.
        max_new_tokens: length limit of the answer, codebook tokens included.
        threshold: probability above which a pixel belongs to a mask, in (0, 1).
        temperature: 0 takes the likeliest token; above, samples.
        top_p: samples from the smallest set of tokens whose probability reaches this.
        seed: makes sampling repeatable.
        stop: the answer ends before the first of these strings.
        picture_digest: the same for the same `image_bytes`; questions of one digest go to one replica.
        caller: who asks, so that a replica takes turns among callers.
    """

    image_bytes: bytes
    prompt: str
    history: tuple[tuple[str, str], ...] = ()
    max_new_tokens: int = 256
    threshold: float = 0.5
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    picture_digest: str = ""
    caller: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """First event of a stream: the question was accepted by a replica of this model version."""

    model_version: str


@dataclass(frozen=True, slots=True)
class TextPart:
    """More words of the answer; a target's place is written `[k]`, k = its index + 1."""

    text: str


@dataclass(frozen=True, slots=True)
class TargetPart:
    """One finished mask at the picture's own (EXIF-upright) size.

    `score` is the mean probability over the mask's pixels, `box` is (x0, y0, x1, y1) in pixels or None when the mask is
    empty, `area` counts pixels.
    """

    index: int
    phrase: str
    score: float
    box: tuple[float, float, float, float] | None
    area: int
    rle: Rle


@dataclass(frozen=True, slots=True)
class EngineReport:
    """How a replica stood when it gave an answer; the ingress turns it into metrics.

    Args:
        replica: its name.
        running: questions that generated together (the batch).
        waiting: questions that waited for a place.
        picture_hits: pictures found remembered, since its start.
        picture_misses: pictures looked at, since its start.
        picture_cache_bytes: what the remembered pictures take.
        load_s: how long it took from the start of loading until it could answer.
    """

    replica: str
    running: int
    waiting: int
    picture_hits: int
    picture_misses: int
    picture_cache_bytes: int
    load_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole answer; also the last event of a stream.

    `finish_reason` is "stop" or "length"; `dropped` says what was left out (a target that did not fit), if anything.
    """

    model_version: str
    text: str
    targets: tuple[TargetPart, ...]
    usage: Mapping[str, int]
    timings_s: Mapping[str, float] = field(default_factory=dict)
    finish_reason: str = "stop"
    dropped: str | None = None
    engine: EngineReport | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The replica will not answer this question, because of the question (a value, not an exception: no traceback)."""

    message: str
    status_code: int = 400
    param: str | None = None
    code: str | None = None


Event = Started | TextPart | TargetPart | Answer | Refusal
