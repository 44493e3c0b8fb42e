"""Segmenters that take a phrase and give masks: CLIPSeg, Grounding DINO with SAM 2, and SAM 3, all from transformers.

They know no questions: what a question names ("Please segment the cat and the dog.") is asked for phrase by phrase,
and a question that names nothing is the phrase. Masks only; the text lists the phrases.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pixellm.errors import ModelLoadError
from pixellm.model.answers import question_phrases
from pixellm.model.baselines import pictures
from pixellm.model.images import open_rgb
from pixellm.model.segmentation import Picture, Segmentation, listed

GROUNDED_SAM2 = "pixellm-grounded-sam2"
#: The authors' thresholds: of Grounding DINO's boxes, of SAM 3's masks.
BOX_THRESHOLD, SAM3_THRESHOLD = 0.35, 0.5
_DUPLICATE_IOU = 0.8

Mask = npt.NDArray[np.bool_]


class TextPrompted(ABC):
    """A model that segments what a phrase names; see `pixellm.model.segmenter.Segmenter`."""

    def __init__(self, device: str) -> None:
        self.device = device

    def segment_many(self, questions: Sequence[tuple[Picture, str]]) -> list[Segmentation]:
        """Answers pair by pair; all phrases of a question are asked about together."""
        return [self._answer(open_rgb(picture), prompts_of(question)) for picture, question in questions]

    def close(self) -> None:  # noqa: B027 — none of them holds anything
        """Nothing to let go of."""

    @abstractmethod
    def masks_of(self, picture: Image.Image, prompts: Sequence[str]) -> list[list[Mask]]:
        """Masks at the picture's own size for each prompt; several where it finds several, or none."""

    @torch.inference_mode()
    def _answer(self, picture: Image.Image, prompts: Sequence[str]) -> Segmentation:
        found = self.masks_of(picture, prompts)
        return listed([(prompt, mask) for prompt, masks in zip(prompts, found, strict=True) for mask in masks])

    def _tokens(self, tokenizer: Any, texts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        encoded = tokenizer(list(texts), return_tensors="pt", truncation=True, **options)
        return {key: encoded[key].to(self.device) for key in ("input_ids", "attention_mask")}


class ClipSegSegmenter(TextPrompted):
    """CLIPSeg (`CIDAS/clipseg-rd64-refined`): one mask per phrase, empty masks left out."""

    def __init__(self, path: str | PathLike[str], device: str = "cpu") -> None:
        """Loads a Hugging Face folder with its tokenizer."""
        super().__init__(device)
        from transformers import CLIPSegForImageSegmentation  # slow import

        self._model: Any = load_part(CLIPSegForImageSegmentation, path, device)
        self._tokenizer = load_tokenizer(path)
        self._side = int(pictures.stored_size(path).get("height", 352))

    def masks_of(self, picture: Image.Image, prompts: Sequence[str]) -> list[list[Mask]]:
        """See `TextPrompted.masks_of`."""
        pixels = pictures.pixel_values(picture, (self._side, self._side), pictures.IMAGENET).to(
            self.device, self._model.dtype
        )
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokens(self._tokenizer, prompts, padding=True, max_length=length)
        logits = self._model(**tokens, pixel_values=pixels.expand(len(prompts), -1, -1, -1)).logits
        masks = pictures.masks_at_size(logits.reshape(len(prompts), *logits.shape[-2:]), picture.size[::-1])
        return [[mask] if mask.any() else [] for mask in masks]


class GroundedSam2Segmenter(TextPrompted):
    """Grounding DINO finds boxes for a phrase, SAM 2 makes a mask of each."""

    def __init__(self, path: str | PathLike[str], device: str = "cpu") -> None:
        """Loads `path/detector` and `path/segmenter`, Hugging Face folders."""
        super().__init__(device)
        from transformers import GroundingDinoForObjectDetection, Sam2Model  # slow import

        detector, segmenter = Path(path) / "detector", Path(path) / "segmenter"
        self._detector: Any = load_part(GroundingDinoForObjectDetection, detector, device)
        self._tokenizer = load_tokenizer(detector)
        self._sam: Any = load_part(Sam2Model, segmenter, device)
        size = pictures.stored_size(detector)
        self._edges = int(size.get("shortest_edge", 800)), int(size.get("longest_edge", 1333))
        self._side = int(self._sam.config.prompt_encoder_config.image_size)

    def masks_of(self, picture: Image.Image, prompts: Sequence[str]) -> list[list[Mask]]:
        """See `TextPrompted.masks_of`."""
        boxes = self._boxes(picture, prompts)
        if not any(map(len, boxes)):
            return [[] for _ in prompts]
        pixels = pictures.pixel_values(picture, (self._side, self._side), pictures.IMAGENET).to(
            self.device, self._sam.dtype
        )
        prompted = torch.cat(boxes)[None] * self._side
        logits = self._sam(pixel_values=pixels, input_boxes=prompted, multimask_output=False).pred_masks[0, :, 0]
        masks = iter(pictures.masks_at_size(logits, picture.size[::-1]))
        return [[next(masks) for _ in found] for found in boxes]

    def _boxes(self, picture: Image.Image, prompts: Sequence[str]) -> list[Tensor]:
        """Per prompt [N, 4] corners, x before y, in shares of the picture."""
        size = pictures.size_within(picture, *self._edges)
        pixels = pictures.pixel_values(picture, size, pictures.IMAGENET).to(self.device, self._detector.dtype)
        tokens = self._tokens(self._tokenizer, [f"{prompt.lower()}." for prompt in prompts], padding=True)
        output = self._detector(**tokens, pixel_values=pixels.expand(len(prompts), -1, -1, -1))
        scores = output.logits.sigmoid().amax(-1)
        centres, extents = output.pred_boxes[..., :2], output.pred_boxes[..., 2:]
        corners = torch.cat([centres - extents / 2, centres + extents / 2], -1).clamp(0, 1)
        return [best_boxes(*found, BOX_THRESHOLD) for found in zip(corners, scores, strict=True)]


class Sam3Segmenter(TextPrompted):
    """SAM 3 (`facebook/sam3`): a mask for every instance of a phrase."""

    def __init__(self, path: str | PathLike[str], device: str = "cpu") -> None:
        """Loads a Hugging Face folder with its tokenizer."""
        super().__init__(device)
        from transformers import Sam3Model  # slow import

        self._model: Any = load_part(Sam3Model, path, device)
        self._tokenizer = load_tokenizer(path)
        self._side = int(self._model.config.vision_config.image_size)

    def masks_of(self, picture: Image.Image, prompts: Sequence[str]) -> list[list[Mask]]:
        """See `TextPrompted.masks_of`."""
        pixels = pictures.pixel_values(picture, (self._side, self._side), pictures.HALVES).to(
            self.device, self._model.dtype
        )
        seen = self._model.get_vision_features(pixels)
        length = self._model.config.text_config.max_position_embeddings
        found = []
        for prompt in prompts:
            tokens = self._tokens(self._tokenizer, [prompt], padding="max_length", max_length=length)
            output = self._model(vision_embeds=seen, **tokens)
            scores = output.pred_logits[0].sigmoid() * output.presence_logits[0].sigmoid()
            found.append(pictures.masks_at_size(output.pred_masks[0, scores > SAM3_THRESHOLD], picture.size[::-1]))
        return found


def prompts_of(question: str) -> list[str]:
    """The phrases that a question names, or the whole question where it is none of those."""
    return question_phrases(question) or [re.sub(r"[\s.?!]+$", "", question.strip())]


def best_boxes(boxes_N4: Tensor, scores_N: Tensor, threshold: float) -> Tensor:
    """Boxes above the threshold, best first, without those that cover a better one almost exactly.

    Args:
        boxes_N4: corners, x before y.
        scores_N: 0 to 1.
        threshold: that a score must pass.
    """
    kept: list[Tensor] = []
    for index in scores_N.argsort(descending=True).tolist():
        if scores_N[index] <= threshold:
            break
        box = boxes_N4[index]
        if all(_box_iou(box, other) < _DUPLICATE_IOU for other in kept):
            kept.append(box)
    return torch.stack(kept) if kept else boxes_N4[:0]


def load_part(network: Any, path: str | PathLike[str], device: str) -> Any:
    """A Hugging Face network in evaluation mode, whole or not at all.

    Raises:
        ModelLoadError: no such folder, or weights that are missing or of another shape.
    """
    from pixellm.model.loading import check_loading_info, load_with_info

    model, info = load_with_info(network.from_pretrained, path, local_files_only=True)
    check_loading_info(path, info | {"unexpected_keys": []})  # published files hold heads that are not used here
    return model.to(device).eval()


def load_tokenizer(path: str | PathLike[str]) -> Any:
    """The tokenizer in a Hugging Face folder.

    Raises:
        ModelLoadError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer  # slow import

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"the tokenizer in {path} cannot be read: {error}; copy the whole folder") from error


def _box_iou(one: Tensor, other: Tensor) -> float:
    sides = (torch.minimum(one[2:], other[2:]) - torch.maximum(one[:2], other[:2])).clamp(min=0)
    common = float(sides.prod())
    total = float((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod()) - common
    return common / total if total > 0 else 1.0
