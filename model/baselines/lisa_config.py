"""Configuration and sizes of LISA (arXiv 2308.00692), the baseline of the paper's Tables 1 to 3.

It is a `PixelLMConfig` with one codebook token, `[SEG]`, and a Segment Anything model in the place of the pixel
decoder, so processor, conversation, training job and engine take it as it is.
"""

from typing import Any

from transformers import SamConfig

from pixellm.errors import ConfigError
from pixellm.model.config import PixelLMConfig

VARIANTS = ("lisa", "lisa_aug")
CLIP_VIEWS = ("canvas", "crop")


class LisaConfig(PixelLMConfig):
    """Sizes, ids and options of one LISA; fields that it does not use keep PixelLM's meaning.

    Attributes:
        sam_config: the Segment Anything model; its encoder sees the canvas.
        variant: `"lisa"`: one mask for all that is asked for, in training and answers; `"lisa_aug"`: a `[SEG]` and a
            mask per target.
        clip_view: what the CLIP tower sees: `"canvas"`, resized to its size, or `"crop"`, the centre square of the
            picture in CLIP's own statistics (as released).
        freeze_projector: keep LLaVA's projector as it was loaded (as released).
    """

    model_type = "pixellm-lisa"
    sub_configs_defaults = {**PixelLMConfig.sub_configs_defaults, "sam_config": SamConfig}  # noqa: RUF012

    sam_config: SamConfig = None
    variant: str = "lisa"
    clip_view: str = "canvas"
    freeze_projector: bool = False
    tokens_per_scale: int = 1
    num_scales: int = 1
    token_fusion: str = "mean"
    scale_fusion: str = "mean"
    target_refinement_alpha: float = 1.0
    projector_type: str = "linear"

    def __post_init__(self, **kwargs: Any) -> None:
        """Checks what SAM and the canvas must share."""
        super().__post_init__(**kwargs)
        for field, choices in (("variant", VARIANTS), ("clip_view", CLIP_VIEWS)):
            if getattr(self, field) not in choices:
                raise ConfigError(f"{field} is {getattr(self, field)!r}; choose one of {', '.join(choices)}")
        sam = self.sam_config
        wanted = {
            "image_size": (self.image_size, sam.vision_config.image_size),
            "decoder_hidden_size": (self.decoder_hidden_size, sam.vision_config.output_channels),
            "decoder_hidden_size (mask decoder)": (self.decoder_hidden_size, sam.mask_decoder_config.hidden_size),
            "tokens_per_scale · num_scales": (self.group_size, 1),
        }
        for field, (ours, theirs) in wanted.items():
            if ours != theirs:
                raise ConfigError(f"{field} is {ours}, LISA's SAM and [SEG] token want {theirs}")

    @property
    def clip_size(self) -> int:
        """Side in pixels of what the CLIP tower sees: its own."""
        return int(self.vision_config.image_size)

    @property
    def mask_grid(self) -> int:
        """Side of SAM's mask logits: four times its grid of patches."""
        return 4 * (self.image_size // int(self.sam_config.vision_config.patch_size))

    @property
    def decoder_positions(self) -> int:
        """Positions of SAM's map."""
        return (self.mask_grid // 4) ** 2

    @property
    def merges_targets(self) -> bool:
        """Whether an answer has one mask for all that is asked for."""
        return self.variant == "lisa"


def sam_fields(width: int, layers: int, heads: int, global_layers: list[int], **more: Any) -> dict[str, Any]:
    """`sam_config` of a SAM with this encoder; `more` has `image_size`, `window_size`, and `decoder` sizes if any."""
    decoder = more.pop("decoder", {})
    vision = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "mlp_dim": 4 * width,
        "global_attn_indexes": global_layers,
        "output_channels": decoder.get("hidden_size", 256),
        **more,
    }
    prompt = {"hidden_size": decoder.get("hidden_size", 256), "image_size": more.get("image_size", 1024)}
    return {"vision_config": vision, "mask_decoder_config": decoder, "prompt_encoder_config": prompt}


SAM_VIT_H = sam_fields(1280, 32, 16, [7, 15, 23, 31], image_size=1024)


def lisa_tiny(towers: dict[str, Any]) -> dict[str, Any]:
    """LISA around PixelLM tiny's towers and decoder width, with a small SAM encoder beside them."""
    decoder = {"hidden_size": 64, "mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 64}
    sam = sam_fields(128, 6, 4, [1, 3, 5], image_size=192, window_size=6, decoder=decoder)
    return towers | {"sam_config": sam, "vision_feature_layers": [-2], "projector_type": "mlp"} | _ONE_TOKEN


def lisa_full(towers: dict[str, Any]) -> dict[str, Any]:
    """LISA as released: LLaVA on CLIP-ViT-L/14 at 224 pixels, SAM ViT-H at 1024."""
    vision = towers["vision_config"] | {"image_size": 224}
    fields = {"vision_config": vision, "vision_feature_layers": [-2], "image_size": 1024, "image_token_grid": 16}
    return towers | fields | {"sam_config": SAM_VIT_H, "clip_view": "crop", "freeze_projector": True} | _ONE_TOKEN


_ONE_TOKEN = {"num_scales": 1, "tokens_per_scale": 1}
