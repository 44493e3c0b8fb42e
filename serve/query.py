"""`pixellm query`: one question to a running service; its words, its targets, and on request its masks as files."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pixellm.platform.overlay import draw_overlay
from pixellm.platform.settings import from_environment
from pixellm.serve.client import PixelLMClient, RemoteResult


@dataclass(frozen=True)
class QueryReport:
    """An answer over HTTP, and the files that were written of it."""

    result: RemoteResult
    files: tuple[str, ...]

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON; masks as COCO RLE."""
        result = self.result
        targets = [
            {
                "index": target.index,
                "phrase": target.phrase,
                "score": target.score,
                "box": target.box_xyxy,
                "area": target.area_px,
                "rle": target.rle,
            }
            for target in result.targets
        ]
        about = {"id": result.id, "model": result.model, "version": result.model_version}
        return about | {"text": result.text, "targets": targets, "files": list(self.files)}

    def to_text(self) -> str:
        """The words, one line per target, the files."""
        lines = [self.result.text]
        for target in self.result.targets:
            box = "empty" if target.box_xyxy is None else " ".join(f"{edge:.0f}" for edge in target.box_xyxy)
            lines.append(
                f"  [{target.index + 1}] {target.phrase or 'target'}: score {target.score:.2f}, {target.area_px} px, "
                f"box {box}"
            )
        return "\n".join([*lines, *(f"  {file}" for file in self.files)])


def query(
    image: Path, question: str, *, url: str, out_dir: Path | None = None, api_key: str | None = None
) -> QueryReport:
    """Asks a running service.

    Args:
        image: picture file.
        question: the words.
        url: of the service.
        out_dir: gets `NAME-overlay.png` and `NAME-mask-K.png` (1 bit, white inside); None writes nothing.
        api_key: None takes `PIXELLM_API_KEY`.

    Raises:
        DataError: the file cannot be read.
        ServingError: the service refuses, or cannot be reached.
    """
    with PixelLMClient(url, api_key=api_key or from_environment().get("PIXELLM_API_KEY")) as client:
        result = client.segment(image, question)
    return QueryReport(result, () if out_dir is None else _write(image, result, out_dir))


def _write(image: Path, result: RemoteResult, out_dir: Path) -> tuple[str, ...]:
    out_dir.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(image.read_bytes())) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    overlay = out_dir / f"{image.stem}-overlay.png"
    names = [target.phrase or f"target {target.index + 1}" for target in result.targets]
    masks = [target.mask for target in result.targets]
    draw_overlay(np.asarray(picture), masks, names).save(overlay)
    files = [str(overlay)]
    for target in result.targets:
        path = out_dir / f"{image.stem}-mask-{target.index + 1}.png"
        Image.fromarray(target.mask).save(path)
        files.append(str(path))
    return tuple(files)
