"""Load integrity: a model folder is whole or refused.

transformers only warns about weights that are missing or left over, and the commonest silent failure of grounding
models is masks of noise from weights that were never loaded.
"""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pixellm.errors import ModelLoadError


def load_with_info(load: Callable[..., Any], path: str | PathLike[str], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Calls transformers' `from_pretrained` for a local folder and returns the model with its loading info.

    Raises:
        ModelLoadError: the folder or its weights are not there, or cannot be read.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"{folder} is no model folder: it has no config.json; give a folder written by save_pretrained, or import "
            "weights with `pixellm convert official` or `pixellm init`"
        )
    kwargs["output_loading_info"] = True
    try:
        model, info = load(folder, *args, ignore_mismatched_sizes=True, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(f"{folder} could not be loaded: {error}") from error
    return model, info


def check_loading_info(path: str | PathLike[str], info: dict[str, Any]) -> None:
    """Raises ModelLoadError that lists every missing, unexpected and mis-shaped weight."""
    problems = [
        f"{kind} {sorted(str(key) for key in info[field])}"
        for field, kind in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unexpected"),
            ("mismatched_keys", "of another shape"),
            ("error_msgs", "unreadable"),
        )
        if info.get(field)
    ]
    if problems:
        raise ModelLoadError(
            f"{path} is not a whole model: weights {'; '.join(problems)}. Save it again with save_pretrained, or "
            "convert the original weights anew"
        )
