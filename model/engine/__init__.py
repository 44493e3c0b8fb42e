"""The inference engine: a picture and a question in, words and masks out, many requests at a time.

`PixelLMEngine` is the whole public surface, with the plain data of `pixellm.model.engine.types`.
"""

from pixellm.model.engine.engine import PixelLMEngine
from pixellm.model.engine.types import (
    Done,
    GenerationOptions,
    SegmentationResult,
    SegmentRequest,
    StreamEvent,
    TargetDone,
    TargetMask,
    TextDelta,
    Usage,
)

__all__ = [
    "Done",
    "GenerationOptions",
    "PixelLMEngine",
    "SegmentRequest",
    "SegmentationResult",
    "StreamEvent",
    "TargetDone",
    "TargetMask",
    "TextDelta",
    "Usage",
]
