"""A start for networks on `shapes`, as the paper's networks start from LLaVA: one that can already read and look.

    python -m benchmarks.shapes_start OUT [--recipe ablations/full] [--language-steps 3000] [--sight-steps 1500]
    pixellm train --config recipes/shapes.yaml --model.init_from=OUT

From random weights a network learns masks long before it learns to look for what a question asks (EXPERIMENTS.md). Here
it learns that first, without a mask:

1. Language. Symbols stand in the place of the picture's tokens: the cell of an object's centre holds its colour, shape,
   place and size as vectors that are learned with the rest, every other cell says that nothing is there. The language
   model learns to answer from them.
2. Sight. Vision tower and projector learn to write these symbols for a picture.

OUT becomes a model folder; its mask decoder is untrained. The last line is one JSON object: the shares of held-out
questions whose answer is right word for word, given the true words before each, from symbols and from pictures.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import get_linear_schedule_with_warmup

from benchmarks.harness import describe, report
from pixellm.jobs.train.build import build_model, build_processor
from pixellm.model.losses import text_loss
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.processing import IGNORED_LABEL, PixelLMProcessor
from pixellm.platform.data.schema import Row
from pixellm.platform.data.shape_scenes import CANVAS_PX, COLORS, KINDS
from pixellm.platform.data.sources.shapes import ShapesSource
from pixellm.platform.settings import load_settings

_LANGUAGE_BATCH, _QUESTIONS, _SIGHT_BATCH = 16, 4, 32
_WARM_STEPS = 50
_SIGHT_LR = 1e-3
_PLAIN_STD = 0.02
_HELD_OUT = 48
_FIRST_LOOK = 1_000_000
"""Pictures of the second step come from here on: none was asked about in the first."""


class Symbols(NamedTuple):
    """What a grid of G² cells holds: [B, G²] colours and shapes (0 = nothing), [B, G², 3] x, y and size."""

    colors: Tensor
    kinds: Tensor
    places: Tensor


class SymbolReader(nn.Module):
    """Symbols → what the language model reads in the place of image tokens, [B, G², D]."""

    def __init__(self, num_cells: int, size: int, std: float) -> None:
        super().__init__()
        self.color, self.kind = nn.Embedding(len(COLORS) + 1, size), nn.Embedding(len(KINDS) + 1, size)
        self.cell, self.place = nn.Embedding(num_cells, size), nn.Linear(3, size)
        for part in (self.color, self.kind, self.cell, self.place):
            nn.init.normal_(part.weight, std=std)

    def forward(self, symbols: Symbols) -> Tensor:
        """See the class."""
        is_object = (symbols.colors > 0).unsqueeze(-1)
        names = self.color(symbols.colors) + self.kind(symbols.kinds)
        return names + self.cell.weight + self.place(symbols.places) * is_object


def symbols_of(rows: Sequence[Row], side: int) -> Symbols:
    """The objects of pictures on grids of side × side cells; centres are too far apart for two in a cell of 6 × 6."""
    colors = np.zeros((len(rows), side * side), dtype=np.int64)
    kinds, places = np.zeros_like(colors), np.zeros((*colors.shape, 3), dtype=np.float32)
    for number, row in enumerate(rows):
        for target in row.targets:
            color, kind = target.phrase.split()
            x0, y0, x1, y1 = target.box
            x, y, extent = (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0)
            cell = int(y * side // CANVAS_PX) * side + int(x * side // CANVAS_PX)
            colors[number, cell], kinds[number, cell] = 1 + list(COLORS).index(color), 1 + KINDS.index(kind)
            places[number, cell] = (2 * x / CANVAS_PX - 1, 2 * y / CANVAS_PX - 1, 4 * extent / CANVAS_PX - 1)
    return Symbols(*map(torch.from_numpy, (colors, kinds, places)))


class Pupil:
    """A network that learns to read and to look."""

    def __init__(self, model: PixelLMForConditionalGeneration, processor: PixelLMProcessor) -> None:
        self.model, self.processor = model.train(), processor
        config = model.config
        self._side = config.image_token_grid
        std = config.embedding_initializer_range or _PLAIN_STD
        self.reader = SymbolReader(self._side**2, config.text_config.hidden_size, std)

    def read(self, dialogues: Sequence[Sequence[tuple[str, str, int]]], cells: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, L, V] and labels [B, L] of dialogues about what stands in `cells`, [B, G², D]."""
        config, pad_token_id = self.model.config, self.processor.tokenizer.pad_token_id
        pairs = [self.processor.encode_dialogue(turns) for turns in dialogues]
        ids, labels = (
            pad_sequence([torch.tensor(pair[part]) for pair in pairs], batch_first=True, padding_value=filler)
            for part, filler in ((0, pad_token_id), (1, IGNORED_LABEL))
        )
        lengths = torch.tensor([len(pair[0]) for pair in pairs])
        is_cell = ids == config.image_token_id
        embeds = self.model.get_input_embeddings()(ids.masked_fill(is_cell, 0))
        embeds = embeds.masked_scatter(is_cell.unsqueeze(-1).expand_as(embeds), cells)
        places = torch.arange(ids.shape[1])
        hidden, _ = self.model.language_forward(embeds, places[None] < lengths[:, None], places[None])
        return self.model.lm_logits(hidden), labels

    def language_loss(self, rows: Sequence[Row]) -> Tensor:
        """Of all words about pictures that are given as symbols."""
        cells = self.reader(symbols_of(rows, self._side))
        return text_loss(*self.read([_turns(row)[:_QUESTIONS] for row in rows], cells))

    def sight_loss(self, rows: Sequence[Row]) -> Tensor:
        """Mean square error of the image tokens, 1 = as far off as one fixed value."""
        with torch.no_grad():
            wanted = self.reader(symbols_of(rows, self._side))
        return (self.look(rows) - wanted).square().mean() / wanted.var()

    def look(self, rows: Sequence[Row]) -> Tensor:
        """The image tokens of pictures, [B, G², D]."""
        examples = [self.processor.encode_sample(row.image, [("Look.", "Yes.", 0)], [], 8) for row in rows]
        batch = self.processor.collate(examples)
        return self.model.encode_images(batch["pixel_values"], batch["image_valid_hw"]).image_tokens

    @torch.no_grad()
    def shares_right(self, rows: Sequence[Row], *, from_pictures: bool) -> dict[str, float]:
        """Of all questions about pictures, and of those with one and with several targets: the share answered right."""
        self.model.eval()
        codebook = torch.tensor(self.model.config.codebook_token_ids)
        right: dict[str, list[bool]] = {"all": [], "one": [], "several": []}
        for row in rows:
            cells = self.look([row]) if from_pictures else self.reader(symbols_of([row], self._side))
            turns = _turns(row)
            logits, labels = self.read([[turn] for turn in turns], cells.expand(len(turns), -1, -1))
            wanted = labels[:, 1:]
            is_free = (wanted == IGNORED_LABEL) | torch.isin(wanted, codebook)
            for turn, is_right in zip(turns, ((logits[:, :-1].argmax(-1) == wanted) | is_free).all(1), strict=True):
                for name in ("all", "one" if turn[2] == 1 else "several"):
                    right[name].append(bool(is_right))
        self.model.train()
        return {name: float(np.mean(values)) for name, values in right.items()}


def learn(name: str, steps: int, lr: float, parts: Sequence[nn.Parameter], loss_at: Callable[[int], Tensor]) -> None:
    """Steps of AdamW with warm-up and linear decay; says how it goes."""
    optimizer = torch.optim.AdamW(parts, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, min(_WARM_STEPS, steps // 4), steps)
    recent: list[float] = []
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parts, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(float(loss.detach()))
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"{name} {step + 1}/{steps}: loss {np.mean(recent[-100:]):.4f}", flush=True)


def teach(
    recipe: str, language_steps: int, sight_steps: int, out: Path, num_held_out: int = _HELD_OUT
) -> dict[str, Any]:
    """Makes a start for the recipe, writes it to `out` and returns the numbers, of so many held-out pictures."""
    settings = load_settings(recipe)
    torch.manual_seed(settings.seed)
    pupil = Pupil(build_model(settings), build_processor(settings))
    source = ShapesSource()
    held_out = [ShapesSource(split="val").row_at(index) for index in range(num_held_out)]

    def rows_of(first: int, count: int) -> list[Row]:
        return [source.row_at(first + index) for index in range(count)]

    trained = [weight for weight in pupil.model.parameters() if weight.requires_grad]
    learn("language", language_steps, settings.train.lr, [*trained, *pupil.reader.parameters()],
          lambda step: pupil.language_loss(rows_of(step * _LANGUAGE_BATCH, _LANGUAGE_BATCH)))  # fmt: skip
    from_symbols = pupil.shares_right(held_out, from_pictures=False)
    print(f"right from symbols: {from_symbols}", flush=True)
    learn("sight", sight_steps, _SIGHT_LR, trained,
          lambda step: pupil.sight_loss(rows_of(_FIRST_LOOK + step * _SIGHT_BATCH, _SIGHT_BATCH)))  # fmt: skip
    from_pictures = pupil.shares_right(held_out, from_pictures=True)
    pupil.model.save_pretrained(out)
    pupil.processor.save_pretrained(out)
    return {"right_from_symbols": from_symbols, "right_from_pictures": from_pictures}


def _turns(row: Row) -> list[tuple[str, str, int]]:
    return [(dialogue.question, dialogue.answer, len(dialogue.target_ids)) for dialogue in row.dialogues]


def main(arguments: Sequence[str] | None = None) -> None:
    """Teaches, and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="model folder to write")
    parser.add_argument("--recipe", default="ablations/full", help="whose network is made (default: ablations/full)")
    parser.add_argument("--language-steps", type=int, default=3000)
    parser.add_argument("--sight-steps", type=int, default=1500)
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    torch.set_num_threads(1)
    result = describe("shapes_start", recipe=options.recipe)
    result |= teach(options.recipe, options.language_steps, options.sight_steps, options.out)
    result["seconds"] = round(time.perf_counter() - started, 1)
    report(result)


if __name__ == "__main__":
    main()
