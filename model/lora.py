"""LoRA on the language model: attach, train, save the adapter alone, merge, export (paper Sec. 5.1: r 8 on q and v).

The adapter is injected in place, so a model with LoRA still is a `PixelLMForConditionalGeneration`. Only the language
model gets one: the vision tower's layers bear the same names and stay as they are.
"""

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixellm.errors import ConfigError, ModelLoadError

if TYPE_CHECKING:
    from pixellm.model.modeling import PixelLMForConditionalGeneration

ADAPTER = "default"
WEIGHTS_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_LORA_KEY = re.compile(rf"\.lora_(?P<side>[AB])\.{ADAPTER}\.weight$")


def attach_lora(
    model: "PixelLMForConditionalGeneration",
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.05,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
) -> "PixelLMForConditionalGeneration":
    """Puts LoRA layers into the language model and freezes what they stand on.

    Args:
        model: changed in place.
        r: rank.
        alpha: scaling; the update is `alpha / r · B A`.
        dropout: on the adapter's input.
        target_modules: names of linear layers of the language model.

    Returns:
        The same model: `lora` trains, `language` does not, other parts are as they were.

    Raises:
        ConfigError: an adapter is there already, or a name matches no layer.
    """
    from peft import LoraConfig  # slow import

    names = "|".join(re.escape(name) for name in target_modules)
    pattern = rf"language_model\..*\.({names})"
    return _inject(model, LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern))


def has_lora(model: nn.Module) -> bool:
    """Whether LoRA layers are attached."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


def merge_lora(model: "PixelLMForConditionalGeneration") -> "PixelLMForConditionalGeneration":
    """Adds the adapter to the weights and takes its layers out, in place; returns the same model."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # slow import

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def merge_state_dict(state_dict: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Merges an adapter inside a state dict: what a model without LoRA layers would hold.

    Args:
        state_dict: of a model with LoRA attached.
        scaling: `alpha / r`.

    Returns:
        Plain names, `W + scaling · B A`, computed in fp32 and kept in W's dtype. Tensors that do not change are shared.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if _LORA_KEY.search(name):
            continue
        plain = name.replace(".base_layer.", ".")
        stem = name.removesuffix(".base_layer.weight")
        a = state_dict.get(f"{stem}.lora_A.{ADAPTER}.weight")
        b = state_dict.get(f"{stem}.lora_B.{ADAPTER}.weight")
        if a is None or b is None:
            merged[plain] = tensor
        else:
            update = scaling * (b.detach().float() @ a.detach().float())
            merged[plain] = (tensor.detach().float() + update).to(tensor.dtype)
    return merged


def lora_scaling(model: nn.Module) -> float:
    """`alpha / r` of the attached adapter.

    Raises:
        ConfigError: none is attached.
    """
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if config is None:
        raise ConfigError("the model has no LoRA adapter; call attach_lora or load_adapter first")
    return float(config.lora_alpha) / int(config.r)


def save_adapter(model: nn.Module, path: str | PathLike[str]) -> None:
    """Writes the adapter alone, in PEFT's layout (`adapter_config.json`, `adapter_model.safetensors`).

    Args:
        model: with LoRA attached.
        path: folder, made where it does not exist.

    Raises:
        ConfigError: no adapter is attached.
    """
    lora_scaling(model)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.peft_config[ADAPTER]  # type: ignore[index, union-attr]
    config.save_pretrained(folder)
    weights = {
        _PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    save_file(weights, folder / WEIGHTS_FILE)


def load_adapter(
    model: "PixelLMForConditionalGeneration", path: str | PathLike[str]
) -> "PixelLMForConditionalGeneration":
    """Attaches an adapter written by `save_adapter`, in place; returns the same model.

    Raises:
        ModelLoadError: a file is missing, or its weights do not fit the model.
        ConfigError: the model has an adapter already.
    """
    from peft import LoraConfig  # slow import

    folder = Path(path)
    if not (folder / WEIGHTS_FILE).is_file() or not (folder / "adapter_config.json").is_file():
        raise ModelLoadError(f"{folder} holds no adapter: wanted adapter_config.json and {WEIGHTS_FILE}")
    _inject(model, LoraConfig.from_pretrained(str(folder)))
    stored = load_file(folder / WEIGHTS_FILE)
    mine = {
        _PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    wrong = sorted(mine.keys() ^ stored.keys())
    wrong += sorted(key for key in mine.keys() & stored.keys() if mine[key].shape != stored[key].shape)
    if wrong:
        raise ModelLoadError(f"the adapter in {folder} does not fit this model: {', '.join(wrong)}")
    with torch.no_grad():
        for key, parameter in mine.items():
            parameter.copy_(stored[key])
    return model


def _inject(model: "PixelLMForConditionalGeneration", lora_config: Any) -> "PixelLMForConditionalGeneration":
    from peft import inject_adapter_in_model  # slow import

    if has_lora(model):
        raise ConfigError("the model has a LoRA adapter already; merge_lora it before attaching another")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        inject_adapter_in_model(lora_config, model, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError(f"LoRA could not be attached: {error}") from error
    model.train(model.training)  # new layers start in training mode, with dropout
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        part = model.part_of(name)
        parameter.requires_grad_(part == "lora" or (part != "language" and plain in trainable))
    return model
