"""Released checkpoints on disk and in memory: complete, bit-equal, streamed, or refused with every reason at once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from micro import micro_batch, micro_model
from safetensors.torch import save_file

from pixellm.errors import ConfigError, ModelLoadError
from pixellm.model.convert import convert_official, from_official
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.official import _unused_shapes, official_name
from pixellm.model.processing import PixelLMProcessor
from pixellm.model.tokenization import add_codebook_tokens, load_tiny_tokenizer

State = dict[str, torch.Tensor]


def load(path: Path) -> State:
    return {key: torch.from_numpy(value) for key, value in np.load(path).items()}


@pytest.fixture(scope="module")
def released(golden_dir: Path) -> tuple[State, dict, State]:
    config = json.loads((golden_dir / "e2e_a_config.json").read_text())
    return load(golden_dir / "e2e_a_state.npz"), config, load(golden_dir / "e2e_a_vision_state.npz")


def sizes(config: dict) -> dict[str, int]:
    return {"tokens_per_scale": config["tokens_per_scale"], "num_scales": config["num_scales"]}


def write_released(folder: Path, released: tuple[State, dict, State], kind: str) -> tuple[Path, Path]:
    """A released folder of three shards and a CLIP folder of one, as `.bin` or `.safetensors`."""
    state, config, vision = released
    source, tower = folder / "released", folder / "clip"
    source.mkdir(parents=True)
    tower.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    (tower / "config.json").write_text(json.dumps({"vision_config": config["vision"]}))
    stem, save = ("pytorch_model", torch.save) if kind == "bin" else ("model", save_file)
    weight_map = {}
    for i in range(3):
        part = {key: state[key] for key in list(state)[i::3]}
        name = f"{stem}-{i}.{kind}"
        save(part, source / name)
        weight_map |= dict.fromkeys(part, name)
    index = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    (source / index).write_text(json.dumps({"weight_map": weight_map}))
    clip_text = {"text_model.embeddings.token_embedding.weight": torch.ones(3, 2), "logit_scale": torch.tensor(1.0)}
    save(vision | clip_text, tower / ("pytorch_model.bin" if kind == "bin" else "model.safetensors"))
    return source, tower


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_checkpoint_on_disk_becomes_the_same_model_as_one_in_memory(tmp_path: Path, released, kind: str) -> None:
    source, tower = write_released(tmp_path, released, kind)
    report = convert_official(source, tmp_path / "ours", tower, **sizes(released[1]))
    state, config, vision = released
    wanted = from_official(state, config, vision_state_dict=vision, dtype=torch.float16, **sizes(config)).state_dict()
    got = PixelLMForConditionalGeneration.from_pretrained(report.path).state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) and got[key].dtype == torch.float16 for key in wanted)
    assert report.num_weights == len(wanted)
    assert report.num_files == 4
    assert report.num_parameters == sum(tensor.numel() for tensor in wanted.values())
    assert "model.prompt_encoder.point_embeddings.0.weight" in report.unused
    assert "model.mask_decoder.output_hypernetworks_mlps.3.layers.2.bias" in report.unused


def test_every_released_weight_is_either_used_unchanged_or_reported_unused(tmp_path: Path, released) -> None:
    source, tower = write_released(tmp_path, released, "safetensors")
    report = convert_official(source, tmp_path / "ours", tower, **sizes(released[1]))
    ours = PixelLMForConditionalGeneration.from_pretrained(report.path).state_dict()
    checksums = {float(tensor.double().abs().sum()) for tensor in ours.values()}
    used = released[0].keys() - set(report.unused)
    assert all(float(released[0][key].double().abs().sum()) in checksums for key in used)
    assert len(used) + len(released[2]) == report.num_weights == len(ours)


def test_unknown_missing_and_misshapen_keys_are_listed_in_one_error(tmp_path: Path, released) -> None:
    state, config, vision = released
    broken = {key: value for key, value in state.items() if key != "model.norm.weight"}
    broken["model.surprise.weight"] = torch.zeros(2)
    broken["model.mask_decoder.pe1.positional_encoding_gaussian_matrix"] = torch.zeros(2, 3)
    broken_vision = {key: value for key, value in vision.items() if "post_layernorm.bias" not in key}
    wanted = ("model.surprise.weight", "model.norm.weight", "pe1.positional_encoding_gaussian_matrix is [2, 3]")
    wanted += ("vision_tower.post_layernorm.bias",)
    with pytest.raises(ModelLoadError) as in_memory:
        from_official(broken, config, vision_state_dict=broken_vision, **sizes(config))
    source, tower = write_released(tmp_path, (broken, config, broken_vision), "bin")
    with pytest.raises(ModelLoadError) as on_disk:
        convert_official(source, tmp_path / "ours", tower, **sizes(config))
    for text in (str(in_memory.value), str(on_disk.value)):
        assert all(part in text for part in wanted), text
    assert not (tmp_path / "ours").exists()


def test_unused_weights_must_have_their_shape_too(released) -> None:
    state, config, vision = released
    broken = state | {"model.prompt_encoder.mask_downscaling.3.weight": torch.zeros(1)}
    with pytest.raises(ModelLoadError, match=r"mask_downscaling\.3\.weight is \[1\]"):
        from_official(broken, config, vision_state_dict=vision, **sizes(config))


@pytest.mark.parametrize(("name", "value"), [("num_scales", 1), ("num_scales", 3), ("tokens_per_scale", 3)])
def test_other_codebook_sizes_than_the_checkpoints_are_refused(released, name: str, value: int) -> None:
    state, config, vision = released
    with pytest.raises((ModelLoadError, ConfigError)):
        from_official(state, config, vision_state_dict=vision, **(sizes(config) | {name: value}))


def test_without_a_vision_tower_there_is_no_model(released) -> None:
    with pytest.raises(ModelLoadError, match="vision_state_dict"):
        from_official(released[0], released[1], **sizes(released[1]))


def test_learned_fusion_starts_at_the_released_constants(released) -> None:
    state, config, vision = released
    constant, learned = (
        from_official(
            state, config, vision_state_dict=vision, token_fusion=kind, scale_fusion=kind, **sizes(config)
        ).eval()
        for kind in ("mean", "learned")
    )
    hidden = torch.randn(3, 4, config["llm"]["hidden_size"], generator=torch.Generator().manual_seed(0))
    scales = torch.randn(1, 2, 32, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = []
    with torch.no_grad():
        for model in (constant, learned):
            embeds = model.codebook_embeds(hidden)
            masks.append(model.decode_masks(embeds, scales, torch.zeros(3, dtype=torch.long)))
    torch.testing.assert_close(masks[0], masks[1], rtol=1e-5, atol=1e-5)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, released) -> None:
    source, tower = write_released(tmp_path, released, "bin")
    torch.save({"model.norm.weight": Path("x")}, source / "pytorch_model-0.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model-0\.bin"):
        convert_official(source, tmp_path / "ours", tower, **sizes(released[1]))


def test_an_existing_model_is_never_overwritten(tmp_path: Path, released) -> None:
    source, tower = write_released(tmp_path, released, "bin")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        convert_official(source, tmp_path / "ours", tower, **sizes(released[1]))
    assert (tmp_path / "ours" / "config.json").read_text() == "mine"


_PEAK = """
import resource, sys
from pixellm.model.weight_files import WeightFiles, write_shard
from pathlib import Path
def peak_mib(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
files = WeightFiles.find(Path(sys.argv[1]))
before = peak_mib()
for i, file in enumerate(files.files):
    path = Path(sys.argv[2]) / f"{i}.safetensors"
    write_shard(path, files.shapes_in(file), files.dtypes_in(file), files.tensors(file))
print(peak_mib() - before)
"""


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_streaming_needs_memory_for_one_shard_only(tmp_path: Path, kind: str) -> None:
    weight_map = {}
    for i in range(4):
        part = {f"{i}.{j}": torch.full((2048, 1024), float(j)) for j in range(4)}  # 4 shards of 32 MiB
        name = f"pytorch_model-{i}.bin" if kind == "bin" else f"model-{i}.safetensors"
        (torch.save if kind == "bin" else save_file)(part, tmp_path / name)
        weight_map |= dict.fromkeys(part, name)
    index = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    (tmp_path / index).write_text(json.dumps({"weight_map": weight_map}))
    run = [sys.executable, "-c", _PEAK, str(tmp_path), str(tmp_path)]
    grown = float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert grown < 1.2 * 32 + 16, f"{grown:.0f} MiB for shards of 32 MiB"


def as_released(model: PixelLMForConditionalGeneration) -> tuple[State, dict, State]:
    """Our weights under the released names, with random values for what a release holds beside them."""
    config, size = model.config, model.config.decoder_hidden_size
    ours = model.state_dict()
    state = {official_name(key): value for key, value in ours.items() if not key.startswith("vision_tower.")}
    state |= {key: torch.randn(shape) for key, shape in _unused_shapes(size).items()}
    vision = {key.removeprefix("vision_tower."): v for key, v in ours.items() if key.startswith("vision_tower.")}
    official = {
        "llm": config.text_config.to_dict(),
        "vision": config.vision_config.to_dict() | {"resized_image_size": config.image_size},
        "decoder": {"num_heads": config.decoder_num_heads},
        "seg_token_ids": config.codebook_token_ids,
        "im_start_id": config.im_start_id,
        "im_end_id": config.im_end_id,
        "feature_layers": config.vision_feature_layers,
    }
    return state, official, vision


@pytest.mark.parametrize("tokens_per_scale", [1, 2, 3, 4])
def test_every_codebook_size_and_width_converts_back_to_the_same_network(tokens_per_scale: int) -> None:
    model = micro_model(
        tokens_per_scale=tokens_per_scale,
        token_fusion="mean",
        scale_fusion="mean",
        position_resize="released",
        image_token_grid=4,
        decoder_iou_head_size=12,
        decoder_depth=1 + tokens_per_scale % 2,
    ).eval()
    state, official, vision = as_released(model)
    again = from_official(
        state, official, tokens_per_scale=tokens_per_scale, num_scales=2, vision_state_dict=vision
    ).eval()
    batch = micro_batch(model.config)
    for key in ("labels", "target_masks"):
        del batch[key]
    assert torch.equal(again(**batch).mask_logits, model(**batch).mask_logits)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_codebook_ids_are_looked_up_in_the_releases_tokenizer_by_name(tmp_path: Path) -> None:
    tokenizer = load_tiny_tokenizer()
    tokenizer.add_tokens(["something else first"])
    ids = add_codebook_tokens(tokenizer, 2, 2)
    model = micro_model(
        tokens_per_scale=2,
        token_fusion="mean",
        scale_fusion="mean",
        image_token_grid=4,
        text_config={"vocab_size": ids.vocab_size + 5},
    )
    state, official, vision = as_released(model)
    for key in ("seg_token_ids", "im_start_id", "im_end_id"):
        del official[key]
    source, tower = write_released(tmp_path, (state, official, vision), "safetensors")
    tokenizer.save_pretrained(source)
    report = convert_official(
        source, tmp_path / "ours", tower, tokens_per_scale=2, num_scales=2, decoder_num_heads=2, image_size=32
    )
    assert report.has_tokenizer
    config = PixelLMForConditionalGeneration.from_pretrained(report.path).config
    assert config.codebook_token_ids == list(ids.codebook)
    assert config.im_start_id == ids.im_start
    processor = PixelLMProcessor.from_pretrained(report.path)
    processor.check_matches(config)
    assert (processor.image_size, processor.num_image_tokens) == (32, 16)
