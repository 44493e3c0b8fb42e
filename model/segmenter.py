"""Opens what answers questions about pictures, whatever is inside: PixelLM's engine, LISA's, or a text-prompted model.

A folder's `config.json` says which: `model_type` is PixelLM's or LISA's, one of transformers' (`clipseg`, `sam3`), or
`pixellm-lisa-rec` and `pixellm-grounded-sam2`, which hold two models in subfolders.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from pixellm.model.baselines.lisa_rec import LISA_REC, LisaRecSegmenter, LlavaWords
from pixellm.model.baselines.text_prompted import (
    GROUNDED_SAM2,
    ClipSegSegmenter,
    GroundedSam2Segmenter,
    Sam3Segmenter,
)
from pixellm.model.engine.engine import PixelLMEngine
from pixellm.model.engine.types import GenerationOptions, SegmentRequest, TargetMask
from pixellm.model.networks import model_type_of
from pixellm.model.segmentation import Picture, Segmentation, Segmenter, merged

_TEXT_PROMPTED: dict[str, Callable[[str | PathLike[str], str], Segmenter]] = {
    "clipseg": ClipSegSegmenter,
    GROUNDED_SAM2: GroundedSam2Segmenter,
    "sam3": Sam3Segmenter,
    "sam3_video": Sam3Segmenter,
}


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
        ModelLoadError: no whole model.
    """
    kind = model_type_of(path)
    if kind in _TEXT_PROMPTED:
        return _TEXT_PROMPTED[kind](path, device)
    if kind == "llava":
        return LlavaWords(path, device, max_new_tokens=max_new_tokens)
    if kind == LISA_REC:
        language, lisa = (
            open_segmenter(Path(path) / part, device=device, batch_size=batch_size, max_new_tokens=max_new_tokens)
            for part in ("language", "lisa")
        )
        return LisaRecSegmenter(language, lisa)
    engine = PixelLMEngine.from_pretrained(Path(path), device=device, max_batch_size=batch_size)
    return EngineSegmenter(engine, max_new_tokens=max_new_tokens)


def _packed(target: TargetMask) -> dict[str, object]:
    return {"size": target.rle["size"], "counts": str(target.rle["counts"]).encode()}
