"""The whole converted model against `e2e_*` golden files: losses, gradients, teacher-forced and generated masks.

Generation here is the plain algorithm (whole prompt again for every token, no cache), so that it can judge the engine.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixellm.model.backbone import ImageFeatures
from pixellm.model.codebook import find_groups, gather_groups
from pixellm.model.convert import from_official
from pixellm.model.images import logits_at_original_size
from pixellm.model.modeling import PixelLMForConditionalGeneration, PixelLMOutput
from pixellm.model.official import official_name
from pixellm.model.vision import valid_patches

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]

MAX_NEW_TOKENS = 40
ZERO_GRADIENT = 1e-6
"""Below this a gradient norm is rounding noise around a true zero (key biases, which a softmax does not feel)."""
_SUFFIXES = {"config": "config.json", "state": "state.npz", "vision_state": "vision_state.npz", "io": "io.npz"}


def e2e_members(paths: list[Path]) -> dict[str, dict[str, Path]]:
    """Groups `e2e_NAME_{config.json, state.npz, vision_state.npz, io.npz}` by NAME.

    Raises:
        SystemExit: a file of another name, or a group that is not whole.
    """
    groups: dict[str, dict[str, Path]] = {}
    for path in paths:
        kinds = sorted((k for k, v in _SUFFIXES.items() if path.name.endswith(f"_{v}")), key=len)
        if not kinds:
            raise SystemExit(f"{path} is of no known form; known: e2e_NAME_{{{', '.join(_SUFFIXES.values())}}}")
        name = path.name.removeprefix("e2e_").removesuffix(f"_{_SUFFIXES[kinds[-1]]}")
        groups.setdefault(name, {})[kinds[-1]] = path
    for name, members in groups.items():
        if missing := _SUFFIXES.keys() - members.keys():
            raise SystemExit(f"e2e_{name} lacks {', '.join(_SUFFIXES[kind] for kind in sorted(missing))}")
    return groups


@dataclass
class Case:
    """One golden model with its inputs, pictures expanded to their token positions.

    Attributes:
        model: converted from the released weights, fp32.
        golden: arrays of `io.npz`.
        official: the released configuration.
        inputs: arguments of `forward`, losses at original size.
    """

    model: PixelLMForConditionalGeneration
    golden: dict[str, np.ndarray]
    official: dict[str, Any]
    inputs: dict[str, Any]

    @property
    def num_pictures(self) -> int:
        """I."""
        return len(self.golden["in.images"])

    @property
    def rows_of_first(self) -> int:
        """Questions of picture 0."""
        return int(self.golden["in.offset"][1])


def load_case(members: dict[str, Path]) -> Case:
    """Converts the model and expands the inputs."""
    official = json.loads(members["config"].read_text())
    model = from_official(
        _tensors(members["state"]),
        official,
        tokens_per_scale=official["tokens_per_scale"],
        num_scales=official["num_scales"],
        vision_state_dict=_tensors(members["vision_state"]),
    ).eval()
    golden = dict(np.load(members["io"]))
    count, placeholder = model.config.num_image_tokens, official["image_token_index"]
    ids = torch.from_numpy(golden["in.input_ids"])
    at = (ids == placeholder).int().argmax(1)
    input_ids = expand_pictures(ids, at, count, model.config.image_token_id)
    offset = golden["in.offset"]
    pictures = range(len(golden["in.images"]))
    inputs = {
        "input_ids": input_ids,
        "attention_mask": expand_pictures(torch.from_numpy(golden["in.attention_mask"]), at, count, True),
        "labels": expand_pictures(torch.from_numpy(golden["in.labels"]), at, count, -100),
        "pixel_values": torch.from_numpy(golden["in.images"]).float(),
        "image_valid_hw": torch.from_numpy(golden["in.clip_resize"]),
        "image_index": torch.tensor([i for i in pictures for _ in range(offset[i], offset[i + 1])]),
        "target_masks": [torch.from_numpy(golden[f"in.masks.{i}"]) for i in pictures],
        "target_rows": find_groups(input_ids, model.config.codebook_token_ids)[0],
        "original_hw": torch.from_numpy(golden["in.original_size"]),
    }
    return Case(model, golden, official, inputs)


def expand_pictures(rows: Tensor, at: Tensor, count: int, value: Any) -> Tensor:
    """Puts `count` times `value` in place of the one position `at` of each row."""
    fill = torch.full((count,), value, dtype=rows.dtype)
    return torch.stack([torch.cat([row[:i], fill, row[i + 1 :]]) for row, i in zip(rows, at, strict=True)])


def compare_e2e(members: dict[str, Path]) -> tuple[Pairs, Pairs]:
    """Recomputes one golden model: the arrays of `io.npz`, and the gradient norms of `config.json`."""
    case = load_case(members)
    output = case.model(**case.inputs)
    output.loss.backward()
    gradients = _gradient_norms(case)
    with torch.no_grad():
        pairs = _losses(case, output) | _forced(case, output) | _inside(case)
        for key in case.golden:
            if key.startswith("gen.") and key.endswith(".picture"):
                pairs |= _generated(case, int(key.split(".")[1]))
    return pairs, gradients


def _losses(case: Case, output: PixelLMOutput) -> Pairs:
    losses = output.losses or {}
    ours = {
        "loss": output.loss,
        "ce_loss": losses["text"],
        "mask_bce_loss": losses["ref"],
        "mask_dice_loss": losses["dice"],
        "mask_loss": losses["ref"] + losses["dice"],
    }
    golden = case.golden
    return {f"train.{k}": (v.detach().numpy(), golden[f"train.{k}"]) for k, v in ours.items() if f"train.{k}" in golden}


def _gradient_norms(case: Case) -> Pairs:
    norms = {
        official_name(name): parameter.grad.norm().item()
        for name, parameter in case.model.named_parameters()
        if parameter.grad is not None and not name.startswith("vision_tower.")
    }
    # Weights that we leave out, because no result depends on them, must have no gradient there either.
    wanted = case.official["grad_norms"]
    ours = {name: np.array(norms.get(name, 0.0)) for name in wanted}
    pairs = {name: (ours[name], np.array(norm)) for name, norm in wanted.items() if norm > ZERO_GRADIENT}
    pairs["all"] = (np.array(list(ours.values())), np.array(list(wanted.values())))
    return pairs


def _forced(case: Case, output: PixelLMOutput) -> Pairs:
    images = case.inputs["image_index"][output.target_rows]
    pairs: Pairs = {}
    for i in range(case.num_pictures):
        masks, scores = at_original_size(case, output.mask_logits[images == i], i)
        pairs[f"forced.{i}.mask_logits"] = (masks, case.golden[f"forced.{i}.mask_logits"])
        pairs[f"forced.{i}.mask_scores"] = (scores, case.golden[f"forced.{i}.mask_scores"])
        key = f"forced.{i}.logits"
        if key in case.golden:
            rows = slice(int(case.golden["in.offset"][i]), int(case.golden["in.offset"][i + 1]))
            real = case.inputs["attention_mask"][rows].numpy()
            pairs[key] = (output.logits[rows].numpy()[real], case.golden[key][real])
    return pairs


def _inside(case: Case) -> Pairs:
    """`mid.*`: picture 0 with its questions."""
    model, golden, inputs = case.model, case.golden, case.inputs
    rows = slice(0, case.rows_of_first)
    input_ids, mask = inputs["input_ids"][rows], inputs["attention_mask"][rows]
    features = model.encode_images(inputs["pixel_values"][:1], inputs["image_valid_hw"][:1])
    hidden = _hidden(model, features, input_ids, mask)
    found = find_groups(input_ids, model.config.codebook_token_ids)
    embeds = model.codebook_embeds(gather_groups(hidden, *found, model.config.group_size))
    decoded = model.decode_levels(embeds, features.scales, torch.zeros(len(embeds), dtype=torch.long))
    ours = {
        "image_tokens": features.image_tokens,
        "last_hidden": hidden,
        "text_hidden": model.codebook.head(hidden),
        "fused_embeds": embeds,
        "neck": features.scales[0, :, :, ::5, ::7],
        **{f"level_logits.{i}": logits for i, logits in enumerate(decoded.level_logits)},
    }
    for layer, states in zip(case.official["feature_layers"], _vision_states(case), strict=True):
        ours[f"vision_m{-layer}"] = states[:, ::13]
    pairs = {}
    for key, value in ours.items():
        array, wanted = value.numpy(), golden[f"mid.{key}"]
        if key in ("last_hidden", "text_hidden"):
            array, wanted = array[mask.numpy()], wanted[mask.numpy()]
        pairs[f"mid.{key}"] = (array, wanted)
    return pairs


def _vision_states(case: Case) -> list[Tensor]:
    config = case.model.config
    valid = valid_patches(case.inputs["image_valid_hw"][:1], config.patch_grid, config.vision_config.patch_size)
    pixels = case.inputs["pixel_values"][:1]
    return case.model.vision_tower.hidden_states(pixels, valid, config.vision_layers, config.position_resize)


def _generated(case: Case, j: int) -> Pairs:
    golden, picture = case.golden, int(case.golden[f"gen.{j}.picture"])
    output_ids, mask_logits = generate_plainly(case, torch.from_numpy(golden[f"gen.{j}.prompt_ids"]), picture)
    masks, scores = at_original_size(case, mask_logits, picture)
    return {
        f"gen.{j}.output_ids (exact)": (output_ids.numpy(), golden[f"gen.{j}.output_ids"]),
        f"gen.{j}.mask_logits": (masks, golden[f"gen.{j}.mask_logits"]),
        f"gen.{j}.mask_scores": (scores, golden[f"gen.{j}.mask_scores"]),
    }


def generate_plainly(case: Case, prompt_ids: Tensor, picture: int) -> tuple[Tensor, Tensor]:
    """Greedy generation without a cache: every token runs the whole sequence again.

    Args:
        case: the model and its pictures.
        prompt_ids: `[1, T]` with one placeholder for the picture.
        picture: index of the picture.

    Returns:
        Prompt and answer `[1, T']` with the one placeholder, and mask logits `[M, h, h]` of the answer's groups.
    """
    model, config = case.model, case.model.config
    one = slice(picture, picture + 1)
    features = model.encode_images(case.inputs["pixel_values"][one], case.inputs["image_valid_hw"][one])
    at = (prompt_ids == case.official["image_token_index"]).int().argmax(1)
    ids = expand_pictures(prompt_ids, at, config.num_image_tokens, config.image_token_id)
    start, eos = ids.shape[1], config.text_config.eos_token_id
    while ids.shape[1] < start + MAX_NEW_TOKENS and (ids.shape[1] == start or ids[0, -1] != eos):
        hidden = _hidden(model, features, ids, torch.ones_like(ids))
        ids = torch.cat([ids, model.lm_logits(hidden[:, -1:]).argmax(-1)], dim=1)
    hidden = _hidden(model, features, ids, torch.ones_like(ids))
    rows, positions = find_groups(ids[:, start:], config.codebook_token_ids)
    embeds = model.codebook_embeds(gather_groups(hidden, rows, positions + start, config.group_size))
    output_ids = torch.cat([prompt_ids, ids[:, start:]], dim=1)
    return output_ids, model.decode_masks(embeds, features.scales, torch.zeros_like(rows))


def at_original_size(case: Case, mask_logits: Tensor, picture: int) -> tuple[np.ndarray, np.ndarray]:
    """Mask logits `[M, H, W]` at the picture's own size, and scores `[M]`: mean probability of positive pixels."""
    rows, columns = (int(v) for v in case.golden["in.clip_resize"][picture])
    height, width = (int(v) for v in case.golden["in.original_size"][picture])
    logits = logits_at_original_size(mask_logits, case.model.config.image_size, (rows, columns), (height, width))
    inside = logits > 0
    scores = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    return logits.numpy(), scores.numpy()


def _hidden(model: PixelLMForConditionalGeneration, features: ImageFeatures, input_ids: Tensor, mask: Tensor) -> Tensor:
    embeds, attendable = model.embed_inputs(input_ids, features, torch.zeros(len(input_ids), dtype=torch.long), mask)
    return model.language_forward(embeds, attendable, torch.arange(input_ids.shape[1])[None])[0]


def _tensors(path: Path) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value).float() for key, value in np.load(path).items()}
