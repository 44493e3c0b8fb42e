"""What a model folder is called in a table, and what an answer of it costs."""

from dataclasses import dataclass
from pathlib import Path

from pixellm.model.baselines.lisa_config import LisaConfig
from pixellm.model.baselines.lisa_rec import LISA_REC
from pixellm.model.baselines.text_prompted import GROUNDED_SAM2
from pixellm.model.flops import TEXT_TOKENS, forward_tflops, rec_tflops
from pixellm.model.networks import NETWORKS, load_config, model_type_of

_NAMES = {
    LISA_REC: "LISA_rec",
    "clipseg": "CLIPSeg (in SEEM's place)",
    GROUNDED_SAM2: "Grounding DINO + SAM 2",
    "sam3": "SAM 3",
    "sam3_video": "SAM 3",
}


@dataclass(frozen=True)
class Method:
    """A row's head.

    Attributes:
        name: as the paper calls it, or what it is.
        tflops: of one answer by the convention of `pixellm.model.flops`, in 10¹²; None where it is not counted here.
    """

    name: str
    tflops: float | None


def method_of(folder: Path, num_targets: int) -> Method:
    """Names the model in a folder and counts an answer with so many targets.

    Raises:
        ModelLoadError: its `config.json` cannot be read.
    """
    kind = model_type_of(folder)
    if kind == LISA_REC and model_type_of(folder / "language") in NETWORKS:
        parts = rec_tflops(load_config(folder / "language"), load_config(folder / "lisa"), TEXT_TOKENS, num_targets)
        return Method(_NAMES[kind], sum(parts.values()))
    if kind not in NETWORKS:
        return Method(_NAMES.get(kind, kind), None)
    config = load_config(folder)
    count = 1 if config.merges_targets else num_targets
    tflops = sum(forward_tflops(config, text_tokens=TEXT_TOKENS, num_targets=count).values())
    if isinstance(config, LisaConfig):
        return Method("LISA" if config.merges_targets else "LISA_aug", tflops)
    is_plain = config.tokens_per_scale == 1 and config.target_refinement_alpha == 1
    return Method("PixelLM†" if is_plain else "PixelLM", tflops)
