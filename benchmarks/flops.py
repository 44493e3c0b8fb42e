"""Floating-point operations of PixelLM beside LISA at 7B and 13B (paper Table 1), counted on meta tensors.

    python -m benchmarks.flops [--text-tokens 100]

The last line is one JSON object; `ratio_7b` and `ratio_13b` are PixelLM / LISA (below 1: PixelLM is cheaper).
"""

import argparse

from benchmarks.harness import describe, report
from pixellm.model.flops import DISTANCE, TEXT_TOKENS, compare_flops, convention


def main() -> None:
    """Counts both pairs and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-tokens", type=int, default=TEXT_TOKENS)
    parser.add_argument("--quick", action="store_true", help="the same: nothing is run, only counted")
    parser.add_argument("--preset", help="accepted and unused: both sizes are counted")
    arguments = parser.parse_args()
    result = describe("flops", device="meta")
    tflops: dict[str, dict[str, float]] = {}
    for size in ("7b", "13b"):
        comparison = compare_flops(f"pixellm-{size}", f"lisa-{size}", text_tokens=arguments.text_tokens)
        for counted in (comparison.ours, comparison.theirs):
            tflops[counted.name] = {part: round(value, 4) for part, value in counted.tflops.items()}
            parts = ", ".join(f"{part} {value:.3f}" for part, value in counted.tflops.items())
            print(f"{counted.name}: {counted.total_tflops:.2f} TFLOPs ({parts})")
        print(f"ratio at {size}: {comparison.ratio:.3f} (paper {comparison.paper_ratio:.3f})")
        result[f"ratio_{size}"] = round(comparison.ratio, 4)
    print(DISTANCE)
    result |= {
        "tflops": tflops,
        "convention": convention(arguments.text_tokens),
        "distance": DISTANCE,
    }
    report(result)


if __name__ == "__main__":
    main()
