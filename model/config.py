"""Everything that shapes a PixelLM network, saved as the model folder's `config.json`.

The options are the paper's (Sec. 3: N tokens per scale, L scales, learned or constant fusion φ and γ, refinement
weight α) and the released implementation's (position table with CLS at the wrong end, projector widths). Token ids are
stored here because assumed ids are how masks turn into noise with another tokenizer.
"""

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from pixellm.errors import ConfigError

IMAGE_TOKEN_ID = -200
"""Stands for one picture position in `input_ids`. Negative, so no text of any tokenizer can produce it."""

_CHOICES = {
    "projector_type": ("mlp", "linear"),
    "token_fusion": ("learned", "mean"),
    "scale_fusion": ("learned", "mean"),
    "new_parts_initializer": ("torch", "xavier"),
    "position_resize": ("correct", "released"),
}


class PixelLMConfig(PreTrainedConfig):
    """Sizes, ids and options of one PixelLM.

    Attributes:
        text_config: the language model (Llama).
        vision_config: the CLIP tower; its `image_size` is the size its position table was trained for.
        tokens_per_scale: N, codebook tokens per scale, 1 to 4.
        num_scales: L, scales of vision features, 1 to 3.
        image_size: S, side in pixels of the padded square canvas; a multiple of the patch size.
        vision_feature_layers: CLIP hidden-state indices, deepest first, one per scale (0 is the embedding output;
            negative ones count from the end, as transformers' `hidden_states`).
        image_token_grid: side of the grid of image tokens that the language model sees.
        projector_type: `"mlp"` (Linear, GELU, Linear) or `"linear"`, for both projectors.
        projector_hidden_size: hidden width of the MLP projectors.
        decoder_hidden_size: C, width of the pixel decoder.
        decoder_num_heads: attention heads of the pixel decoder.
        decoder_mlp_size: hidden width of its MLPs.
        decoder_depth: two-way blocks per scale.
        decoder_iou_head_size: hidden width of SAM's quality head, which no loss trains; None = decoder_hidden_size.
        token_fusion: φ over the N tokens of a scale: `"learned"` linear layer or constant `"mean"`.
        scale_fusion: γ over the L mask maps: `"learned"` with Σγ = 1, or constant `"mean"`.
        target_refinement_alpha: α of the target refinement loss; 1 switches it off.
        text_loss_weight: weight of the cross-entropy loss.
        ref_loss_weight: λ_ref.
        dice_loss_weight: λ_dice.
        freeze_neck: keep the feature neck at its loaded values (as released) instead of training it.
        position_resize: `"correct"`, or `"released"` for converted weights (CLS taken from the wrong end).
        initializer_range: std that redraws both towers, or None for transformers' own initialisation.
        embedding_initializer_range: std that redraws token and position embeddings, or None.
        new_parts_initializer: how layers of projectors, codebook, neck and decoder start: `"torch"`'s default, as
            released, or `"xavier"`, with which a small network learns several times faster.
        decoder_token_range: std of the decoder's fixed tokens, or None for N(0, 1), as released.
        image_token_id: sentinel outside the vocabulary for one picture position.
        codebook_token_ids: the N·L ids of one group in order; the first N belong to scale 0, the deepest.
        im_start_id: id in front of the picture positions.
        im_end_id: id behind them.
    """

    model_type = "pixellm"
    sub_configs_defaults = {"text_config": LlamaConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012

    # Given as dicts or configs, left out or None; `__post_init__` makes them what the annotations say.
    text_config: LlamaConfig = None
    vision_config: CLIPVisionConfig = None
    tokens_per_scale: int = 3
    num_scales: int = 2
    image_size: int = 448
    vision_feature_layers: list[int] = None  # type: ignore[assignment]
    image_token_grid: int = 16
    projector_type: str = "mlp"
    projector_hidden_size: int = 8192
    decoder_hidden_size: int = 256
    decoder_num_heads: int = 8
    decoder_mlp_size: int = 2048
    decoder_depth: int = 2
    decoder_iou_head_size: int | None = None
    token_fusion: str = "learned"
    scale_fusion: str = "learned"
    target_refinement_alpha: float = 2.0
    text_loss_weight: float = 1.0
    ref_loss_weight: float = 2.0
    dice_loss_weight: float = 0.5
    freeze_neck: bool = False
    position_resize: str = "correct"
    initializer_range: float | None = None
    embedding_initializer_range: float | None = None
    new_parts_initializer: str = "torch"
    decoder_token_range: float | None = None
    image_token_id: int = IMAGE_TOKEN_ID
    codebook_token_ids: list[int] = None  # type: ignore[assignment]
    im_start_id: int = None  # type: ignore[assignment]
    im_end_id: int = None  # type: ignore[assignment]
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Builds the sub-configs, fills in what follows from other fields, and checks the whole."""
        super().__post_init__(**kwargs)
        if self.vision_feature_layers is None:
            self.vision_feature_layers = [-2, -11, -18][: self.num_scales]
        vocab_size = self.text_config.vocab_size
        if self.codebook_token_ids is None:
            self.codebook_token_ids = list(range(vocab_size - self.group_size - 2, vocab_size - 2))
        self.im_start_id = vocab_size - 2 if self.im_start_id is None else self.im_start_id
        self.im_end_id = vocab_size - 1 if self.im_end_id is None else self.im_end_id
        _check(self)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "PixelLMConfig":
        """Builds one of the shipped sizes.

        Args:
            name: `"tiny"`, `"small"`, `"pixellm-7b"` or `"pixellm-13b"`.
            **overrides: any field; N, L and the vision layers keep each other consistent.

        Raises:
            ConfigError: unknown preset or field, or values that do not fit together.
        """
        from pixellm.model.presets import build_preset  # presets import this module

        return build_preset(name, overrides)

    @property
    def group_size(self) -> int:
        """Codebook tokens of one target, N·L."""
        return self.tokens_per_scale * self.num_scales

    @property
    def num_image_tokens(self) -> int:
        """Positions that a picture takes in the language model."""
        return self.image_token_grid**2

    @property
    def patch_grid(self) -> int:
        """Side g of the grid of CLIP patches on the canvas."""
        return self.clip_size // self.vision_config.patch_size

    @property
    def decoder_positions(self) -> int:
        """Positions of all maps that a target is decoded on."""
        return self.patch_grid**2 + (4 * self.patch_grid**2 if self.num_scales > 1 else 0)

    @property
    def clip_size(self) -> int:
        """Side in pixels of what the CLIP tower sees: the canvas."""
        return self.image_size

    @property
    def merges_targets(self) -> bool:
        """Whether an answer has one mask for all that is asked for."""
        return False

    @property
    def mask_grid(self) -> int:
        """Side of the decoder's mask logits: 2·g with one scale, else 4·g."""
        return self.patch_grid * (2 if self.num_scales == 1 else 4)

    @property
    def vision_layers(self) -> list[int]:
        """`vision_feature_layers` as non-negative hidden-state indices."""
        count = self.vision_config.num_hidden_layers + 1
        return [layer + count if layer < 0 else layer for layer in self.vision_feature_layers]


def _check(config: PixelLMConfig) -> None:
    """Raises ConfigError naming the first field that cannot work."""
    for field, choices in _CHOICES.items():
        if getattr(config, field) not in choices:
            raise ConfigError(f"{field} is {getattr(config, field)!r}; choose one of {', '.join(choices)}")
    if not 1 <= config.tokens_per_scale <= 4 or not 1 <= config.num_scales <= 3:
        raise ConfigError(
            f"tokens_per_scale={config.tokens_per_scale} and num_scales={config.num_scales}; "
            "supported are 1 to 4 tokens per scale and 1 to 3 scales"
        )
    depth = config.vision_config.num_hidden_layers
    layers = config.vision_layers
    if len(layers) != config.num_scales or any(not 0 <= layer <= depth for layer in layers):
        raise ConfigError(
            f"vision_feature_layers is {config.vision_feature_layers}; wanted {config.num_scales} hidden-state indices "
            f"(num_scales) of a tower with {depth} layers, deepest first"
        )
    if config.clip_size % config.vision_config.patch_size:
        raise ConfigError(
            f"image_size {config.clip_size} is no multiple of patch size {config.vision_config.patch_size}"
        )
    if config.decoder_hidden_size % 8 or (config.decoder_hidden_size // 2) % config.decoder_num_heads:
        raise ConfigError(
            f"decoder_hidden_size {config.decoder_hidden_size} must be a multiple of 8, and half of it a multiple of "
            f"decoder_num_heads ({config.decoder_num_heads})"
        )
    if config.target_refinement_alpha < 1:
        raise ConfigError(f"target_refinement_alpha is {config.target_refinement_alpha}; 1 switches it off, paper: 2")
    ids = [*config.codebook_token_ids, config.im_start_id, config.im_end_id]
    vocab_size = config.text_config.vocab_size
    if len(ids) != config.group_size + 2 or len(set(ids)) != len(ids) or not all(0 <= i < vocab_size for i in ids):
        raise ConfigError(
            f"codebook_token_ids {config.codebook_token_ids}, im_start_id {config.im_start_id} and im_end_id "
            f"{config.im_end_id}: wanted {config.group_size} + 2 different ids below the vocabulary size {vocab_size}"
        )
