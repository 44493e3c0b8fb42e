"""The authors' released weights → ours, in memory (`from_official`) or shard by shard (`convert_official`).

Nothing is guessed silently: every released key must be known, present and of its shape, or one error lists all that
are not.
"""

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixellm.errors import ModelLoadError
from pixellm.model.assemble import (
    AssemblyReport,
    ModelFolderWriter,
    copy_file,
    load_tokenizer,
    new_folder,
    read_config,
    read_vision_config,
    resolve_folder,
    weight_shapes,
)
from pixellm.model.config import PixelLMConfig
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.official import (
    Shapes,
    config_from_official,
    guess_vision_config,
    is_weight,
    list_problems,
    new_parameters,
    official_shapes,
    shapes_of,
    vision_name,
)
from pixellm.model.processing import PixelLMProcessor
from pixellm.model.tokenization import add_codebook_tokens
from pixellm.model.weight_files import WeightFiles

_OWN_PARAMETERS = ("codebook.fusion.", "decoder.scale_fusion.")


def from_official(
    state_dict: Mapping[str, Tensor],
    official_config: Mapping[str, Any],
    *,
    tokens_per_scale: int,
    num_scales: int,
    vision_state_dict: Mapping[str, Tensor] | None = None,
    vision_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PixelLMForConditionalGeneration:
    """Builds our model from a released state dict.

    Args:
        state_dict: weights under the released names.
        official_config: the released `config.json` as a dict, or the nested form of `tests/golden`.
        tokens_per_scale: N (the released 7B and 13B: 3).
        num_scales: L (2).
        vision_state_dict: the CLIP tower in Hugging Face names (a whole CLIP checkpoint will do).
        vision_config: the tower's configuration; read from `official_config["vision"]`, else off the weights.
        dtype: of the model.
        **overrides: fields of `PixelLMConfig` (`codebook_token_ids`, `token_fusion="learned"`, …).

    Raises:
        ModelLoadError: unknown, missing or mis-shaped keys, all of them listed; or no vision tower.
    """
    if vision_state_dict is None:
        raise ModelLoadError(
            "released checkpoints do not hold the vision tower; pass vision_state_dict, the weights of the CLIP tower "
            "that it was trained on (CLIP-ViT-L/14-336 for the 7B and 13B releases)"
        )
    vision_shapes = {key: shape for key, shape in shapes_of(vision_state_dict).items() if vision_name(key)}
    fields = vision_config or official_config.get("vision") or guess_vision_config(vision_shapes)
    config = config_from_official(
        shapes_of(state_dict), official_config, fields, tokens_per_scale, num_scales, **overrides
    )
    names = check_official(shapes_of(state_dict), vision_shapes, config)
    weights = {names[key]: tensor for key, tensor in state_dict.items() if key in names}
    weights |= {name: tensor for key, tensor in vision_state_dict.items() if (name := vision_name(key)) is not None}
    for name, shape in weight_shapes(config).items():
        if name.startswith(_OWN_PARAMETERS):
            weights[name] = new_parameters(name, shape, config)
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    return PixelLMForConditionalGeneration.from_weights(config, weights, dtype)


def check_official(found: Shapes, vision_found: Shapes, config: PixelLMConfig) -> dict[str, str]:
    """Checks a released checkpoint and its tower against our shapes.

    Args:
        found: shapes by released name.
        vision_found: shapes of the tower by Hugging Face name.
        config: ours.

    Returns:
        Our name by released name, of the weights that we keep.

    Raises:
        ModelLoadError: listing every unknown, missing and mis-shaped key of both.
    """
    shapes = weight_shapes(config)
    kept = {name: shape for name, shape in shapes.items() if not name.startswith(_OWN_PARAMETERS)}
    names, expected = official_shapes(kept, config)
    tower = {name: shape for name, shape in shapes.items() if name.startswith("vision_tower.")}
    tower_found = {str(vision_name(key)): shape for key, shape in vision_found.items()}
    problems = list_problems(found, expected) + list_problems(tower_found, tower)
    if problems:
        raise ModelLoadError(
            "the checkpoint cannot be converted; keys " + "; ".join(problems) + ". Wanted a merged PixelLM release "
            f"with {config.tokens_per_scale} tokens per scale and {config.num_scales} scales, and its CLIP tower"
        )
    return names


def convert_official(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    vision: str | PathLike[str],
    *,
    tokens_per_scale: int,
    num_scales: int,
    tokenizer: str | PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> AssemblyReport:
    """Converts a released checkpoint on disk, shard by shard.

    Memory stays near one shard: shapes are checked from headers, then every shard is written under our names.

    Args:
        src: folder with the released `config.json` and weights (`.bin` or `.safetensors`, sharded or not).
        dst: folder to make.
        vision: folder or Hugging Face id of the CLIP tower (`openai/clip-vit-large-patch14-336`).
        tokens_per_scale: N (the released 7B and 13B: 3).
        num_scales: L (2).
        tokenizer: folder with the tokenizer; `src` where None. Codebook ids are looked up in it by name.
        dtype: to store weights in; None keeps each as it is.
        **overrides: fields of `PixelLMConfig`.

    Raises:
        ModelLoadError: unknown, missing or mis-shaped keys, all of them listed.
        ConfigError: `dst` exists.
    """
    source, tower_folder = WeightFiles.find(Path(src)), resolve_folder(vision)
    tower = WeightFiles.find(tower_folder)
    found = {key: shape for key, shape in source.shapes().items() if is_weight(key)}
    vision_found = {key: shape for key, shape in tower.shapes().items() if vision_name(key)}
    processor_tokenizer = load_tokenizer(Path(tokenizer or src))
    if processor_tokenizer is not None:
        ids = add_codebook_tokens(processor_tokenizer, tokens_per_scale, num_scales)
        found_ids = {"codebook_token_ids": list(ids.codebook), "im_start_id": ids.im_start, "im_end_id": ids.im_end}
        overrides = found_ids | overrides
    config = config_from_official(
        found,
        read_config(Path(src)),
        read_vision_config(tower_folder, vision_found),
        tokens_per_scale,
        num_scales,
        **overrides,
    )
    names = check_official(found, vision_found, config)
    with new_folder(dst) as folder:
        writer = ModelFolderWriter(folder, config, weight_shapes(config))
        for file in source.files:
            copy_file(writer, source, file, names, dtype)
        for file in tower.files:
            copy_file(writer, tower, file, {key: str(vision_name(key)) for key in vision_found}, dtype)
        own = {name: shape for name, shape in writer.wanted.items() if name.startswith(_OWN_PARAMETERS)}
        writer.add_all({name: new_parameters(name, shape, config) for name, shape in own.items()})
        if processor_tokenizer is not None:
            PixelLMProcessor.for_config(config, processor_tokenizer).save_pretrained(folder)
        unused = tuple(sorted(found.keys() - names.keys()))
        report = writer.finish(unused=unused, has_tokenizer=processor_tokenizer is not None)
    return replace(report, path=str(dst))
