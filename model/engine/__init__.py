"""The inference engine: a picture and a question in, words and masks out, many requests at a time.

`PixelLMEngine` is the whole public surface, with the plain data of `pixellm.model.engine.types`.
"""

from pixellm.model.engine.engine import EngineStats, PixelLMEngine
from pixellm.model.engine.options import EngineOptions
from pixellm.model.engine.scheduler import SchedulerLimits
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
    "EngineOptions",
    "EngineStats",
    "GenerationOptions",
    "PixelLMEngine",
    "SchedulerLimits",
    "SegmentRequest",
    "SegmentationResult",
    "StreamEvent",
    "TargetDone",
    "TargetMask",
    "TextDelta",
    "Usage",
]
