"""Floating-point operations of one answer: PixelLM beside LISA (paper Table 1), counted by torch on meta tensors.

LISA is the baseline's own network: LLaVA's Llama on CLIP-ViT-L/14 at 224 pixels (256 image tokens, as PixelLM has), and
SAM ViT-H at 1024 × 1024 with its mask decoder. Nothing is estimated: every matrix product of a forward pass
is counted, weights are never allocated.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixellm.errors import ConfigError
from pixellm.model.baselines.lisa import LisaForConditionalGeneration
from pixellm.model.baselines.lisa_config import LisaConfig
from pixellm.model.baselines.off_the_shelf import CLIPSEG, GROUNDING_DINO, SAM2, SAM3, build_published
from pixellm.model.config import PixelLMConfig
from pixellm.model.modeling import PixelLMForConditionalGeneration

TEXT_TOKENS = 100
CONVENTION = (
    "one forward pass over picture, question and answer at batch 1; a multiply-add counts as 2; matrix products, "
    "convolutions and attention (whole, not the causal half) are counted by torch's FlopCounterMode, norms and "
    "activations are not; 256 image tokens + {text_tokens} text tokens (system prompt, question, answer) in the "
    "language model, its head at every position, {num_targets} target(s) decoded"
)
PAPER_TFLOPS = {"pixellm-7b": 3.57, "lisa-7b": 7.16, "pixellm-13b": 6.65, "lisa-13b": 10.24}
DISTANCE = (
    "The paper states neither text length nor convention. Its 13B models cost 3.08 TFLOPs more than its 7B models, "
    "which is the language models' difference of 6.3 G multiply-adds per token at about 490 tokens, counting a "
    "multiply-add as 1. Counted so at 490 tokens, our PixelLM-7B costs 3.75 (paper: 3.57) and LISA-7B 6.36 (paper: "
    "7.16), at 13B 6.86 (6.65) and 9.46 (10.24): the paper's LISA pays 0.8 more for SAM than the 2.98 of "
    "transformers' ViT-H, the encoder's published cost. Ratios depend on the text length, because both sides pay the "
    "same for words and only LISA pays for SAM: at 490 tokens they are 0.59 and 0.73."
)


@dataclass(frozen=True)
class FlopsReport:
    """Operations of one model.

    Attributes:
        name: preset or baseline.
        tflops: by part, in 10¹² operations.
        text_tokens: positions beside the picture's.
        num_targets: masks decoded.
    """

    name: str
    tflops: dict[str, float]
    text_tokens: int
    num_targets: int

    @property
    def total_tflops(self) -> float:
        """Sum of the parts."""
        return sum(self.tflops.values())


@dataclass(frozen=True)
class FlopsComparison:
    """Two models side by side, beside the paper's numbers.

    Attributes:
        ours: PixelLM.
        theirs: the baseline.
    """

    ours: FlopsReport
    theirs: FlopsReport

    @property
    def ratio(self) -> float:
        """Ours / theirs; below 1 means that PixelLM is cheaper."""
        return self.ours.total_tflops / self.theirs.total_tflops

    @property
    def paper_ratio(self) -> float | None:
        """The paper's ratio of the same pair, where it gives one."""
        if self.ours.name not in PAPER_TFLOPS or self.theirs.name not in PAPER_TFLOPS:
            return None
        return PAPER_TFLOPS[self.ours.name] / PAPER_TFLOPS[self.theirs.name]

    def to_json_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "ratio": self.ratio,
            "paper_ratio": self.paper_ratio,
            "tflops": {report.name: report.tflops for report in (self.ours, self.theirs)},
            "total_tflops": {report.name: report.total_tflops for report in (self.ours, self.theirs)},
            "paper_tflops": {n: PAPER_TFLOPS.get(n) for n in (self.ours.name, self.theirs.name)},
            "convention": convention(self.ours.text_tokens, self.ours.num_targets),
            "distance": DISTANCE,
        }

    def to_text(self) -> str:
        """A table of parts, the ratio beside the paper's, the convention, and where the distance comes from."""
        names = [self.ours.name, self.theirs.name]
        parts = list(dict.fromkeys([*self.ours.tflops, *self.theirs.tflops]))
        rows = [("TFLOPs", *names)]
        rows += [(part, *(_cell(report.tflops.get(part)) for report in (self.ours, self.theirs))) for part in parts]
        rows += [("total", _cell(self.ours.total_tflops), _cell(self.theirs.total_tflops))]
        rows += [("paper", *(_cell(PAPER_TFLOPS.get(name)) for name in names))]
        table = "\n".join(f"{part:<16}{left:>14}{right:>14}" for part, left, right in rows)
        paper = "" if self.paper_ratio is None else f" (paper {self.paper_ratio:.2f})"
        where = convention(self.ours.text_tokens, self.ours.num_targets)
        return f"{table}\nratio {self.ratio:.3f}{paper}\n\n{where}\n\n{DISTANCE}"


def _cell(tflops: float | None) -> str:
    return "–" if tflops is None else f"{tflops:.3f}"


def convention(text_tokens: int = TEXT_TOKENS, num_targets: int = 1) -> str:
    """What is counted, in words."""
    return CONVENTION.format(text_tokens=text_tokens, num_targets=num_targets)


def compare_flops(
    preset: str, against: str, *, text_tokens: int = TEXT_TOKENS, num_targets: int = 1
) -> FlopsComparison:
    """Counts a preset and a baseline under one convention.

    Args:
        preset: of PixelLM.
        against: `"lisa-7b"`, `"lisa-13b"` or any preset; `"lisa-7b-rec"` or `"lisa-13b-rec"`; `"clipseg"`,
            `"grounded-sam2"` or `"sam3"` (the last two run on the CPU for minutes: their networks read values that
            meta tensors do not have).
        text_tokens: positions beside the picture's.
        num_targets: masks decoded on both sides.

    Raises:
        ConfigError: unknown name.
    """
    return FlopsComparison(
        count_flops(preset, text_tokens=text_tokens, num_targets=num_targets),
        count_flops(against, text_tokens=text_tokens, num_targets=num_targets),
    )


@cache
def count_flops(name: str, *, text_tokens: int = TEXT_TOKENS, num_targets: int = 1) -> FlopsReport:
    """Counts one model; arguments as of `compare_flops`."""
    if text_tokens < 1 or num_targets < 1:
        raise ConfigError(f"text_tokens={text_tokens} and num_targets={num_targets} must be at least 1")
    if name in _REC:  # LLaVA-13B names the targets, as in the paper
        llava, lisa = (PixelLMConfig.from_preset(preset) for preset in ("lisa-13b", _REC[name]))
        return FlopsReport(name, rec_tflops(llava, lisa, text_tokens, num_targets), text_tokens, num_targets)
    with torch.no_grad():
        if name in _TEXT_PROMPTED:
            tflops = {part: _count(run) for part, run in _TEXT_PROMPTED[name](num_targets).items()}
        else:
            tflops = forward_tflops(PixelLMConfig.from_preset(name), text_tokens=text_tokens, num_targets=num_targets)
    return FlopsReport(name, tflops, text_tokens, num_targets)


def forward_tflops(config: PixelLMConfig, *, text_tokens: int, num_targets: int) -> dict[str, float]:
    """Operations of one forward pass by part, in 10¹², of a network of any sizes; arguments as of `compare_flops`."""
    with torch.device("meta"), torch.no_grad():
        return {part: _count(run) for part, run in _parts(config, text_tokens, num_targets).items()}


def _parts(config: PixelLMConfig, text_tokens: int, num_targets: int) -> dict[str, Callable[[], object]]:
    if isinstance(config, LisaConfig):
        return _lisa(config, text_tokens, num_targets)
    return _pixellm(config, text_tokens, num_targets)


def _count(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def _pixellm(config: PixelLMConfig, text_tokens: int, num_targets: int) -> dict[str, Callable[[], object]]:
    model = PixelLMForConditionalGeneration(config).eval()
    side, grid = config.image_size, config.patch_grid
    pixels, valid = torch.zeros(1, 3, side, side), torch.ones(1, grid, grid, dtype=torch.bool)
    states = torch.zeros(1, config.num_scales, grid * grid, config.vision_config.hidden_size)
    pooled = torch.zeros(1, config.num_image_tokens, config.vision_config.hidden_size)
    width = config.text_config.hidden_size
    maps = torch.zeros(config.num_scales, width, grid, grid)
    scales = torch.zeros(1, config.num_scales, config.decoder_hidden_size, grid, grid)
    groups = torch.zeros(num_targets, config.group_size, width)
    embeds = torch.zeros(num_targets, config.num_scales, config.decoder_hidden_size)
    images = torch.zeros(num_targets, dtype=torch.long)
    layers = config.vision_layers
    return {
        "vision": lambda: model.vision_tower.hidden_states(pixels, valid, layers, config.position_resize),
        "projectors": lambda: (model.image_projector(pooled), model.decoder_projector(states)),
        "language": lambda: _language(model, config.num_image_tokens + text_tokens),
        "decoder": lambda: (
            model.neck(maps),
            model.codebook_embeds(groups),
            model.decode_masks(embeds, scales, images),
        ),
    }


def _language(model: PixelLMForConditionalGeneration, num_positions: int) -> Tensor:
    embeds = torch.zeros(1, num_positions, model.config.text_config.hidden_size)
    # A ready-made mask: making one from a 2D mask reads values, which meta tensors do not have.
    mask, positions = torch.zeros(1, 1, num_positions, num_positions), torch.arange(num_positions)[None]
    hidden, _ = model.language_forward(embeds, mask, positions)
    return model.lm_logits(hidden)


def _lisa(config: LisaConfig, text_tokens: int, num_targets: int) -> dict[str, Callable[[], object]]:
    model = LisaForConditionalGeneration(config).eval()
    width, channels = config.text_config.hidden_size, config.decoder_hidden_size
    clip_pixels = torch.zeros(1, 3, config.clip_size, config.clip_size)
    valid = torch.ones(1, config.patch_grid, config.patch_grid, dtype=torch.bool)
    pooled = torch.zeros(1, config.num_image_tokens, config.vision_config.hidden_size)
    sam_pixels = torch.zeros(1, 3, config.image_size, config.image_size)
    embeddings = torch.zeros(1, 1, channels, config.mask_grid // 4, config.mask_grid // 4)
    states, images = torch.zeros(num_targets, 1, width), torch.zeros(num_targets, dtype=torch.long)
    return {
        "vision": lambda: model.vision_tower.hidden_states(clip_pixels, valid, config.vision_layers, "correct"),
        "projectors": lambda: model.image_projector(pooled),
        "language": lambda: _language(model, config.num_image_tokens + text_tokens),
        "sam_encoder": lambda: model.sam_encoder(sam_pixels),
        "decoder": lambda: model.decode_masks(model.codebook_embeds(states), embeddings, images),
    }


def rec_tflops(llava: PixelLMConfig, lisa: PixelLMConfig, text_tokens: int, num_targets: int) -> dict[str, float]:
    """Operations of LISA_rec by part, in 10¹²: a model names the targets, LISA looks once and reads a question each."""
    words = forward_tflops(llava, text_tokens=text_tokens, num_targets=1)
    parts = forward_tflops(lisa, text_tokens=text_tokens, num_targets=num_targets)
    named = sum(words[part] for part in ("vision", "projectors", "language"))
    return {"llava": named, **parts, "language": num_targets * parts["language"]}


def _clipseg(num_targets: int) -> dict[str, Callable[[], object]]:
    network = build_published(CLIPSEG)
    ids = torch.zeros(num_targets, _PROMPT_TOKENS, dtype=torch.long, device="meta")
    pixels = torch.zeros(num_targets, 3, 352, 352, device="meta")
    return {"clipseg": lambda: network(input_ids=ids, pixel_values=pixels)}


def _grounded_sam2(num_targets: int) -> dict[str, Callable[[], object]]:
    detector, sam = build_published(GROUNDING_DINO, "cpu"), build_published(SAM2)
    ids, pixels = torch.zeros(num_targets, _PROMPT_TOKENS, dtype=torch.long), torch.zeros(num_targets, 3, 800, 1066)
    sam_pixels = torch.zeros(1, 3, 1024, 1024, device="meta")
    boxes = torch.zeros(1, num_targets, 4, device="meta")
    return {
        "grounding_dino": lambda: _as_products(lambda: detector(input_ids=ids, pixel_values=pixels)),
        "sam2": lambda: sam(pixel_values=sam_pixels, input_boxes=boxes, multimask_output=False),
    }


def _sam3(num_targets: int) -> dict[str, Callable[[], object]]:
    network: Any = build_published(SAM3, "cpu")
    ids, pixels = torch.zeros(1, 32, dtype=torch.long), torch.zeros(1, 3, 1008, 1008)

    def run() -> None:
        seen = network.get_vision_features(pixels)
        for _ in range(num_targets):
            network(vision_embeds=seen, input_ids=ids)

    return {"sam3": lambda: _as_products(run)}


def _as_products(run: Callable[[], object]) -> None:
    """With attention as matrix products: its fused form on the CPU is not counted."""
    with sdpa_kernel(SDPBackend.MATH):
        run()


_REC = {"lisa-7b-rec": "lisa-7b", "lisa-13b-rec": "lisa-13b"}
_TEXT_PROMPTED = {"clipseg": _clipseg, "grounded-sam2": _grounded_sam2, "sam3": _sam3}
_PROMPT_TOKENS = 8


def report_dict(report: FlopsReport) -> dict[str, Any]:
    """One report as plain JSON types, with its total and convention."""
    text = convention(report.text_tokens, report.num_targets)
    return asdict(report) | {"total_tflops": report.total_tflops, "convention": text}
