"""What every segmenter takes and gives: a picture and a question in, an answer in words and masks out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = Image.Image | bytes


@dataclass(frozen=True)
class Segmentation:
    """An answer.

    Attributes:
        text: words, with `[k]` where target k − 1 belongs.
        phrases: what each target is called; may be empty strings.
        masks: bool [H, W] at the picture's own size.
        rles: the same masks in COCO's compressed form, `{"size": [H, W], "counts": bytes}`, where they are packed
            already.
    """

    text: str
    phrases: tuple[str, ...]
    masks: tuple[npt.NDArray[np.bool_], ...]
    rles: tuple[dict[str, object], ...] | None = None


@runtime_checkable
class Segmenter(Protocol):
    """Answers questions about pictures in words and masks."""

    def segment_many(self, questions: Sequence[tuple[Picture, str]]) -> list[Segmentation]:
        """Answers (picture, question) pairs together; one answer each, in their order.

        Raises:
            PixelLMError: a picture or question that cannot be used.
        """
        ...

    def close(self) -> None:
        """Lets go of threads and memory."""
        ...


def listed(found: Sequence[tuple[str, npt.NDArray[np.bool_]]]) -> Segmentation:
    """An answer that lists phrases, each in front of the number of its mask."""
    text = ", ".join(f"{phrase} [{number}]" for number, (phrase, _) in enumerate(found, 1))
    return Segmentation(f"{text}." if text else "", tuple(p for p, _ in found), tuple(mask for _, mask in found))


def merged(text: str, masks: Sequence[npt.NDArray[np.bool_]]) -> Segmentation:
    """An answer with one mask, the union of all; none where there are no masks."""
    if not masks:
        return Segmentation(text, (), ())
    for number in range(2, len(masks) + 1):
        text = text.replace(f" [{number}]", "")
    return Segmentation(text, ("",), (np.logical_or.reduce(list(masks)),))
