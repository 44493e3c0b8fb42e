"""A real run's start: tiny Llama, LLaVA-1.5 (both layouts) and CLIP checkpoints become a model folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from pixellm.errors import ConfigError, ModelLoadError
from pixellm.model.baselines.lisa import LisaForConditionalGeneration
from pixellm.model.baselines.lisa_init import init_lisa
from pixellm.model.init import init_model
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.networks import load_network
from pixellm.model.processing import PixelLMProcessor
from pixellm.model.tokenization import load_tiny_tokenizer

SMALL = {"projector_hidden_size": 36, "decoder_hidden_size": 32, "decoder_num_heads": 2, "decoder_mlp_size": 44}
OPTIONS = {"image_size": 32, "tokens_per_scale": 2, "num_scales": 2, **SMALL}
STATE = dict[str, torch.Tensor]


def write_clip(folder: Path) -> STATE:
    """A whole CLIP with its text model, saved by transformers."""
    torch.manual_seed(1)
    vision = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 6, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(vision_config=vision | {"patch_size": 4, "image_size": 16}, text_config=text))
    clip.save_pretrained(folder)
    return {key: value for key, value in load_file(folder / "model.safetensors").items() if key.startswith("vision")}


def write_llama(
    folder: Path, *, layout: str = "llama", tied: bool = False, dtype: torch.dtype = torch.float32
) -> STATE:
    """A Llama saved by transformers, its keys renamed to a layout and split in two shards; returns Llama's own keys."""
    torch.manual_seed(2)
    tokenizer = load_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,  # padded, as many are
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    state = {key: value.to(dtype) for key, value in LlamaForCausalLM(config).state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    projector = {f"{i}.{k}": torch.randn(s).to(dtype) for i, k, s in (
        (0, "weight", (30, 20)), (0, "bias", (30,)), (2, "weight", (24, 30)), (2, "bias", (24,)),
    )}  # fmt: skip
    folder.mkdir(parents=True)
    fields = config.to_dict()
    if layout == "llama":
        renamed = state
    elif layout == "liuhaotian":
        renamed = state | {f"model.mm_projector.{k}": v for k, v in projector.items()}
        fields |= {"model_type": "llava_llama", "mm_hidden_size": 20}
    else:
        numbers = {"0": "linear_1", "2": "linear_2"}
        renamed = {f"language_model.{k}": v for k, v in state.items()}
        renamed |= {f"multi_modal_projector.{numbers[k[0]]}{k[1:]}": v for k, v in projector.items()}
        renamed["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(20)
        fields = {"model_type": "llava", "text_config": fields}
    (folder / "config.json").write_text(json.dumps(fields, default=str))
    weight_map = {}
    for i in range(2):
        part = {key: renamed[key].contiguous() for key in sorted(renamed)[i::2]}
        save_file(part, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tokenizer.save_pretrained(folder)
    return state | {f"projector.{k}": v for k, v in projector.items()}


@pytest.mark.parametrize("layout", ["llama", "liuhaotian", "llava-hf"])
def test_towers_arrive_unchanged_and_the_folder_can_be_served(tmp_path: Path, layout: str) -> None:
    llama, clip = write_llama(tmp_path / "llm", layout=layout), write_clip(tmp_path / "clip")
    report = init_model(tmp_path / "llm", tmp_path / "clip", tmp_path / "out", **OPTIONS)
    model = PixelLMForConditionalGeneration.from_pretrained(report.path)
    processor = PixelLMProcessor.from_pretrained(report.path)
    processor.check_matches(model.config)
    ours = model.state_dict()
    for key, value in llama.items():
        if key.startswith("model.layers") or key == "model.norm.weight":
            assert torch.equal(ours["language_model." + key.removeprefix("model.")], value), key
    for key, value in clip.items():
        assert torch.equal(ours["vision_tower." + key.removeprefix("vision_model.")], value), key
    assert model.config.text_config.rms_norm_eps == 1e-5
    assert model.config.vision_layers == [5, 3]
    assert model.config.image_token_grid == 4
    tokens = processor.tokenizer.convert_tokens_to_ids(["[SEG0]", "[SEG1]", "[SEG2]", "[SEG3]"])
    assert model.config.codebook_token_ids == tokens


def test_embeddings_keep_their_rows_and_new_ones_are_small(tmp_path: Path) -> None:
    llama = write_llama(tmp_path / "llm")
    write_clip(tmp_path / "clip")
    report = init_model(tmp_path / "llm", tmp_path / "clip", tmp_path / "out", **OPTIONS)
    ours = PixelLMForConditionalGeneration.from_pretrained(report.path).state_dict()
    for name, key in (("language_model.embed_tokens.weight", "model.embed_tokens.weight"), ("lm_head.weight",) * 2):
        old, new = llama[key], ours[name]
        assert torch.equal(new[: len(old)], old)
        assert len(new) == len(load_tiny_tokenizer()) + 6  # 4 codebook tokens, <im_start>, <im_end>
        assert new[len(old) :].std().item() == pytest.approx(0.02, rel=0.3)


def test_the_same_seed_gives_the_same_folder_and_another_gives_another(tmp_path: Path) -> None:
    write_llama(tmp_path / "llm")
    write_clip(tmp_path / "clip")
    states = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        init_model(tmp_path / "llm", tmp_path / "clip", tmp_path / name, seed=seed, **OPTIONS)
        states.append(PixelLMForConditionalGeneration.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    differing = {key.split(".")[0] for key in states[0] if not torch.equal(states[0][key], states[2][key])}
    drawn = {"image_projector", "decoder_projector", "neck", "codebook", "decoder", "language_model", "lm_head"}
    assert differing == drawn


def test_tied_embeddings_become_two_equal_ones(tmp_path: Path) -> None:
    llama = write_llama(tmp_path / "llm", tied=True)
    write_clip(tmp_path / "clip")
    init_model(tmp_path / "llm", tmp_path / "clip", tmp_path / "out", **OPTIONS)
    ours = PixelLMForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    old = llama["model.embed_tokens.weight"]
    assert torch.equal(ours["lm_head.weight"][: len(old)], old)


@pytest.mark.parametrize("layout", ["liuhaotian", "llava-hf"])
def test_llavas_projector_can_be_taken(tmp_path: Path, layout: str) -> None:
    llama = write_llama(tmp_path / "llm", layout=layout)
    write_clip(tmp_path / "clip")
    options = {key: value for key, value in OPTIONS.items() if key != "projector_hidden_size"}
    init_model(tmp_path / "llm", tmp_path / "clip", tmp_path / "out", projector="llava", **options)
    ours = PixelLMForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    for key in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert torch.equal(ours[f"image_projector.layers.{key}"], llama[f"projector.{key}"])


def test_new_parts_take_the_language_models_dtype(tmp_path: Path) -> None:
    write_llama(tmp_path / "llm", dtype=torch.bfloat16)
    write_clip(tmp_path / "clip")
    init_model(tmp_path / "llm", tmp_path / "clip", tmp_path / "out", **OPTIONS)
    stored = {k: v.dtype for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert stored["decoder.iou_token.weight"] == stored["lm_head.weight"] == torch.bfloat16
    assert stored["vision_tower.post_layernorm.bias"] == torch.float32


def test_a_started_model_trains(tmp_path: Path) -> None:
    from micro import micro_batch

    write_llama(tmp_path / "llm")
    write_clip(tmp_path / "clip")
    init_model(tmp_path / "llm", tmp_path / "clip", tmp_path / "out", **OPTIONS)
    model = PixelLMForConditionalGeneration.from_pretrained(tmp_path / "out").train()
    output = model(**micro_batch(model.config))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_sources_that_make_no_model_say_why(tmp_path: Path) -> None:
    write_llama(tmp_path / "llm")
    write_clip(tmp_path / "clip")

    def refusal(error: type[Exception], **changes: object) -> str:
        arguments = {"llm": tmp_path / "llm", "vision": tmp_path / "clip", "out": tmp_path / "out"} | OPTIONS | changes
        with pytest.raises(error) as raised:
            init_model(**arguments)
        assert not (tmp_path / "out").exists()
        return str(raised.value)

    assert "this one has no projector" in refusal(ModelLoadError, projector="llava")
    assert "choose 'new' or 'llava'" in refusal(ConfigError, projector="old")
    assert "neither Llama's nor LLaVA-1.5's" in refusal(ModelLoadError, llm=tmp_path / "clip")
    (tmp_path / "llm" / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(ModelLoadError)


def test_lisa_starts_from_a_llava_a_clip_and_a_sam(tmp_path: Path) -> None:
    from transformers import SamConfig, SamModel

    torch.manual_seed(3)
    decoder = {"hidden_size": 32, "mlp_dim": 40, "num_attention_heads": 2, "iou_head_hidden_dim": 24}
    encoder = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 24, "image_size": 64}
    encoder |= {"output_channels": 32, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 16}
    prompt = {"hidden_size": 32, "image_size": 64}
    config = SamConfig(vision_config=encoder, mask_decoder_config=decoder, prompt_encoder_config=prompt)
    sam = SamModel(config)
    sam.save_pretrained(tmp_path / "sam")
    llama, clip = write_llama(tmp_path / "llm", layout="llava-hf"), write_clip(tmp_path / "clip")
    sources = (tmp_path / "llm", tmp_path / "clip", tmp_path / "sam")
    assert init_lisa(*sources, tmp_path / "out", variant="lisa_aug").has_tokenizer
    lisa = load_network(tmp_path / "out")
    assert isinstance(lisa, LisaForConditionalGeneration)
    assert lisa.config.num_image_tokens == 16
    pairs = {
        "language_model.layers.1.mlp.up_proj.weight": llama["model.layers.1.mlp.up_proj.weight"],
        "image_projector.layers.2.bias": llama["projector.2.bias"],
        "vision_tower.post_layernorm.weight": clip["vision_model.post_layernorm.weight"],
        "sam_encoder.layers.1.attn.qkv.weight": sam.vision_encoder.layers[1].attn.qkv.weight,
        "decoder.mask_decoder.iou_token.weight": sam.mask_decoder.iou_token.weight,
        "decoder.positions.matrix": sam.shared_image_embedding.positional_embedding,
    }
    for name, wanted in pairs.items():
        torch.testing.assert_close(lisa.state_dict()[name], wanted.detach())
    trained = {"projectors", "embeddings", "codebook", "decoder"}
    lisa.set_trainable_parts(trained)
    assert {lisa.part_of(n) for n, p in lisa.named_parameters() if p.requires_grad} == trained - {"projectors"}
    processor = PixelLMProcessor.from_pretrained(tmp_path / "out")
    assert not processor.merges_targets
    assert lisa.config.codebook_token_ids == list(processor.token_ids.codebook)
