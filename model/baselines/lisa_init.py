"""How LISA's own training starts: a LLaVA-1.5 (or a Llama), a CLIP and a Segment Anything become a model folder."""

from os import PathLike
from typing import Any

from transformers import SamConfig

from pixellm.model.assemble import AssemblyReport, read_config, read_vision_config, resolve_folder
from pixellm.model.baselines.lisa_config import LisaConfig
from pixellm.model.init import ExtraParts, init_model
from pixellm.model.weight_files import WeightFiles

_SAM_NAMES = (
    ("vision_encoder.", "sam_encoder."),
    ("mask_decoder.", "decoder.mask_decoder."),
    ("prompt_encoder.no_mask_embed.", "decoder.no_mask_embed."),
    ("shared_image_embedding.positional_embedding", "decoder.positions.matrix"),
)


def init_lisa(
    llm: str | PathLike[str],
    vision: str | PathLike[str],
    sam: str | PathLike[str],
    out: str | PathLike[str],
    *,
    projector: str = "llava",
    **options: Any,
) -> AssemblyReport:
    """Makes a model folder to train LISA from; `[SEG]` and its head are drawn.

    Args:
        llm: folder or Hugging Face id of a LLaVA-1.5 or a Llama, with its tokenizer.
        vision: folder or id of its CLIP tower.
        sam: folder or id of a Segment Anything in transformers' layout (`facebook/sam-vit-huge`).
        out: folder to make.
        projector: `"llava"` takes LLaVA's own and keeps it frozen, as released; `"new"` draws one and trains it.
        **options: as of `init_model`, and fields of `LisaConfig`, such as `variant`.

    Raises:
        ModelLoadError: a source that lacks weights or files, or holds unknown ones.
        ConfigError: `out` exists, or options that do not fit together.
    """
    sam_folder, vision_folder = resolve_folder(sam), resolve_folder(vision)
    source, tower = WeightFiles.find(sam_folder), WeightFiles.find(vision_folder)
    sam_config = SamConfig.from_dict(read_config(sam_folder))
    clip = read_vision_config(vision_folder, tower.shapes())
    names = {key: name for key in source.shapes() if (name := sam_name(key)) is not None}
    fields = {
        "sam_config": sam_config.to_dict(),
        "decoder_hidden_size": sam_config.mask_decoder_config.hidden_size,
        "decoder_num_heads": sam_config.mask_decoder_config.num_attention_heads,
        "image_token_grid": int(clip["image_size"]) // int(clip["patch_size"]),
        "projector_type": "mlp",
        "clip_view": "crop",
        "freeze_projector": projector == "llava",
    }
    return init_model(
        llm,
        vision,
        out,
        tokens_per_scale=1,
        num_scales=1,
        image_size=int(sam_config.vision_config.image_size),
        projector=projector,
        extra=ExtraParts(source, names, LisaConfig),
        **(fields | options),
    )


def sam_name(key: str) -> str | None:
    """Our name of a weight of transformers' SamModel, or None for prompts that LISA does not give."""
    for theirs, ours in _SAM_NAMES:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return None
