"""What answers a question about a picture, whatever is inside: PixelLM's engine, LISA's, or a text-prompted model."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixellm.model.engine.engine import PixelLMEngine
from pixellm.model.engine.types import GenerationOptions, SegmentRequest, TargetMask

Picture = Image.Image | bytes


@dataclass(frozen=True)
class Segmentation:
    """An answer.

    Attributes:
        text: words, with `[k]` where target k − 1 belongs; empty where a model gives masks only.
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


class EngineSegmenter:
    """PixelLM, PixelLM† or LISA: a network in the engine, which answers all pairs in one running batch."""

    def __init__(self, engine: PixelLMEngine, *, max_new_tokens: int = 128) -> None:
        """Takes an engine over; greedy answers of at most `max_new_tokens`."""
        self._engine = engine
        self._options = GenerationOptions(max_new_tokens=max_new_tokens)

    def segment_many(self, questions: Sequence[tuple[Picture, str]]) -> list[Segmentation]:
        """One answer per pair; a model with one mask per answer gives the union of all that it made."""
        requests = [SegmentRequest(picture, question, self._options) for picture, question in questions]
        results = self._engine.segment_batch(requests)
        if self._engine.processor.merges_targets:
            return [merged(result.text, [target.mask for target in result.targets]) for result in results]
        return [
            Segmentation(
                result.text,
                tuple(target.phrase for target in result.targets),
                tuple(target.mask for target in result.targets),
                tuple(_packed(target) for target in result.targets),
            )
            for result in results
        ]

    def close(self) -> None:
        """Stops the engine's threads."""
        self._engine.close()


def merged(text: str, masks: Sequence[npt.NDArray[np.bool_]]) -> Segmentation:
    """An answer with one mask, the union; none where there are no masks."""
    if not masks:
        return Segmentation(text, (), ())
    head, *rest = text.split("[1]", 1)
    for number in range(2, len(masks) + 1):
        rest = [piece.replace(f" [{number}]", "") for piece in rest]
    return Segmentation("[1]".join([head, *rest]), ("",), (np.logical_or.reduce(list(masks)),))


def open_segmenter(
    path: str | PathLike[str], *, device: str = "cpu", batch_size: int = 8, max_new_tokens: int = 128
) -> Segmenter:
    """The model in a folder, whose `config.json` says which it is.

    Args:
        path: a model folder of PixelLM or of a baseline (docs/evaluation.md, "Baselines").
        device: "cpu", "cuda", …
        batch_size: questions answered together.
        max_new_tokens: of a generated answer.

    Raises:
        ModelLoadError: no whole model, or of a kind that nothing here answers with.
    """
    engine = PixelLMEngine.from_pretrained(path, device=device, max_batch_size=batch_size)
    return EngineSegmenter(engine, max_new_tokens=max_new_tokens)


def _packed(target: TargetMask) -> dict[str, object]:
    size, counts = target.rle["size"], target.rle["counts"]
    return {"size": size, "counts": str(counts).encode()}
