"""The four shipped sizes: two that learn on a laptop, two with the paper's shapes (Sec. 5.1); and LISA in three.

`tiny` and `small` follow the shipped tokenizer; `pixellm-7b` and `pixellm-13b` follow Llama's 32,000 pieces with the
codebook tokens behind them, on CLIP-ViT-L/14-336 at 448 pixels.
"""

import difflib
from collections.abc import Callable
from typing import Any

from pixellm.errors import ConfigError
from pixellm.model.baselines.lisa_config import LisaConfig, lisa_full, lisa_tiny
from pixellm.model.config import PixelLMConfig
from pixellm.model.tokenization import add_codebook_tokens, load_tiny_tokenizer

LLAMA_VOCAB_SIZE = 32000

CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
    "projection_dim": 768,
}
CLIP_H_LAION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}
"""`vision_config` of laion's CLIP-ViT-H/14, for `PixelLMConfig.from_preset(…, vision_config=CLIP_H_LAION)`."""


def _tiny() -> dict[str, Any]:
    return {
        "text_config": {
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 2048,
        },
        "vision_config": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "patch_size": 16,
            "image_size": 192,
        },
        "image_size": 192,
        "image_token_grid": 6,
        "vision_feature_layers": [-2, -4, -5],
        "projector_hidden_size": 256,
        "decoder_hidden_size": 64,
        "decoder_num_heads": 4,
        "decoder_mlp_size": 256,
        "initializer_range": 0.06,
        "embedding_initializer_range": 0.3,
        "new_parts_initializer": "xavier",
        "decoder_token_range": 0.1,
    }


def _small() -> dict[str, Any]:
    return {
        "text_config": {
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 2048,
        },
        "vision_config": {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "patch_size": 14,
            "image_size": 336,
        },
        "vision_feature_layers": [-2, -8, -10],
        "projector_hidden_size": 1024,
        "decoder_hidden_size": 128,
        "decoder_num_heads": 8,
        "decoder_mlp_size": 512,
        "initializer_range": 0.04,
        "embedding_initializer_range": 0.2,
        "new_parts_initializer": "xavier",
        "decoder_token_range": 0.1,
    }


def _pixellm_7b() -> dict[str, Any]:
    return {
        "text_config": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
        },
        "vision_config": dict(CLIP_L_336),
        "vision_feature_layers": [-2, -11, -18],
    }


def _pixellm_13b() -> dict[str, Any]:
    return {
        "text_config": {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        "vision_config": dict(CLIP_L_336),
        "vision_feature_layers": [-2, -11, -18],
    }


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "tiny": _tiny,
    "small": _small,
    "pixellm-7b": _pixellm_7b,
    "pixellm-13b": _pixellm_13b,
}
LISA_PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "lisa-tiny": lambda: lisa_tiny(_tiny()),
    "lisa-7b": lambda: lisa_full(_pixellm_7b()),
    "lisa-13b": lambda: lisa_full(_pixellm_13b()),
}


def build_preset(name: str, overrides: dict[str, Any]) -> PixelLMConfig:
    """Builds a preset's config; see `PixelLMConfig.from_preset`."""
    presets = PRESETS | LISA_PRESETS
    if name not in presets:
        nearest = difflib.get_close_matches(name, presets, n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown preset {name!r}; did you mean {nearest!r}? Presets: {', '.join(presets)}")
    config_class = LisaConfig if name in LISA_PRESETS else PixelLMConfig
    annotated = PixelLMConfig.__annotations__ | config_class.__annotations__
    known = {field for field in annotated if not field.startswith("_")}
    for field in overrides:
        if field not in known:
            nearest = difflib.get_close_matches(field, sorted(known), n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown config field {field!r}; did you mean {nearest!r}?")
    fields = presets[name]()
    for part in ("text_config", "vision_config"):
        fields[part] |= overrides.get(part) or {}
    fields |= {key: value for key, value in overrides.items() if key not in ("text_config", "vision_config")}
    num_scales = fields.setdefault("num_scales", 2)
    if "vision_feature_layers" not in overrides:
        fields["vision_feature_layers"] = fields["vision_feature_layers"][:num_scales]
    fields["text_config"] = _token_ids(name, fields) | fields["text_config"]
    return config_class(**fields)


def _token_ids(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Fills the codebook ids into `fields` and returns the language model's vocabulary fields."""
    tokens_per_scale, num_scales = fields.setdefault("tokens_per_scale", 3), fields["num_scales"]
    if name in ("tiny", "small", "lisa-tiny"):
        tokenizer = load_tiny_tokenizer()
        ids = add_codebook_tokens(tokenizer, tokens_per_scale, num_scales)
        fields.setdefault("codebook_token_ids", list(ids.codebook))
        fields.setdefault("im_start_id", ids.im_start)
        fields.setdefault("im_end_id", ids.im_end)
        return {
            "vocab_size": ids.vocab_size,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
    vocab_size = LLAMA_VOCAB_SIZE + tokens_per_scale * num_scales + 2
    return {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
