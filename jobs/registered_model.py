"""The code of a registered version: an MLflow pyfunc that answers questions about pictures, in words and RLE masks.

MLflow copies this file beside the model folder and executes it where a version is loaded (`mlflow.pyfunc.load_model`,
`mlflow models serve`): a plain process, without Ray. Pictures come as encoded bytes (JSON: base64 text).
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from pixellm.errors import DataError
from pixellm.model.engine import GenerationOptions, PixelLMEngine, SegmentationResult, SegmentRequest


class RegisteredPixelLM(PythonModel):
    """Loads `PixelLMEngine` from the version's model folder and runs each row of the input through it."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the engine on `model_config["device"]` (default "cpu")."""
        options = dict(context.model_config or {})
        self._engine = PixelLMEngine.from_pretrained(context.artifacts["model"], device=options.get("device", "cpu"))

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Answers each row.

        Args:
            model_input: columns `image` (encoded picture: bytes, or base64 text) and `prompt` (words).
            params: `threshold` (probability, 0–1) and `max_new_tokens`.

        Returns:
            One dict per row: `text`, and `targets` with index, phrase, score (0–1), box (x0, y0, x1, y1 in pixels, or
            empty), area in pixels and rle (COCO: size [height, width], counts).

        Raises:
            DataError: an image is neither an encoded picture nor its base64 text.
            BadRequestError: a parameter is out of range.
        """
        options = GenerationOptions(**dict(params or {}))
        requests = [
            SegmentRequest(_encoded_picture(row.image), str(row.prompt), options) for row in model_input.itertuples()
        ]
        return [_answer(result) for result in self._engine.segment_batch(requests)]


def _encoded_picture(image: bytes | str) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return base64.b64decode(image.rpartition("base64,")[2], validate=True)
    except binascii.Error:
        raise DataError("image is neither the bytes of a picture (JPEG, PNG, …) nor base64 text of them") from None


def _answer(result: SegmentationResult) -> dict[str, Any]:
    targets = [
        {
            "index": target.index,
            "phrase": target.phrase,
            "score": float(target.score),
            "box": [float(edge) for edge in target.box_xyxy or ()],
            "area": int(target.area_px),
            "rle": target.rle,
        }
        for target in result.targets
    ]
    return {"text": result.text, "targets": targets}


set_model(RegisteredPixelLM())
