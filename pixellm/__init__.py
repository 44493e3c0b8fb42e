"""PixelLM as a platform: ask a picture a question, get words and a mask for each thing they name.

The public Python API is exactly `__all__`. Names are resolved on first use, so that `import pixellm` (and
`pixellm --help`) does not pay for torch and transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pixellm.errors import PixelLMError

if TYPE_CHECKING:
    from pixellm.model.config import PixelLMConfig
    from pixellm.model.engine import PixelLMEngine, SegmentationResult, TargetMask
    from pixellm.model.modeling import PixelLMForConditionalGeneration
    from pixellm.model.processing import PixelLMProcessor
    from pixellm.serve.client import PixelLMClient

__version__ = "0.1.0"

_HOMES = {
    "PixelLMConfig": "pixellm.model.config",
    "PixelLMForConditionalGeneration": "pixellm.model.modeling",
    "PixelLMProcessor": "pixellm.model.processing",
    "PixelLMEngine": "pixellm.model.engine",
    "SegmentationResult": "pixellm.model.engine",
    "TargetMask": "pixellm.model.engine",
    "PixelLMClient": "pixellm.serve.client",
}

__all__ = [
    "PixelLMClient",
    "PixelLMConfig",
    "PixelLMEngine",
    "PixelLMError",
    "PixelLMForConditionalGeneration",
    "PixelLMProcessor",
    "SegmentationResult",
    "TargetMask",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pixellm' has no attribute {name!r}; the public names are {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
