"""`pixellm predict`: one question about each of some pictures; an overlay for each, and one JSON with words and RLE."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixellm.errors import ConfigError, DataError
from pixellm.platform import registry
from pixellm.platform.overlay import draw_overlay
from pixellm.platform.settings import TrackingSettings

PREDICTIONS_FILE = "predictions.json"


@dataclass(frozen=True)
class PredictedTarget:
    """One target of an answer; coordinates and sizes in pixels of the picture as a person sees it.

    Attributes:
        index: place in the answer, from 0; the text's marker is `[index + 1]`.
        phrase: words that name it.
        score: mean probability over its pixels, 0 to 1.
        box: x0, y0, x1, y1, right and bottom exclusive; None for an empty mask.
        area: pixels.
        rle: COCO's compressed run lengths, `{"size": [height, width], "counts": text}`.
    """

    index: int
    phrase: str
    score: float
    box: tuple[float, float, float, float] | None
    area: int
    rle: dict[str, object]


@dataclass(frozen=True)
class Prediction:
    """The answer about one picture, and the file with its overlay."""

    image: str
    text: str
    overlay: str
    targets: tuple[PredictedTarget, ...]


@dataclass(frozen=True)
class PredictResult:
    """Answers about all pictures, also in `out_dir/predictions.json`."""

    question: str
    model: str
    out_dir: str
    predictions: tuple[Prediction, ...]

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"predictions": [asdict(prediction) for prediction in self.predictions]}

    def to_text(self) -> str:
        """For each picture the answer, its targets and the overlay's path."""
        lines = []
        for prediction in self.predictions:
            lines.append(f"{prediction.image}: {prediction.text}")
            lines += [
                f"  [{target.index + 1}] {target.phrase or 'target'}: score {target.score:.2f}, {target.area} px"
                for target in prediction.targets
            ]
            lines.append(f"  {prediction.overlay}")
        return "\n".join(lines)


def predict(
    images: Sequence[Path],
    question: str,
    model_ref: str | Path,
    out_dir: str | Path,
    *,
    max_new_tokens: int = 256,
    threshold: float = 0.5,
    batch_size: int = 8,
    device: str = "cpu",
    tracking: TrackingSettings | None = None,
) -> PredictResult:
    """Asks one question about each picture.

    Args:
        images: picture files, at least one.
        question: the user's words.
        model_ref: a model folder, `models:/NAME@alias` or `models:/NAME/VERSION`.
        out_dir: gets `predictions.json` and one `…-overlay.png` per picture.
        max_new_tokens: longest answer.
        threshold: probability above which a pixel belongs to a target.
        batch_size: pictures answered together.
        device: where the model runs.
        tracking: which registry the reference is looked up in.

    Raises:
        ConfigError: `out_dir` is no folder of this machine, or `device` none that it has.
        DataError: a picture is absent or damaged; it is named, and those that can be read are answered before.
        ModelLoadError: the reference does not resolve to a whole model.
    """
    if "://" in str(out_dir):
        raise ConfigError(f"got --out {out_dir}; a few pictures are written to a folder; --in writes to stores as well")
    contents = [_read(path) for path in images]
    from pixellm.model.engine import PixelLMEngine  # slow import (transformers)

    folder = Path(out_dir)
    model_dir = registry.resolve(model_ref, tracking or TrackingSettings())
    folder.mkdir(parents=True, exist_ok=True)
    predictions: list[Prediction] = []
    problems: list[str] = []
    with PixelLMEngine.from_pretrained(model_dir, device=device, max_batch_size=batch_size) as engine:
        names = _output_names(images)
        for first in range(0, len(images), batch_size):
            chunk = range(first, min(first + batch_size, len(images)))
            usable = [number for number in chunk if _is_usable(engine, images[number], contents[number], problems)]
            results = _answer(engine, [contents[number] for number in usable], question, max_new_tokens, threshold)
            for number, result in zip(usable, results, strict=True):
                predictions.append(_keep(images[number], contents[number], question, result, folder / names[number]))
    outcome = PredictResult(question, str(model_ref), str(folder), tuple(predictions))
    (folder / PREDICTIONS_FILE).write_text(json.dumps(outcome.to_json_dict(), indent=1) + "\n", encoding="utf-8")
    if problems:
        raise DataError(
            f"{len(problems)} of {len(images)} pictures cannot be used: {'; '.join(problems)}; the answers about the "
            f"others are in {folder}"
        )
    return outcome


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the picture {path}: {error.strerror}; check the path") from None


def _is_usable(engine: Any, path: Path, content: bytes, problems: list[str]) -> bool:
    try:
        engine.processor.prepare_image(content)
    except DataError as error:
        problems.append(f"{path}: {error}")
        return False
    return True


def _answer(engine: Any, contents: Sequence[bytes], question: str, max_new_tokens: int, threshold: float) -> Any:
    from pixellm.model.engine.types import GenerationOptions, SegmentRequest

    options = GenerationOptions(max_new_tokens=max_new_tokens, threshold=threshold)
    return engine.segment_batch([SegmentRequest(content, question, options) for content in contents])


def _keep(path: Path, content: bytes, question: str, result: Any, overlay_path: Path) -> Prediction:
    from pixellm.model.images import open_rgb

    names = [target.phrase or f"target {target.index + 1}" for target in result.targets]
    masks = [target.mask for target in result.targets]
    draw_overlay(np.asarray(open_rgb(content)), masks, names, question=question).save(overlay_path)
    targets = tuple(
        PredictedTarget(
            index=target.index,
            phrase=target.phrase,
            score=float(target.score),
            box=target.box_xyxy,
            area=int(target.area_px),
            rle=target.rle,
        )
        for target in result.targets
    )
    return Prediction(str(path), result.text, str(overlay_path), targets)


def _output_names(images: Sequence[Path]) -> list[str]:
    """One file name per picture; pictures of the same name in different folders get a number."""
    names: list[str] = []
    for path in images:
        name, number = f"{path.stem}-overlay.png", 2
        while name in names:
            name, number = f"{path.stem}-{number}-overlay.png", number + 1
        names.append(name)
    return names
