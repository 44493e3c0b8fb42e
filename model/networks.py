"""Which network a configuration or a model folder is of: PixelLM, or a baseline built like it."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from pixellm.errors import ModelLoadError
from pixellm.model.baselines.lisa import LisaForConditionalGeneration
from pixellm.model.baselines.lisa_config import LisaConfig
from pixellm.model.config import PixelLMConfig
from pixellm.model.modeling import PixelLMForConditionalGeneration

NETWORKS = (PixelLMConfig.model_type, LisaConfig.model_type)
"""`model_type` of the networks that generate an answer with masks in it, and train."""


def build_network(config: PixelLMConfig) -> PixelLMForConditionalGeneration:
    """A new network of a configuration, initial values drawn from torch's generator."""
    return network_class(config.model_type)(config)


def load_network(path: str | PathLike[str], **kwargs: Any) -> PixelLMForConditionalGeneration:
    """Loads a model folder of either kind; see `PixelLMForConditionalGeneration.from_pretrained`."""
    return network_class(model_type_of(path)).from_pretrained(path, **kwargs)


def load_config(path: str | PathLike[str]) -> PixelLMConfig:
    """A model folder's configuration."""
    config: PixelLMConfig = network_class(model_type_of(path)).config_class.from_pretrained(path)
    return config


def meta_network(config: PixelLMConfig) -> PixelLMForConditionalGeneration:
    """The network without memory behind its weights."""
    with torch.device("meta"):
        return build_network(config)


def network_class(model_type: str) -> type[PixelLMForConditionalGeneration]:
    """The class of a `model_type`; PixelLM's where it is no baseline's."""
    return LisaForConditionalGeneration if model_type == LisaConfig.model_type else PixelLMForConditionalGeneration


def model_type_of(path: str | PathLike[str]) -> str:
    """`model_type` in a folder's `config.json`; empty where there is no such file.

    Raises:
        ModelLoadError: the file is no JSON object.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        return ""
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get("model_type", ""))
    except (ValueError, AttributeError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}; copy the model folder again") from error
