"""A model folder is whole or refused, with every weight that is wrong named."""

import json
from pathlib import Path

import pytest
import torch
from micro import micro_model
from safetensors.torch import load_file, save_file

from pixellm.errors import ModelLoadError
from pixellm.model.modeling import PixelLMForConditionalGeneration


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    micro_model().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as error:
        PixelLMForConditionalGeneration.from_pretrained(folder)
    return str(error.value)


def test_missing_weights_are_named(folder: Path) -> None:
    rewrite(folder, lambda w: {k: v for k, v in w.items() if k not in ("lm_head.weight", "neck.0.weight")})
    text = refusal(folder)
    assert "missing" in text
    assert "lm_head.weight" in text
    assert "neck.0.weight" in text


def test_a_missing_random_position_matrix_is_never_redrawn(folder: Path) -> None:
    rewrite(folder, lambda w: {k: v for k, v in w.items() if k != "decoder.fine_positions.matrix"})
    assert "decoder.fine_positions.matrix" in refusal(folder)


def test_unexpected_weights_are_named(folder: Path) -> None:
    rewrite(folder, lambda w: w | {"decoder.surprise": torch.zeros(2)})
    text = refusal(folder)
    assert "unexpected" in text
    assert "decoder.surprise" in text


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    rewrite(folder, lambda w: w | {"codebook.head.0.bias": torch.zeros(3)})
    assert "codebook.head.0.bias" in refusal(folder)


def test_a_config_of_another_network_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["token_fusion"] = "mean"
    (folder / "config.json").write_text(json.dumps(config))
    assert "codebook.fusion.weight" in refusal(folder)


def test_no_folder_no_weights_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path / "nowhere")
    micro_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    assert str(tmp_path) in refusal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert str(tmp_path) in refusal(tmp_path)
