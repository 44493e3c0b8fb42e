"""From the settings to the model that trains: preset or model folder, LoRA, frozen parts; and the finished folder."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixellm.errors import ConfigError
from pixellm.platform import registry
from pixellm.platform.settings import ModelSettings, Settings, TrainSettings

if TYPE_CHECKING:
    from pixellm.model.modeling import PixelLMForConditionalGeneration
    from pixellm.model.processing import PixelLMProcessor


def build_processor(settings: Settings) -> "PixelLMProcessor":
    """The processor of the model that the settings describe.

    Raises:
        ConfigError: unknown preset or override.
        ModelLoadError: `model.init_from` is no whole model folder.
    """
    from pixellm.model.processing import PixelLMProcessor

    model = settings.model
    if model.init_from is not None:
        _refuse_overrides(model)
        return PixelLMProcessor.from_pretrained(registry.resolve(model.init_from, settings.tracking))
    return PixelLMProcessor.for_preset(model.preset, **model.overrides)


def build_model(settings: Settings) -> "PixelLMForConditionalGeneration":
    """The model with LoRA attached where asked for, its trainable parts set. The same seed draws the same weights.

    Raises:
        ConfigError: unknown preset or override, or settings that exclude each other.
        ModelLoadError: `model.init_from` is no whole model folder.
    """
    from pixellm.model.config import PixelLMConfig
    from pixellm.model.lora import attach_lora
    from pixellm.model.networks import build_network, load_network

    train, lora = settings.train, settings.train.lora
    torch.manual_seed(settings.seed)
    if settings.model.init_from is not None:
        _refuse_overrides(settings.model)
        folder = registry.resolve(settings.model.init_from, settings.tracking)
        model = load_network(folder, dtype=torch.float32)
    else:
        config = PixelLMConfig.from_preset(settings.model.preset, **settings.model.overrides)
        model = build_network(config)
    if lora.enabled:
        attach_lora(model, lora.r, lora.alpha, lora.dropout, lora.target_modules)
    model.set_trainable_parts(trained_parts(train))
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def trained_parts(train: TrainSettings) -> set[str]:
    """Names of the parts that a recipe trains; see `PixelLMForConditionalGeneration.part_of`.

    Raises:
        ConfigError: LoRA and all language weights at once.
    """
    if train.lora.enabled and train.train_language:
        raise ConfigError("train.lora.enabled and train.train_language exclude each other; switch one off")
    parts = {"projectors", "embeddings", "codebook", "decoder", "neck"}
    parts |= {"lora"} if train.lora.enabled else set()
    parts |= {"vision"} if train.train_vision else set()
    parts |= {"language"} if train.train_language else set()
    return parts


def saves_only_trainable(settings: Settings) -> bool:
    """Whether checkpoints leave frozen weights out: they do where those can be read from `model.init_from` again."""
    return settings.model.init_from is not None


def save_model_folder(
    model: "PixelLMForConditionalGeneration", weights: dict[str, Tensor], processor: "PixelLMProcessor", path: Path
) -> None:
    """Writes the folder that `from_pretrained` reads, LoRA merged, in one step.

    Args:
        model: gives config, buffers and the LoRA scaling; its own parameters are not looked at.
        weights: every parameter by name, on the CPU.
        processor: saved beside the weights.
        path: an older folder there is replaced.
    """
    from pixellm.model.lora import has_lora, lora_scaling, merge_state_dict
    from pixellm.model.networks import meta_network

    parameters = {name for name, _ in model.named_parameters()}
    buffers = {name: value.detach().cpu() for name, value in model.state_dict().items() if name not in parameters}
    state: dict[str, Any] = weights | buffers
    if has_lora(model):
        state = merge_state_dict(state, lora_scaling(model))
    plain = meta_network(model.config)
    plain.load_state_dict(state, assign=True)
    writing = path.with_name(f".writing-{path.name}")
    shutil.rmtree(writing, ignore_errors=True)
    plain.save_pretrained(writing)
    processor.save_pretrained(writing)
    shutil.rmtree(path, ignore_errors=True)
    writing.rename(path)


def _refuse_overrides(model: ModelSettings) -> None:
    if model.overrides:
        raise ConfigError(
            f"model.init_from brings its own config; remove model.overrides ({', '.join(model.overrides)})"
        )
