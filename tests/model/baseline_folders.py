"""Model folders of every baseline at tiny size, random weights, as `open_segmenter` reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pixellm.model.baselines.lisa_rec import LISA_REC
from pixellm.model.baselines.text_prompted import GROUNDED_SAM2
from pixellm.model.config import PixelLMConfig
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.networks import build_network
from pixellm.model.processing import PixelLMProcessor
from pixellm.model.tokenization import load_tiny_tokenizer


def write_pixellm(folder: Path) -> Path:
    """PixelLM itself, tiny."""
    return _write_network(folder, "tiny")


def write_lisa(folder: Path, variant: str = "lisa") -> Path:
    """LISA, tiny."""
    return _write_network(folder, "lisa-tiny", variant=variant)


def write_lisa_aug(folder: Path) -> Path:
    """LISA with a mask per target, tiny."""
    return write_lisa(folder, "lisa_aug")


def write_lisa_rec(folder: Path) -> Path:
    """A network that names targets, and LISA."""
    _write_network(folder / "language", "lisa-tiny", points=False)
    write_lisa(folder / "lisa")
    _write_json(folder / "config.json", {"model_type": LISA_REC})
    return folder


def write_lisa_rec_llava(folder: Path) -> Path:
    """A LLaVA of transformers, and LISA."""
    write_llava(folder / "language")
    write_lisa(folder / "lisa")
    _write_json(folder / "config.json", {"model_type": LISA_REC})
    return folder


def write_llava(folder: Path) -> Path:
    """transformers' LLaVA, tiny."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = load_tiny_tokenizer()
    vocabulary = len(tokenizer) + 1
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=vocabulary - 1, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_clipseg(folder: Path) -> Path:
    """CLIPSeg, tiny."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    tokenizer = load_tiny_tokenizer()
    layer = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPSegConfig(
        text_config=layer
        | {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "eos_token_id": 2, "bos_token_id": 1},
        vision_config=layer | {"num_hidden_layers": 3, "patch_size": 16, "image_size": 64},
        projection_dim=16,
        extract_layers=[0, 1, 2],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.save_pretrained(folder)
    _write_json(folder / "preprocessor_config.json", {"size": {"height": 64, "width": 64}})
    return folder


def write_grounded_sam2(folder: Path) -> Path:
    """Grounding DINO and SAM 2, tiny."""
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2Model,
        Sam2VisionConfig,
        SwinConfig,
    )

    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, out_indices=[2, 3, 4]
    )
    bert = BertConfig(vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    detector = GroundingDinoConfig(
        backbone_config=swin,
        text_config=bert,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=10,
    )
    GroundingDinoForObjectDetection(detector).save_pretrained(folder / "detector")
    BertTokenizerFast(vocab=_bert_vocabulary()).save_pretrained(folder / "detector")
    _write_json(folder / "detector" / "preprocessor_config.json", {"size": {"shortest_edge": 64, "longest_edge": 96}})
    hiera = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[128, 128],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 2, 2, 2],
        global_attention_blocks=[3],
    )
    vision = Sam2VisionConfig(
        backbone_config=hiera,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=32,
    )
    sam = Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": 128},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 32,
        },
    )
    Sam2Model(sam).save_pretrained(folder / "segmenter")
    _write_json(folder / "config.json", {"model_type": GROUNDED_SAM2})
    return folder


def write_sam3(folder: Path) -> Path:
    """SAM 3, tiny."""
    from transformers import Sam3Config, Sam3Model

    tokenizer = load_tiny_tokenizer()
    size: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2}
    layer = size | {"num_layers": 1, "intermediate_size": 32}
    torch.manual_seed(0)
    config = Sam3Config(
        vision_config={
            "backbone_config": size
            | {
                "model_type": "sam3_vit_model",
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "image_size": 56,
                "window_size": 2,
                "global_attn_indexes": [1],
                "pretrain_image_size": 28,
            },
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "projection_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "eos_token_id": 2,
        },
        geometry_encoder_config=layer,
        detr_encoder_config=layer,
        detr_decoder_config=layer | {"num_queries": 5},
        mask_decoder_config=size,
    )
    Sam3Model(config).save_pretrained(folder)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.save_pretrained(folder)
    return folder


#: Name → writes the folder.
BASELINES: dict[str, Callable[[Path], Path]] = {
    "pixellm": write_pixellm,
    "lisa": write_lisa,
    "lisa_aug": write_lisa_aug,
    "lisa_rec": write_lisa_rec,
    "lisa_rec_llava": write_lisa_rec_llava,
    "clipseg": write_clipseg,
    "grounded_sam2": write_grounded_sam2,
    "sam3": write_sam3,
}


def _write_network(folder: Path, preset: str, *, points: bool = True, **overrides: Any) -> Path:
    torch.manual_seed(0)
    network = build_network(PixelLMConfig.from_preset(preset, **overrides)).eval()
    processor = PixelLMProcessor.for_preset(preset, **overrides)
    if points:
        _answer_with_masks(network, processor)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _answer_with_masks(network: PixelLMForConditionalGeneration, processor: PixelLMProcessor) -> None:
    """Makes random weights begin every answer with a mask: the head's row of the first codebook token becomes the state
    that a question ends with.
    """
    picture = processor.prepare_image(Image.new("RGB", (100, 60), "grey"))
    valid_hw = torch.tensor([picture.valid_hw])
    features = network.encode_images(processor.normalise(picture.pixels[None], valid_hw), valid_hw)
    ids = torch.tensor([processor.encode_prompt("Where?")])
    embeds, attendable = network.embed_inputs(ids, features, torch.tensor([0]))
    hidden, _ = network.language_forward(embeds, attendable, torch.arange(ids.shape[1])[None])
    network.lm_head.weight[processor.token_ids.codebook[0]] = hidden[0, -1]


def _bert_vocabulary() -> dict[str, int]:
    """BERT's ids of the tokens that Grounding DINO splits texts at, letters, and fillers."""
    words = [f"[unused{number}]" for number in range(1100)]
    for number, word in ((0, "[PAD]"), (100, "[UNK]"), (101, "[CLS]"), (102, "[SEP]"), (1012, "."), (1029, "?")):
        words[number] = word
    letters = [f"{prefix}{letter}" for prefix in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz"]
    words[200 : 200 + len(letters)] = letters
    return {word: number for number, word in enumerate(words)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
