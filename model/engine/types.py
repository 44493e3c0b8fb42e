"""What goes into the engine and what comes out: plain data, no tensors, picklable.

The text of an answer holds `[k]` where the words and mask of target k − 1 belong together.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pixellm.errors import BadRequestError

STOP_REASONS = ("eos", "stop_string", "max_new_tokens", "max_targets", "context_full")


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated.

    Attributes:
        max_new_tokens: most tokens of the answer; a group counts N·L. A group that does not fit is dropped whole.
        threshold: probability above which a pixel belongs to its target, in (0, 1).
        temperature: 0 takes the most likely token; above, samples from logits / temperature.
        top_p: samples from the smallest set of tokens whose probability reaches this, in (0, 1].
        seed: of the request's own random numbers; None draws one.
        stop: the answer ends before the first of these strings.
        keep_logits: hand out each target's mask logits too (4 bytes per pixel and target).
        max_targets: most targets of the answer, which ends where one more would begin; None: as many as tokens allow.
    """

    max_new_tokens: int = 256
    threshold: float = 0.5
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    keep_logits: bool = False
    max_targets: int | None = None

    def __post_init__(self) -> None:
        """Refuses values out of range.

        Raises:
            BadRequestError: naming the value and its range.
        """
        wrong = []
        if self.max_new_tokens < 1:
            wrong.append(f"max_new_tokens is {self.max_new_tokens}, wanted at least 1")
        if self.max_targets is not None and self.max_targets < 1:
            wrong.append(f"max_targets is {self.max_targets}, wanted at least 1")
        if not 0.0 < self.threshold < 1.0:
            wrong.append(f"threshold is {self.threshold}, wanted a probability between 0 and 1")
        if not 0.0 <= self.temperature < float("inf"):
            wrong.append(f"temperature is {self.temperature}, wanted 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            wrong.append(f"top_p is {self.top_p}, wanted above 0 and at most 1")
        if any(not stop for stop in self.stop):
            wrong.append("a stop string is empty")
        if wrong:
            raise BadRequestError("; ".join(wrong))


@dataclass(frozen=True)
class SegmentRequest:
    """One question about one picture.

    Attributes:
        image: PIL picture or encoded bytes.
        prompt: the question.
        options: how the answer is generated.
        history: earlier (question, answer) pairs about the same picture; answers as the engine gave them.
        client: requests of one client wait behind each other, not in front of other clients'.
        timeout_s: the request fails with RequestTimeoutError after this long; None waits for ever.
    """

    image: Image.Image | bytes
    prompt: str
    options: GenerationOptions = field(default_factory=GenerationOptions)
    history: tuple[tuple[str, str], ...] = ()
    client: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True)
class TargetMask:
    """One target that the answer names.

    Attributes:
        index: place in the answer, from 0; the text's marker is `[index + 1]`.
        phrase: words that name it; may be empty.
        mask: bool [H, W] at the picture's own size, in the orientation a person sees.
        score: mean probability over the mask's pixels, 0 where it is empty.
        box_xyxy: smallest box around the mask in pixels, right and bottom exclusive; None where it is empty.
        area_px: pixels of the mask.
        rle: COCO's compressed run lengths, `{"size": [H, W], "counts": str}`.
        mask_logits: fp32 [H, W] where they were asked for, else None.
    """

    index: int
    phrase: str
    mask: np.ndarray
    score: float
    box_xyxy: tuple[float, float, float, float] | None
    area_px: int
    rle: dict[str, object]
    mask_logits: np.ndarray | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of one request: of the prompt (picture positions included), of the answer, and of the picture alone."""

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class SegmentationResult:
    """A finished answer.

    Attributes:
        text: the words, with `[k]` where target k − 1 belongs.
        targets: in order of appearance.
        usage: tokens.
        timings_s: seconds by phase: `queue`, `vision`, `prefill`, `decode`, `masks`, `first_token`, `total`.
        dropped: what was left out (a group that did not fit), in words; None if nothing.
        stop_reason: one of `STOP_REASONS`.
        token_ids: generated ids, every group written out.
    """

    text: str
    targets: tuple[TargetMask, ...]
    usage: Usage
    timings_s: dict[str, float]
    dropped: str | None = None
    stop_reason: str = "eos"
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """Words that follow the words streamed so far."""

    text: str


@dataclass(frozen=True)
class TargetDone:
    """A target's mask is ready; the text up to its marker has been streamed."""

    target: TargetMask


@dataclass(frozen=True)
class Done:
    """The answer is complete; nothing follows."""

    result: SegmentationResult


StreamEvent = TextDelta | TargetDone | Done
EventListener = Callable[[StreamEvent], None]
