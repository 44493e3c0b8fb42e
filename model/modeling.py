"""PixelLM: CLIP + Llama + segmentation codebook + pixel decoder (paper Fig. 2), as a transformers model.

`forward` trains: text and masks of a packed batch in one pass. The methods of the seam (`pixellm.model.backbone`) are
the same steps one by one, which the engine drives with a key/value cache.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from pixellm.errors import DataError
from pixellm.model.backbone import ImageFeatures
from pixellm.model.codebook import SegmentationCodebook, gather_groups, match_groups
from pixellm.model.config import PixelLMConfig
from pixellm.model.decoder import DecodedMasks, FeatureNeck, PixelDecoder
from pixellm.model.initialisation import redraw
from pixellm.model.loading import check_loading_info, load_with_info
from pixellm.model.lora import has_lora, lora_scaling, merge_state_dict
from pixellm.model.losses import text_loss
from pixellm.model.objective import MaskTargets, mask_losses
from pixellm.model.vision import Projector, VisionTower, pool_to_grid, pool_valid, valid_patches

PARTS = ("vision", "projectors", "language", "lora", "embeddings", "codebook", "decoder", "neck")
MAX_TARGETS_AT_ONCE = 16
_PART_OF_PREFIX = {
    "vision_tower": "vision",
    "image_projector": "projectors",
    "decoder_projector": "projectors",
    "language_model": "language",
    "lm_head": "embeddings",
    "codebook": "codebook",
    "decoder": "decoder",
    "neck": "neck",
    "sam_encoder": "vision",
}


@dataclass
class PixelLMOutput(ModelOutput):
    """What `forward` returns.

    Attributes:
        loss: scalar, the weighted sum; None without labels and target masks.
        losses: detached, already weighted `text`, `ref`, `dice`.
        logits: `[B, L, V]`; in training of no meaning where nothing attends (padding, picture tokens on padding).
        mask_logits: `[M, h, h]` fp32 at decoder resolution on the padded canvas.
        embeds_MGC: `[M, G, C]` fused codebook embeddings.
        target_rows: `[M]` batch row of each target.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    mask_logits: Tensor | None = None
    embeds_MGC: Tensor | None = None
    target_rows: Tensor | None = None


class PixelLMForConditionalGeneration(PreTrainedModel):
    """A picture and a question in, words and a mask for each `[SEG…]` group out."""

    config: PixelLMConfig
    config_class = PixelLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    never_trained: tuple[str, ...] = ("decoder.iou_head.", "vision_tower.post_layernorm.")
    """Prefixes of weights that no loss reaches."""
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer", "TwoWayBlock"]  # noqa: RUF012

    def __init__(self, config: PixelLMConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_tower = VisionTower(vision)
        self.image_projector = self._projector(config)
        self._build_decoder_features(config)
        self.language_model = LlamaModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self._build_mask_parts(config)
        self.post_init()
        redraw(self)
        self.set_trainable_parts(PARTS)

    def _projector(self, config: PixelLMConfig) -> Projector:
        vision, text = config.vision_config, config.text_config
        return Projector(vision.hidden_size, config.projector_hidden_size, text.hidden_size, config.projector_type)

    def _build_decoder_features(self, config: PixelLMConfig) -> None:
        """The parts that make `ImageFeatures.scales`; a baseline has others."""
        self.decoder_projector = self._projector(config)
        self.neck = FeatureNeck(config.text_config.hidden_size, config.decoder_hidden_size)

    def _build_mask_parts(self, config: PixelLMConfig) -> None:
        """The parts from a group's hidden states to mask logits; a baseline has others."""
        size = config.decoder_hidden_size
        self.codebook = SegmentationCodebook(
            config.text_config.hidden_size, size, config.tokens_per_scale, config.num_scales, config.token_fusion
        )
        self.decoder = PixelDecoder(
            size,
            config.decoder_num_heads,
            config.decoder_mlp_size,
            config.decoder_depth,
            config.num_scales,
            config.scale_fusion,
            config.decoder_iou_head_size,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws the parts that are ours as torch (and the released code) does; the towers draw their own."""
        if module is self.lm_head:
            init.normal_(module.weight, std=self.config.text_config.initializer_range)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], *args: Any, **kwargs: Any) -> "PixelLMForConditionalGeneration":
        """Loads a model folder, and refuses one that is not whole.

        Args:
            path: folder written by `save_pretrained`.
            *args: see transformers.
            **kwargs: see transformers (`dtype`, `device_map`, …).

        Raises:
            ModelLoadError: no such folder, or weights that are missing, unexpected or of another shape.
        """
        model, info = load_with_info(super().from_pretrained, path, *args, **kwargs)
        check_loading_info(path, info)
        model.set_trainable_parts(PARTS)  # loading makes new parameters, all of which would train
        return model

    @classmethod
    def from_weights(
        cls, config: PixelLMConfig, weights: dict[str, Tensor], dtype: torch.dtype
    ) -> "PixelLMForConditionalGeneration":
        """Builds a model on weights in memory, which it keeps.

        Raises:
            ModelLoadError: weights that are missing, unexpected or of another shape.
        """
        model, info = super().from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
        check_loading_info("the state dict", info)
        model.set_trainable_parts(PARTS)
        return model

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Writes a model folder; an attached LoRA adapter is merged into what is written, not into the model.

        Args:
            save_directory: folder, made where it does not exist.
            **kwargs: see transformers; `state_dict` may hold gathered weights, of a model with LoRA too.
        """
        if has_lora(self):
            state_dict = kwargs.get("state_dict") or self.state_dict()
            kwargs["state_dict"] = merge_state_dict(state_dict, lora_scaling(self))
        super().save_pretrained(save_directory, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The language-model head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the language-model head."""
        self.lm_head = value  # type: ignore[assignment]

    @staticmethod
    def part_of(parameter_name: str) -> str:
        """Names the part that a parameter belongs to: one of `PARTS`."""
        name = parameter_name
        for prefix in ("module.", "base_model.model."):
            name = name.removeprefix(prefix)
        if ".lora_" in name:
            return "lora"
        if name.startswith("language_model.embed_tokens"):
            return "embeddings"
        return _PART_OF_PREFIX[name.split(".", 1)[0]]

    def set_trainable_parts(self, parts: tuple[str, ...] | list[str] | set[str]) -> None:
        """Lets exactly these parts train; weights that no loss reaches and a frozen neck never do."""
        last_layer = max(self.config.vision_layers)
        num_layers = self.config.vision_config.num_hidden_layers
        unused_layers = tuple(f"vision_tower.encoder.layers.{i}." for i in range(last_layer, num_layers))
        unused = (*self.never_trained, *unused_layers)
        for name, parameter in self.named_parameters():
            part = self.part_of(name)
            is_frozen = name.startswith(unused) or (part == "neck" and self.config.freeze_neck)
            parameter.requires_grad_(part in parts and not is_frozen)

    def encode_images(self, pixel_values: Tensor, image_valid_hw: Tensor) -> ImageFeatures:
        """One vision pass: image tokens for the language model, feature maps for the decoder.

        Args:
            pixel_values: `[I, 3, S, S]`, normalised, zero where padded.
            image_valid_hw: `[I, 2]` long, rows and columns of real pixels.

        Returns:
            Features of the I pictures.
        """
        config = self.config
        grid = config.patch_grid
        patch_valid = valid_patches(image_valid_hw.to(pixel_values.device), grid, config.vision_config.patch_size)
        states = self.vision_tower.hidden_states(
            pixel_values, patch_valid, config.vision_layers, config.position_resize
        )
        image_tokens = self.image_projector(pool_to_grid(states[0], config.image_token_grid))
        projected = self.decoder_projector(torch.stack(states, dim=1))
        maps = projected.transpose(2, 3).unflatten(3, (grid, grid))
        scales = self.neck(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])
        return ImageFeatures(image_tokens, pool_valid(patch_valid, config.image_token_grid), scales)

    def embed_inputs(
        self, input_ids: Tensor, features: ImageFeatures, image_index: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeds ids, with each row's picture in place of its image positions.

        Args:
            input_ids: `[B, L]` long; `image_token_id` stands `num_image_tokens` times where the picture goes, or never.
            features: of I pictures.
            image_index: `[B]` long, the picture of each row.
            attention_mask: `[B, L]`, 0 at text padding; None = no padding.

        Returns:
            `[B, L, D]` embeddings and `[B, L]` bool, false at text padding and at picture tokens that lie on padding.

        Raises:
            DataError: a row with another number of image positions.
        """
        is_image = input_ids == self.config.image_token_id
        counts = is_image.sum(1)
        num_tokens = features.image_tokens.shape[1]
        wrong = ((counts != 0) & (counts != num_tokens)).nonzero().flatten().tolist()
        if wrong:
            raise DataError(
                f"row {wrong[0]} has {int(counts[wrong[0]])} image positions; a picture takes {num_tokens}: "
                "build input_ids with PixelLMProcessor"
            )
        rows_with_image = image_index[counts > 0]
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        image_embeds = features.image_tokens[rows_with_image].to(embeds.dtype)
        embeds = embeds.masked_scatter(is_image[..., None], image_embeds)
        attendable = torch.ones_like(is_image) if attention_mask is None else attention_mask.bool()
        token_valid = torch.ones_like(is_image).masked_scatter(is_image, features.token_valid[rows_with_image])
        return embeds, attendable & token_valid

    def language_forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Cache | None]:
        """Runs the language model.

        Args:
            inputs_embeds: `[B, L, D]`.
            attention_mask: `[B, past + L]`, 0 at keys that nobody may attend to.
            position_ids: `[B, L]` long, counting every position, masked ones included.
            past_key_values: cache of the past positions, extended in place.
            use_cache: return a cache (a new one where none was given).

        Returns:
            Hidden states `[B, L, D]` after the final norm, and the cache or None.
        """
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return output.last_hidden_state, output.past_key_values if use_cache else None

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """`[…, D]` hidden states → `[…, V]` next-token logits."""
        return self.lm_head(hidden)

    def codebook_embeds(self, hidden_MJD: Tensor) -> Tensor:
        """`[M, J, D]` states at the positions that predict a group's tokens → `[M, G, C]`, deepest scale first."""
        return self.codebook(hidden_MJD)

    def decode_masks(self, embeds_MGC: Tensor, scales: Tensor, image_index_M: Tensor) -> Tensor:
        """Decodes all targets in one batch.

        Args:
            embeds_MGC: `[M, G, C]` from `codebook_embeds`.
            scales: `[I, G, C, g, g]` from `encode_images`.
            image_index_M: `[M]` long, picture of each target.

        Returns:
            `[M, h, h]` fp32 mask logits on the padded canvas, h = `config.mask_grid`. Without gradients they are made
            in batches of `MAX_TARGETS_AT_ONCE`, so that memory does not grow with M.
        """
        if torch.is_grad_enabled() or len(embeds_MGC) <= MAX_TARGETS_AT_ONCE:
            return self.decode_levels(embeds_MGC, scales, image_index_M).mask_logits
        starts = range(0, len(embeds_MGC), MAX_TARGETS_AT_ONCE)
        batches = [slice(start, start + MAX_TARGETS_AT_ONCE) for start in starts]
        return torch.cat([self.decode_levels(embeds_MGC[b], scales, image_index_M[b]).mask_logits for b in batches])

    def decode_levels(self, embeds_MGC: Tensor, scales: Tensor, image_index_M: Tensor) -> DecodedMasks:
        """`decode_masks` with each scale's own logits beside the result."""
        return self.decoder(embeds_MGC, scales, image_index_M)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        image_valid_hw: Tensor,
        image_index: Tensor,
        labels: Tensor | None = None,
        target_masks: Tensor | list[Tensor] | None = None,
        target_rows: Tensor | None = None,
        original_hw: Tensor | None = None,
    ) -> PixelLMOutput:
        """Text and masks of a batch, and their losses.

        Args:
            input_ids: `[B, L]` long; see `embed_inputs`.
            attention_mask: `[B, L]`, 0 at padding.
            pixel_values: `[I, 3, S, S]`.
            image_valid_hw: `[I, 2]` long, rows and columns of real pixels.
            image_index: `[B]` long, picture of each row.
            labels: `[B, L]` long, −100 where not supervised.
            target_masks: `[M, h, h]` float 0..1 on the padded canvas at any resolution; or, with `original_hw`, one
                `[M_i, H_i, W_i]` per picture at its own size (the released losses).
            target_rows: `[M]` long, row of each target; within a row in order of appearance.
            original_hw: `[I, 2]` long, size of each picture.

        Raises:
            DataError: a row whose number of codebook groups differs from its number of targets.
        """
        features = self.encode_images(pixel_values, image_valid_hw)
        embeds, attendable = self.embed_inputs(input_ids, features, image_index, attention_mask)
        hidden = self._language_states(embeds, attendable)
        logits = self.lm_logits(hidden)
        rows, positions = match_groups(input_ids, self.config.codebook_token_ids, target_rows)
        embeds_MGC, mask_logits, anchor = self._decode_groups(hidden, features, rows, positions, image_index)
        losses: dict[str, Tensor] = {}
        if labels is not None:
            losses["text"] = self.config.text_loss_weight * text_loss(logits, labels)
        if target_masks is not None:
            targets = MaskTargets(target_masks, rows, image_index[rows], image_valid_hw, original_hw)
            losses |= mask_losses(mask_logits, targets, self.config)
        return PixelLMOutput(
            loss=sum(losses.values(), start=anchor) if losses else None,
            losses={name: value.detach() for name, value in losses.items()},
            logits=logits,
            mask_logits=mask_logits,
            embeds_MGC=embeds_MGC,
            target_rows=rows,
        )

    def _language_states(self, embeds_BLD: Tensor, attendable_BL: Tensor) -> Tensor:
        """The language model's states `[B, L, D]`; in training only where somebody attends, else zeros.

        A picture of 4 : 3 covers three quarters of the canvas. Nothing attends to the tokens on the rest and nothing is
        learned from them, so rows are closed up over them; what stays keeps its position.
        """
        positions_BL = torch.arange(embeds_BLD.shape[1], device=embeds_BLD.device).expand(attendable_BL.shape)
        if not self.training:
            return self.language_forward(embeds_BLD, attendable_BL, positions_BL[:1])[0]
        longest = int(attendable_BL.sum(1).max())
        kept_BK = torch.argsort(~attendable_BL, dim=1, stable=True)[:, :longest]
        kept_BKD = kept_BK[..., None].expand(-1, -1, embeds_BLD.shape[2])
        hidden, _ = self.language_forward(
            embeds_BLD.gather(1, kept_BKD), attendable_BL.gather(1, kept_BK), positions_BL.gather(1, kept_BK)
        )
        return hidden.new_zeros(embeds_BLD.shape).scatter(1, kept_BKD, hidden)

    def _decode_groups(
        self, hidden_BLD: Tensor, features: ImageFeatures, rows: Tensor, positions: Tensor, image_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings and mask logits of the groups, and a zero that the loss starts from.

        With no group at all in training, one stand-in still runs through codebook and decoder, at weight 0: ranks that
        shard parameters must run the same modules.
        """
        is_stand_in = len(rows) == 0 and self.training
        if is_stand_in:
            rows, positions = rows.new_zeros(1), rows.new_ones(1)
        embeds_MGC = self.codebook_embeds(gather_groups(hidden_BLD, rows, positions, self.config.group_size))
        mask_logits = self.decode_masks(embeds_MGC, features.scales, image_index[rows])
        if is_stand_in:
            return embeds_MGC[:0], mask_logits[:0], mask_logits.sum() * 0
        return embeds_MGC, mask_logits, mask_logits.new_zeros(())
