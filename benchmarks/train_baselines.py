"""What the training step is compared with: a bare loop on our batches, and the released algorithm on the same samples.

The released step, as its code does it: one row per question (a VQA conversation is one), the picture repeated for each
of its rows before vision tower and projectors; rows padded to the longest; neck, codebook and pixel decoder picture by
picture; losses picture by picture at the pictures' own sizes without the refinement weight. Both sides here take the
AdamW of torch, clip, and step; neither has Ray or DeepSpeed, nor does either read data while it is timed.
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
from pixellm.model.backbone import ImageFeatures
from pixellm.model.codebook import gather_groups, match_groups
from pixellm.model.losses import text_loss
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.objective import MaskTargets, mask_losses
from pixellm.model.processing import PixelLMProcessor, TrainingExample
from pixellm.model.vision import pool_to_grid, pool_valid, valid_patches
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
            turns = dialogue.turns
            for conversation in [turns] if dialogue.kind == "vqa" else [(turn,) for turn in turns]:
                masks = [rle_decode(row.targets[index].mask) for turn in conversation for index in turn.target_indices]
                answers = [(turn.question, turn.answer, len(turn.target_indices)) for turn in conversation]
                examples.append(self.processor.encode_sample(row.image, answers, masks, None))
                pictures.append(picture)
        batch = self.processor.collate(examples)
        per_picture = [
            np.concatenate([examples[row].masks for row in range(len(examples)) if pictures[row] == picture])
            for picture in range(len(positions))
        ]
        return batch | {
            "pictures": torch.tensor(pictures),
            "target_masks": [torch.from_numpy(masks).float() for masks in per_picture],
            "original_hw": torch.from_numpy(np.stack([example.original_hw for example in examples])),
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
    """The released step's loss: vision and language row by row in one padded batch, then picture by picture."""
    ids, pictures, config = batch["input_ids"], batch["pictures"], model.config
    grid, valid_hw = config.patch_grid, batch["image_valid_hw"]
    patch_valid = valid_patches(valid_hw, grid, config.vision_config.patch_size)
    states = model.vision_tower.hidden_states(
        batch["pixel_values"], patch_valid, config.vision_layers, config.position_resize
    )
    tokens = model.image_projector(pool_to_grid(states[0], config.image_token_grid))
    maps = model.decoder_projector(torch.stack(states, dim=1)).transpose(2, 3).unflatten(3, (grid, grid))
    features = ImageFeatures(tokens, pool_valid(patch_valid, config.image_token_grid), maps)
    embeds, attendable = model.embed_inputs(ids, features, torch.arange(len(ids)), batch["attention_mask"])
    hidden, _ = model.language_forward(embeds, attendable, torch.arange(ids.shape[1])[None])
    loss = config.text_loss_weight * text_loss(model.lm_logits(hidden), batch["labels"])
    rows, positions = match_groups(ids, config.codebook_token_ids, batch["target_rows"])
    plain = copy.copy(config)
    plain.target_refinement_alpha = 1.0
    num_targets = max(1, len(rows))
    for picture, masks in enumerate(batch["target_masks"]):
        mine = (pictures[rows] == picture).nonzero().flatten()
        if not len(mine):
            continue
        first = slice(int(rows[mine[0]]), int(rows[mine[0]]) + 1)
        groups = gather_groups(hidden, rows[mine], positions[mine], config.group_size)
        scales = model.neck(maps[first].flatten(0, 1))[None]
        logits = model.decode_masks(model.codebook_embeds(groups), scales, torch.zeros(len(mine), dtype=torch.long))
        targets = MaskTargets([masks], rows[mine], torch.zeros_like(mine), valid_hw[first], batch["original_hw"][first])
        loss = loss + sum(mask_losses(logits, targets, plain).values()) * len(mine) / num_targets
    return loss
