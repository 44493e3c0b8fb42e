"""A tiny model with random weights that nevertheless answers in chosen words and names targets.

The last layer is solved for: with everything below it fixed and random, the hidden states in front of each token of the
wanted answers are known vectors, and there is a matrix that maps each to its token. Masks stay random.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from pixellm import PixelLMConfig, PixelLMForConditionalGeneration, PixelLMProcessor

TWO_THINGS = ("Segment the two animals.", "Here is the white cat [1] and the small bird [2] in one picture.")
FOLLOW_UP = ("And the bowl?", "The bowl [1] stands in front.")
_WORDS = (
    "one two three four five six seven eight nine ten red green blue black white yellow cat dog bird cow horse sheep "
    "bear cup fork knife spoon bowl chair couch bed table book clock vase car bus train truck boat bench"
)
LONG = ("Count.", f"{_WORDS} {_WORDS}")
ANSWERS = ([TWO_THINGS], [TWO_THINGS, FOLLOW_UP], [LONG])
"""Conversations of (question, answer as the engine gives it); the last answer of each is what the model has to say."""

Example = tuple[Image.Image, list[tuple[str, str, int]]]
"""A picture and turns (question, answer with {seg} markers, number of markers)."""


def as_turns(conversation: Sequence[tuple[str, str]]) -> list[tuple[str, str, int]]:
    """Answers with `{seg}` for `[k]`, as `encode_dialogue` takes them."""
    marked = [(question, re.sub(r"\[\d+\]", "{seg}", answer)) for question, answer in conversation]
    return [(question, answer, answer.count("{seg}")) for question, answer in marked]


def save_talking_model(folder: Path, examples: Sequence[Example], seed: int = 0) -> Path:
    """Writes a model folder that answers every example's last turn word by word (greedy)."""
    torch.manual_seed(seed)
    config = PixelLMConfig.from_preset("tiny")
    model = PixelLMForConditionalGeneration(config).eval()
    processor = PixelLMProcessor.for_preset("tiny")
    hidden, wanted = [], []
    for image, turns in examples:
        states_LD, labels_L = _states(model, processor, image, turns)
        keep_L = labels_L[1:] != -100
        hidden.append(states_LD[:-1][keep_L])
        wanted.append(labels_L[1:][keep_L])
    hidden_ND, wanted_N = torch.cat(hidden).double(), torch.cat(wanted)
    targets_NV = torch.nn.functional.one_hot(wanted_N, config.text_config.vocab_size).double() * 20.0
    weights_DV = torch.linalg.lstsq(hidden_ND, targets_NV, driver="gelsd").solution
    with torch.no_grad():
        model.lm_head.weight.copy_(weights_DV.T.float())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _states(
    model: PixelLMForConditionalGeneration,
    processor: PixelLMProcessor,
    image: Image.Image,
    turns: list[tuple[str, str, int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [L, D] in front of the language model's last layer, and labels [L]."""
    picture = processor.prepare_image(image)
    valid_hw = torch.tensor([picture.valid_hw])
    pixels = processor.normalise(torch.from_numpy(picture.pixels)[None], valid_hw)
    ids, labels = processor.encode_dialogue(turns)
    features = model.encode_images(pixels, valid_hw)
    embeds, mask = model.embed_inputs(torch.tensor([ids]), features, torch.zeros(1, dtype=torch.long))
    positions = torch.arange(embeds.shape[1])[None]
    states, _ = model.language_forward(embeds, mask, positions)
    return states[0], torch.tensor(labels)
