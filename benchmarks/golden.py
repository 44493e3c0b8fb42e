"""Agreement with the released implementation's numbers: every array of a folder of golden files, recomputed by ours.

    python -m benchmarks.golden [--dir tests/golden]

The last line is one JSON object. `max_relative_error` holds, by file, the largest |ours − golden| / max |golden| over
the file's arrays; 1.0 where ids or areas that must be equal are not. The README.md there says what each file holds.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.golden_e2e import compare_e2e, e2e_members
from benchmarks.harness import describe, report
from pixellm.model.codebook import MeanFusion, TokenFusion
from pixellm.model.decoder import FeatureNeck, PixelDecoder
from pixellm.model.images import logits_at_original_size
from pixellm.model.losses import dice_losses, mean_over_targets, refinement_losses
from pixellm.model.official import official_name
from pixellm.model.processing import PixelLMProcessor
from pixellm.model.vision import resize_positions

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]
"""By array name: ours and the golden one, of equal shape."""


def compare_fusion(path: Path) -> Pairs:
    """`{N}x{L}`: the constant fusion, and the learned one as it starts."""
    golden, pairs = dict(np.load(path)), {}
    for case in sorted({key.split(".")[0] for key in golden}):
        tokens_per_scale, num_scales = (int(v) for v in case.split("x"))
        hidden, fused = torch.from_numpy(golden[f"{case}.hidden"]), golden[f"{case}.fused"]
        learned = TokenFusion(tokens_per_scale, num_scales, hidden.shape[-1])
        pairs[f"{case}.mean"] = (MeanFusion(tokens_per_scale, num_scales)(hidden).numpy(), fused)
        pairs[f"{case}.learned"] = (learned(hidden).detach().numpy(), fused)
    return pairs


class _NeckAndDecoder(nn.Module):
    def __init__(self, golden: dict[str, np.ndarray]) -> None:
        super().__init__()
        width, heads, mlp_size, _, _, in_size = (int(v) for v in golden["sizes"])
        num_scales = len(golden["in.features"])
        blocks = re.compile(r"w\.model\.mask_decoder\.transformer\.0\.layers\.(\d+)\.")
        depth = 1 + max(int(match.group(1)) for key in golden if (match := blocks.match(key)))
        iou_size = len(golden["w.model.mask_decoder.iou_prediction_head.layers.0.weight"])
        self.neck = FeatureNeck(in_size, width)
        self.decoder = PixelDecoder(width, heads, mlp_size, depth, num_scales, "mean", iou_size)
        weights = {name: torch.from_numpy(golden[f"w.{official_name(name)}"]).float() for name in self.state_dict()}
        self.load_state_dict(weights)


def compare_decoder(path: Path) -> Pairs:
    """One pixel decoder with its neck: values inside and out, and gradients of mean(mask_logits²)."""
    golden = dict(np.load(path))
    model = _NeckAndDecoder(golden)
    features = torch.from_numpy(golden["in.features"]).requires_grad_()
    embeds = torch.from_numpy(golden["in.embeds"]).requires_grad_()
    neck = model.neck(features)
    masks = model.decoder(embeds, neck[None], torch.zeros(len(embeds), dtype=torch.long))
    masks.mask_logits.square().mean().backward()
    grid = neck.shape[-1]
    positions = model.decoder.coarse_positions(grid).T.unflatten(1, (grid, grid))[None]
    ours: dict[str, Tensor | None] = {
        "mid.neck": neck,
        "mid.dense_pe": positions,
        "out.mask_logits": masks.mask_logits,
        "grad.embeds": embeds.grad,
        "grad.features": features.grad,
    }
    for level, (logits, iou) in enumerate(zip(masks.level_logits, masks.iou_logits, strict=True)):
        ours |= {f"out.level_logits.{level}": logits, f"out.iou.{level}": iou}
    return {key: (_array(value), golden[key]) for key, value in ours.items()}


def compare_losses(path: Path) -> Pairs:
    """BCE, dice and the extra term of overlap (which α = 2 adds to α = 1), with gradients."""
    golden, pairs = dict(np.load(path)), {}
    for case in sorted({key.split(".")[0] for key in golden}, key=int):
        targets = torch.from_numpy(golden[f"{case}.targets"]).float()
        counts = torch.from_numpy(golden[f"{case}.targets_per_question"])
        questions = torch.arange(len(counts)).repeat_interleave(counts)
        valid = torch.ones_like(targets, dtype=torch.bool)

        def refined(logits: Tensor, alpha: float, rest: tuple[Tensor, ...] = (targets, questions, valid)) -> Tensor:
            return mean_over_targets(refinement_losses(logits, rest[0], rest[1], alpha, rest[2]))

        def dice(logits: Tensor, rest: tuple[Tensor, ...] = (targets, valid)) -> Tensor:
            return mean_over_targets(dice_losses(logits, *rest))

        terms: dict[str, Callable[[Tensor], Tensor]] = {
            "bce": lambda logits, loss=refined: loss(logits, 1.0),
            "dice": dice,
            "overlap_extra": lambda logits, loss=refined: loss(logits, 2.0) - loss(logits, 1.0),
        }
        for name, term in terms.items():
            logits = torch.from_numpy(golden[f"{case}.logits"]).requires_grad_()
            value = term(logits)
            value.backward()
            pairs[f"{case}.{name}"] = (_array(value), golden[f"{case}.{name}"])
            pairs[f"{case}.{name}.grad"] = (_array(logits.grad), golden[f"{case}.{name}.grad"])
    return pairs


def compare_image(path: Path) -> Pairs:
    """Position tables both ways, preprocessing, and masks at the picture's own size."""
    golden = dict(np.load(path))
    table = torch.from_numpy(golden["position.in"])
    pairs: Pairs = {}
    for mode in ("released", "correct"):
        wanted = golden[f"position.{mode}"]
        pairs[f"position.{mode}"] = (resize_positions(table, round((len(wanted) - 1) ** 0.5), mode).numpy(), wanted)
    processor = PixelLMProcessor.for_preset("small")
    for case in sorted({key.split(".")[1] for key in golden if key.startswith("pre.")}, key=int):
        prepared = processor.prepare_image(Image.fromarray(golden[f"pre.{case}.image"]))
        valid_hw = np.asarray(prepared.valid_hw)
        pixels = processor.normalise(prepared.pixels[None], valid_hw[None])[0]
        pairs[f"pre.{case}.resized (exact)"] = (valid_hw, golden[f"pre.{case}.resized"])
        pairs[f"pre.{case}.rows"] = (pixels[:, ::37, ::41].numpy(), golden[f"pre.{case}.rows"])
        mean_std = np.array([pixels.mean(), pixels.std()])
        pairs[f"pre.{case}.mean_std"] = (mean_std, golden[f"pre.{case}.mean_std"])
        low = torch.from_numpy(golden[f"post.{case}.low"]).float()
        size = golden[f"pre.{case}.image"].shape[:2]
        logits = logits_at_original_size(low, processor.image_size, prepared.valid_hw, (int(size[0]), int(size[1])))
        pairs[f"post.{case}.rows"] = (logits[:, ::13, ::7].numpy(), golden[f"post.{case}.rows"])
        areas = (logits > 0).sum((1, 2)).numpy()
        pairs[f"post.{case}.binary_area (exact)"] = (areas, golden[f"post.{case}.binary_area"])
    return pairs


def max_relative_error(pairs: Pairs) -> float:
    """The largest |ours − golden| / max |golden|; 1.0 for another shape or `(exact)` array, and for NaN."""
    return max((_relative_error(name, *pair) for name, pair in pairs.items()), default=0.0)


def compare_dir(folder: Path) -> dict[str, Pairs]:
    """Compares every golden file of a folder.

    Raises:
        SystemExit: no folder, a file of no known form, or an `e2e_*` file whose companions are missing.
    """
    if not folder.is_dir():
        raise SystemExit(f"no folder {folder}; give --dir the folder of the golden files, e.g. tests/golden")
    results: dict[str, Pairs] = {}
    e2e_files: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name == "README.md":
            continue
        if path.name.startswith("e2e_"):
            e2e_files.append(path)
        elif path.suffix == ".npz" and (form := path.stem.split("_")[0]) in _FORMS:
            results[path.name] = _FORMS[form](path)
        else:
            raise SystemExit(f"{path} is of no known form; known: {', '.join(_FORMS)} (.npz), e2e_*, README.md")
    for name, members in e2e_members(e2e_files).items():
        io_pairs, gradient_pairs = compare_e2e(members)
        results[f"e2e_{name}_io.npz"] = io_pairs
        results[f"e2e_{name}_config.json"] = gradient_pairs
    return results


_FORMS: dict[str, Callable[[Path], Pairs]] = {
    "fusion": compare_fusion,
    "decoder": compare_decoder,
    "losses": compare_losses,
    "image": compare_image,
}


def main() -> None:
    """Compares a folder and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("tests/golden"))
    parser.add_argument("--quick", action="store_true", help="the same: everything is compared in a minute")
    parser.add_argument("--preset", help="accepted and unused: sizes come from the files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    errors: dict[str, float] = {}
    for name, pairs in compare_dir(arguments.dir).items():
        errors[name] = max_relative_error(pairs)
        worst = max(pairs, key=lambda key: _relative_error(key, *pairs[key]))
        print(f"{name}: {len(pairs)} arrays, largest relative error {errors[name]:.2e} ({worst})")
    report(describe("golden", device="cpu", max_relative_error=errors, files=len(errors)), digits=None)


def _relative_error(name: str, ours: np.ndarray, golden: np.ndarray) -> float:
    if ours.shape != golden.shape:
        return 1.0
    if name.endswith("(exact)"):
        return 0.0 if np.array_equal(ours, golden) else 1.0
    if not np.isfinite(ours).all():
        return 1.0
    difference = float(np.abs(ours.astype(np.float64) - golden).max(initial=0.0))
    largest = float(np.abs(golden.astype(np.float64)).max(initial=0.0))
    return difference / largest if largest else difference


def _array(value: Tensor | None) -> np.ndarray:
    if value is None:
        raise SystemExit("an array that should have a gradient has none")
    return value.detach().numpy()


if __name__ == "__main__":
    sys.exit(main())
