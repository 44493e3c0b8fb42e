"""A recipe of a few steps with a very small model."""

import json
from pathlib import Path
from typing import Any

from pixellm.platform.settings import Settings

MICRO: dict[str, Any] = {
    "text_config": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 56,
    },
    "image_size": 56,
    "image_token_grid": 2,
    "vision_feature_layers": [-2, -3],
    "projector_hidden_size": 32,
    "decoder_hidden_size": 16,
    "decoder_num_heads": 2,
    "decoder_mlp_size": 32,
}


def micro_tree(shards: dict[str, str], output_dir: Path, **train: Any) -> dict[str, Any]:
    """A recipe of a few steps as the tree that YAML would hold."""
    return {
        "name": "micro",
        "model": {"preset": "tiny", "overrides": MICRO},
        "data": {
            "sources": [{"uri": uri, "group": group, "weight": 1} for group, uri in sorted(shards.items())],
            "mask_size": 28,
            "min_target_share": 0.01,
            "block_size": 8,
            "task_cpus": 0.5,
        },
        "train": {
            "output_dir": str(output_dir / "runs"),
            "num_workers": 1,
            "steps": 6,
            "micro_batch_size": 2,
            "grad_accumulation": 1,
            "lr": 1e-3,
            "warmup_steps": 2,
            "precision": "fp32",
            "zero_stage": 2,
            "train_vision": True,
            "train_language": True,
            "checkpoint_every": 2,
            **train,
        },
        "evaluate": {"limit": 4, "mode": "forced"},
        "tracking": {"root": str(output_dir / "mlflow")},
    }


def micro_settings(shards: dict[str, str], output_dir: Path, **train: Any) -> Settings:
    """The same, validated; keys of `train` override."""
    return Settings.model_validate(json.loads(json.dumps(micro_tree(shards, output_dir, **train))))
