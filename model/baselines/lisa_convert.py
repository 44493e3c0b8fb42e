"""Released LISA checkpoints → ours, shard by shard (`pixellm convert lisa`).

Their layout: LLaVA's keys, `model.text_hidden_fcs.0.*`, and Segment Anything under its authors' names in
`model.visual_model.*`. The CLIP tower comes from elsewhere. Sizes are read off the shapes; nothing is guessed silently.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

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
from pixellm.model.baselines.lisa_config import LisaConfig, sam_fields
from pixellm.model.official import is_weight, list_problems, vision_name
from pixellm.model.processing import PixelLMProcessor
from pixellm.model.tokenization import add_codebook_tokens
from pixellm.model.weight_files import Shapes, WeightFiles

_SAM = "model.visual_model."
_TEXT_FIELDS = ("rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "num_key_value_heads")
_SAM_DECODER_HEADS = 8
#: Parts of SAM that a prompt of one embedding never reaches.
_UNUSED = re.compile(
    re.escape(_SAM)
    + r"(?:prompt_encoder\.(?:point_embeddings|not_a_point_embed|mask_downscaling)\.|pixel_(?:mean|std)$)"
)
_RENAMED = (
    (r"^model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model."),
    (r"^model\.mm_projector\.(?=weight|bias)", "image_projector.layers.0."),
    (r"^model\.mm_projector\.", "image_projector.layers."),
    (r"^model\.text_hidden_fcs\.0\.", "codebook.head."),
    (r"^model\.visual_model\.image_encoder\.", "sam_encoder."),
    (r"^model\.visual_model\.mask_decoder\.", "decoder.mask_decoder."),
    (r"^model\.visual_model\.prompt_encoder\.no_mask_embed\.", "decoder.no_mask_embed."),
    (
        r"^model\.visual_model\.prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
        "decoder.positions.matrix",
    ),
    (r"^(sam_encoder\.patch_embed\.)proj\.", r"\1projection."),
    (r"^(sam_encoder\.)blocks\.", r"\1layers."),
    (r"^(sam_encoder\.neck\.)0\.", r"\1conv1."),
    (r"^(sam_encoder\.neck\.)1\.", r"\1layer_norm1."),
    (r"^(sam_encoder\.neck\.)2\.", r"\1conv2."),
    (r"^(sam_encoder\.neck\.)3\.", r"\1layer_norm2."),
    (r"^(sam_encoder\.|decoder\.)(.*)\.norm(\d|_final)", r"\1\2.layer_norm\3"),
    (r"^(decoder\.mask_decoder\.)output_upscaling\.0\.", r"\1upscale_conv1."),
    (r"^(decoder\.mask_decoder\.)output_upscaling\.1\.", r"\1upscale_layer_norm."),
    (r"^(decoder\.mask_decoder\.)output_upscaling\.3\.", r"\1upscale_conv2."),
    (r"^(decoder\.mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head)\.)layers\.0\.", r"\1proj_in."),
    (r"^(decoder\.mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head)\.)layers\.2\.", r"\1proj_out."),
    (r"^(decoder\.mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head)\.)layers\.1\.", r"\1layers.0."),
)


def lisa_name(key: str) -> str:
    """Our name of a released key."""
    for pattern, ours in _RENAMED:
        key = re.sub(pattern, ours, key)
    return key


def convert_lisa(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    vision: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> AssemblyReport:
    """Converts a released checkpoint on disk; memory stays near one shard.

    Args:
        src: folder with the released `config.json` and merged weights (`xinlai/LISA-7B-v1`).
        dst: folder to make.
        vision: folder or Hugging Face id of the CLIP tower (`openai/clip-vit-large-patch14`).
        tokenizer: folder with the tokenizer; `src` where None. Ids of `[SEG]`, `<im_start>`, `<im_end>` come from it.
        dtype: to store weights in; None keeps each as it is.
        **overrides: fields of `LisaConfig`, such as `variant`.

    Raises:
        ModelLoadError: unknown, missing or mis-shaped keys, all of them listed.
        ConfigError: `dst` exists.
    """
    tower_folder = resolve_folder(vision)
    source, tower = WeightFiles.find(resolve_folder(src)), WeightFiles.find(tower_folder)
    found = {key: shape for key, shape in source.shapes().items() if is_weight(key) and "vision_tower." not in key}
    names = {key: lisa_name(key) for key in found if not _UNUSED.match(key)}
    vision_names = {key: str(vision_name(key)) for key in tower.shapes() if vision_name(key) is not None}
    vision_shapes = {key: shape for key, shape in tower.shapes().items() if key in vision_names}
    words = load_tokenizer(Path(tokenizer or source.folder))
    if words is not None:
        ids = add_codebook_tokens(words, 1, 1)
        found_ids = {"codebook_token_ids": list(ids.codebook), "im_start_id": ids.im_start, "im_end_id": ids.im_end}
        overrides = found_ids | overrides
    shapes = {names[key]: shape for key, shape in found.items() if key in names}
    vision_fields = read_vision_config(tower_folder, vision_shapes)
    config = config_from_lisa(shapes, read_config(source.folder), vision_fields, **overrides)
    wanted = weight_shapes(config)
    all_found = shapes | {vision_names[key]: shape for key, shape in vision_shapes.items()}
    if problems := list_problems(all_found, wanted):
        raise ModelLoadError(
            "the checkpoint cannot be converted; weights, by our names, " + "; ".join(problems) + ". Wanted a merged "
            "LISA release and its CLIP tower"
        )
    with new_folder(dst) as folder:
        writer = ModelFolderWriter(folder, config, wanted)
        for file in source.files:
            copy_file(writer, source, file, names, dtype)
        for file in tower.files:
            copy_file(writer, tower, file, vision_names, dtype)
        if words is not None:
            PixelLMProcessor.for_config(config, words).save_pretrained(folder)
        unused = tuple(sorted(found.keys() - names.keys()))
        report = writer.finish(unused=unused, has_tokenizer=words is not None)
    return replace(report, path=str(dst))


def config_from_lisa(
    shapes: Shapes, released: Mapping[str, Any], vision_fields: Mapping[str, Any], **overrides: Any
) -> LisaConfig:
    """Reads the configuration off a checkpoint.

    Args:
        shapes: by our name; widths, depths, SAM's windows and heads come from here.
        released: its `config.json`, Llama's fields.
        vision_fields: of the CLIP tower's configuration.
        **overrides: fields of `LisaConfig`.

    Raises:
        ModelLoadError: keys without which no size can be read.
    """
    try:
        vocab_size, width = shapes["language_model.embed_tokens.weight"]
        text = {key: released[key] for key in _TEXT_FIELDS if released.get(key) is not None}
        text |= {
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": shapes["language_model.layers.0.mlp.gate_proj.weight"][0],
            "num_hidden_layers": _count(shapes, r"language_model\.layers\.(\d+)\."),
            "num_attention_heads": released["num_attention_heads"],
            "bos_token_id": released.get("bos_token_id", 1),
            "eos_token_id": released.get("eos_token_id", 2),
            "pad_token_id": released.get("pad_token_id") or 0,
        }
        sam, image_size = _sam_fields(shapes)
    except KeyError as error:
        raise ModelLoadError(f"the checkpoint lacks {error}; wanted all weights of a merged LISA release") from None
    projector = shapes.get("image_projector.layers.2.weight")
    fields = {
        "text_config": text,
        "vision_config": dict(vision_fields),
        "sam_config": sam,
        "image_size": image_size,
        "decoder_hidden_size": sam["mask_decoder_config"]["hidden_size"],
        "decoder_num_heads": sam["mask_decoder_config"]["num_attention_heads"],
        "vision_feature_layers": [-2],
        "image_token_grid": int(vision_fields["image_size"]) // int(vision_fields["patch_size"]),
        "projector_type": "linear" if projector is None else "mlp",
        "projector_hidden_size": width if projector is None else projector[1],
        "clip_view": "crop",
        "freeze_projector": True,
        "codebook_token_ids": [vocab_size - 3],
    }
    return LisaConfig(**(fields | overrides))


def _sam_fields(shapes: Shapes) -> tuple[dict[str, Any], int]:
    """`sam_config` and the canvas: a table of relative positions has 2·side − 1 rows of a head's width."""
    _, grid, _, width = shapes["sam_encoder.pos_embed"]
    patch_size = shapes["sam_encoder.patch_embed.projection.weight"][2]
    layers = _count(shapes, r"sam_encoder\.layers\.(\d+)\.")
    tables = [shapes[f"sam_encoder.layers.{layer}.attn.rel_pos_h"] for layer in range(layers)]
    sides = [(rows + 1) // 2 for rows, _ in tables]
    size = shapes["sam_encoder.neck.conv1.weight"][0]
    decoder = {
        "hidden_size": size,
        "mlp_dim": shapes["decoder.mask_decoder.transformer.layers.0.mlp.lin1.weight"][0],
        "num_hidden_layers": _count(shapes, r"decoder\.mask_decoder\.transformer\.layers\.(\d+)\."),
        "num_attention_heads": _SAM_DECODER_HEADS,
        "iou_head_hidden_dim": shapes["decoder.mask_decoder.iou_prediction_head.proj_in.weight"][0],
    }
    fields = sam_fields(
        width,
        layers,
        width // tables[0][1],
        [layer for layer, side in enumerate(sides) if side == grid],
        image_size=grid * patch_size,
        window_size=min(sides),
        patch_size=patch_size,
        mlp_dim=shapes["sam_encoder.layers.0.mlp.lin1.weight"][0],
        decoder=decoder,
    )
    return fields, grid * patch_size


def _count(shapes: Shapes, pattern: str) -> int:
    return max((int(match[1]) for key in shapes if (match := re.match(pattern, key))), default=-1) + 1
