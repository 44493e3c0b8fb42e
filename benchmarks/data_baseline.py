"""The released way of reading: a PyTorch `DataLoader` over raw files, one picture and its masks decoded per sample.

After reference.md, "Image path" and "Training as released": OpenCV reads the file, Pillow resizes the longest side to
448 with antialiasing, floats are normalised and padded sample by sample; masks are decoded by pycocotools at the
picture's own size. Questions and tokenizer are ours, so that both sides write the same amount of text.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset

from pixellm.model.processing import IGNORED_LABEL, SAM_MEAN, SAM_STD, PixelLMProcessor
from pixellm.platform.data.templates import MULTI_ANSWERS, MULTI_QUESTIONS, SINGLE_ANSWERS, SINGLE_QUESTIONS

MAX_TARGETS = 3


class ReleasedDataset(Dataset[dict[str, Any]]):
    """A COCO-format folder: `images/` and `instances.json`, each picture with targets once."""

    def __init__(self, folder: Path, processor: PixelLMProcessor) -> None:
        content = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
        self.names = {category["id"]: category["name"] for category in content["categories"]}
        by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in content["annotations"]:
            if not annotation["iscrowd"]:
                by_image.setdefault(annotation["image_id"], []).append(annotation)
        self.samples = [(image, by_image[image["id"]]) for image in content["images"] if image["id"] in by_image]
        self.folder, self.processor = folder, processor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, annotations = self.samples[index]
        rng = np.random.default_rng(index)
        count = min(len(annotations), int(rng.integers(1, MAX_TARGETS + 1)))
        chosen = [annotations[place] for place in rng.permutation(len(annotations))[:count]]
        pixels = cv2.cvtColor(cv2.imread(str(self.folder / "images" / image["file_name"])), cv2.COLOR_BGR2RGB)
        height, width = pixels.shape[:2]
        masks = np.stack([_decode(annotation["segmentation"], height, width) for annotation in chosen])
        names = [f"the {self.names[annotation['category_id']]}" for annotation in chosen]
        input_ids, labels = self.processor.encode_dialogue([(*_words(names, rng), count)])
        return {
            "pixels": self._preprocess(pixels),
            "masks": torch.from_numpy(masks),
            "input_ids": torch.tensor(input_ids),
            "labels": torch.tensor(labels),
        }

    def _preprocess(self, pixels: np.ndarray) -> torch.Tensor:
        size = self.processor.image_size
        scale = size / max(pixels.shape[:2])
        height, width = (int(side * scale + 0.5) for side in pixels.shape[:2])
        resized = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
        values = torch.from_numpy(resized).permute(2, 0, 1).contiguous().float()
        values = (values - torch.tensor(SAM_MEAN).view(-1, 1, 1)) / torch.tensor(SAM_STD).view(-1, 1, 1)
        return F.pad(values, (0, size - width, 0, size - height))


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks pictures, pads text, keeps masks picture by picture, as floats for the losses."""
    padded = torch.nn.utils.rnn.pad_sequence
    ids = padded([example["input_ids"] for example in examples], batch_first=True)
    return {
        "pixel_values": torch.stack([example["pixels"] for example in examples]),
        "input_ids": ids,
        "attention_mask": ids != 0,
        "labels": padded([example["labels"] for example in examples], batch_first=True, padding_value=IGNORED_LABEL),
        "target_masks": [example["masks"].float() for example in examples],
    }


@dataclass(frozen=True)
class ReleasedLoader:
    """Batches of the released kind, endlessly reshuffled."""

    folder: Path
    processor: PixelLMProcessor
    batch_size: int
    num_workers: int = 2

    def batches(self, count: int) -> Iterator[dict[str, Any]]:
        """Yields `count` batches."""
        loader = DataLoader(
            ReleasedDataset(self.folder, self.processor),
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=True,
            persistent_workers=True,
        )
        given = 0
        while True:
            for batch in loader:
                yield batch
                given += 1
                if given == count:
                    return


def _decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    codes = coco_mask.frPyObjects(segmentation, height, width)
    decoded: np.ndarray = coco_mask.decode(codes)
    return decoded.sum(axis=2).clip(max=1).astype(np.uint8) if decoded.ndim == 3 else decoded


def _words(names: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    several = len(names) > 1
    questions, answers = (MULTI_QUESTIONS, MULTI_ANSWERS) if several else (SINGLE_QUESTIONS, SINGLE_ANSWERS)
    question = questions[int(rng.integers(len(questions)))].replace("{objects}", ", ".join(names))
    listed = ", ".join(f"{name} {{seg}}" for name in names)
    answer = answers[int(rng.integers(len(answers)))]
    for gap, words in {"{named}": names[0], "{Named}": names[0], "{listed}": listed, "{Listed}": listed}.items():
        answer = answer.replace(gap, words)
    return question, answer
