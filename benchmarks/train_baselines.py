"""What the training step is compared with: a bare loop on our batches, and the released algorithm on the same samples.

The released step, as its code does it: one row per question (the picture's positions are repeated in each, its features
are not), rows padded to the longest, codebook and pixel decoder picture by picture, losses picture by picture at the
pictures' own sizes without the refinement weight. Both sides here take the AdamW of torch, clip, and step; neither has
Ray or DeepSpeed, nor does either read data while it is timed.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pixellm.jobs.train.deepspeed_engine import Batch
from pixellm.jobs.train.encode import SampleEncoder
from pixellm.jobs.train.loop import PreparedBatch, prepare_batch
from pixellm.model.codebook import gather_groups, match_groups
from pixellm.model.losses import text_loss
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.objective import MaskTargets, mask_losses
from pixellm.model.processing import PixelLMProcessor, TrainingExample
from pixellm.platform.data.compose import QuestionSource
from pixellm.platform.data.order import MixtureOrder
from pixellm.platform.masks import rle_decode
from pixellm.platform.settings import TrainSettings


@dataclass(frozen=True)
class SampleReader:
    """The samples of a run, read in this process."""

    sources: Sequence[QuestionSource]
    order: MixtureOrder
    processor: PixelLMProcessor
    mask_size: int

    def ours(self, step: int, train: TrainSettings) -> PreparedBatch:
        """The batch of a step (0-based) as our workers collate it."""
        encoder = SampleEncoder(self.processor, self.mask_size)
        examples = []
        for position in self._positions(step, train):
            draw = self.order.sample_at(position)
            row, dialogue = self.sources[draw.source].sample(draw)
            examples.append(encoder(row, dialogue, draw))
        return prepare_batch(examples, train.micro_batch_size, self.processor.collate)

    def released(self, step: int, train: TrainSettings) -> list[Batch]:
        """The same samples, one row per question, masks at the pictures' own sizes; one dict per micro-batch."""
        positions = self._positions(step, train)
        size = train.micro_batch_size
        return [self._released_micro_batch(positions[first : first + size]) for first in range(0, len(positions), size)]

    def _positions(self, step: int, train: TrainSettings) -> range:
        return range(step * train.global_batch_size, (step + 1) * train.global_batch_size)

    def _released_micro_batch(self, positions: range) -> Batch:
        examples: list[TrainingExample] = []
        pictures: list[int] = []
        for picture, position in enumerate(positions):
            draw = self.order.sample_at(position)
            row, dialogue = self.sources[draw.source].sample(draw)
            for turn in dialogue.turns:
                masks = [rle_decode(row.targets[index].mask) for index in turn.target_indices]
                answer = (turn.question, turn.answer, len(turn.target_indices))
                examples.append(self.processor.encode_sample(row.image, [answer], masks, None))
                pictures.append(picture)
        firsts = [pictures.index(picture) for picture in range(len(positions))]
        batch = self.processor.collate(examples)
        per_picture = [
            np.concatenate([examples[row].masks for row in range(len(examples)) if pictures[row] == picture])
            for picture in range(len(positions))
        ]
        return batch | {
            "pixel_values": batch["pixel_values"][firsts],
            "image_valid_hw": batch["image_valid_hw"][firsts],
            "image_index": torch.tensor(pictures),
            "target_masks": [torch.from_numpy(masks).float() for masks in per_picture],
            "original_hw": torch.from_numpy(np.stack([examples[first].original_hw for first in firsts])),
        }


class BareTrainer:
    """A model with torch's AdamW, and nothing else."""

    def __init__(self, model: PixelLMForConditionalGeneration, train: TrainSettings) -> None:
        self.model = copy.deepcopy(model).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
        self._trained, self._clip_norm = trained, train.clip_norm

    def step(self, micro_batches: Sequence[Batch], loss_of: Callable[[nn.Module, Batch], Tensor]) -> float:
        """One optimiser step; returns the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in micro_batches:
            loss = loss_of(self.model, batch) / len(micro_batches)
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self._trained, self._clip_norm)
        self._optimizer.step()
        return total


def our_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of the model's own forward."""
    return model(**batch).loss  # type: ignore[no-any-return]


def released_loss(model: Any, batch: Batch) -> Tensor:
    """The released step's loss: language in one padded batch, then codebook, decoder and losses picture by picture."""
    ids, image_index, config = batch["input_ids"], batch["image_index"], model.config
    features = model.encode_images(batch["pixel_values"], batch["image_valid_hw"])
    embeds, attendable = model.embed_inputs(ids, features, image_index, batch["attention_mask"])
    hidden, _ = model.language_forward(embeds, attendable, torch.arange(ids.shape[1])[None])
    loss = config.text_loss_weight * text_loss(model.lm_logits(hidden), batch["labels"])
    rows, positions = match_groups(ids, config.codebook_token_ids, batch["target_rows"])
    plain = copy.copy(config)
    plain.target_refinement_alpha = 1.0
    num_targets = max(1, len(rows))
    for picture, masks in enumerate(batch["target_masks"]):
        mine = (image_index[rows] == picture).nonzero().flatten()
        if not len(mine):
            continue
        groups = gather_groups(hidden, rows[mine], positions[mine], config.group_size)
        scales = features.scales[picture : picture + 1]
        logits = model.decode_masks(model.codebook_embeds(groups), scales, torch.zeros(len(mine), dtype=torch.long))
        valid_hw, original_hw = (batch[key][picture : picture + 1] for key in ("image_valid_hw", "original_hw"))
        targets = MaskTargets([masks], rows[mine], torch.zeros_like(mine), valid_hw, original_hw)
        loss = loss + sum(mask_losses(logits, targets, plain).values()) * len(mine) / num_targets
    return loss
