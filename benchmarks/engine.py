"""The engine against what it replaces, and what its own costs grow with.

    python -m benchmarks.engine [--preset small] [--quick]

Seven measurements, each with both sides in this run: (a) the released algorithm, (b) transformers' `generate` and a
second pass, (c) static batches, (d) growth of the cost per token, (e) a group in one forward against token by token,
(f) masks of 1, 8 and 64 targets with their peak memory, (g) bf16 and int8 against fp32. The last line is one JSON
object; a ratio above 1 means that the engine, or the smaller number, is better.
"""

import argparse
import copy
import functools
import math
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.engine_baselines import (
    BareRunner,
    Case,
    answer_as_released,
    answer_with_generate,
    run_static_batches,
    seconds_per_group,
    write_answers,
)
from benchmarks.harness import alternate, describe, report, seconds_of
from pixellm.model.config import PixelLMConfig
from pixellm.model.engine import EngineOptions, GenerationOptions, PixelLMEngine, SchedulerLimits
from pixellm.model.engine.mask_worker import MaskJob, decode_in_batches
from pixellm.model.engine.options import quantize_language_model_int8
from pixellm.model.images import PreparedImage
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.processing import PixelLMProcessor

QUESTION = "Segment the cat, the dog and the laptop."
ANSWER = "Sure, the cat {seg} sits next to the dog {seg} and in front of the laptop {seg}."
QUICK_ANSWER = "cat {seg}, dog {seg}, laptop {seg}"
GROWTH_TOKENS = (16, 32, 64, 128, 256, 512)
MASK_COUNTS = (1, 8, 64)


def build_case(preset: str) -> Case:
    """An untrained network of a preset with one square picture of noise."""
    torch.manual_seed(0)
    model = PixelLMForConditionalGeneration(PixelLMConfig.from_preset(preset)).eval()
    side = model.config.image_size
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Case(model, PixelLMProcessor.for_preset(preset), PreparedImage(pixels, (side, side), (480, 480)))


def compare_answers(case: Case, answer: str, repeats: int) -> dict[str, float]:
    """(a) and (b): seconds per request at batch 1 for an answer of three targets; all ids and masks must be equal.

    The engine remembers no picture here, so that each of its requests looks at the picture.
    """
    write_answers(case, [(QUESTION, answer)])
    prompt, limit = case.processor.encode_prompt(QUESTION), 80
    options = EngineOptions(picture_cache_bytes=0)
    with PixelLMEngine(case.model, case.processor, max_batch_size=1, options=options) as engine:

        def ask() -> tuple[list[int], list[Any]]:
            result = engine.submit_prepared(case.picture, prompt, GenerationOptions(max_new_tokens=limit)).result()
            return list(result.token_ids), list(result.targets)

        ours = ask()
        if len(ours[1]) != 3:
            raise SystemExit(f"the engine's answer has {len(ours[1])} targets: {ours[0]}")
        sides: dict[str, Callable[[], tuple[list[int], list[Any]]]] = {
            "engine": ask,
            "generate": lambda: answer_with_generate(case, QUESTION, limit),
            "generate, forward": lambda: answer_with_generate(case, QUESTION, limit, second_vision_pass=True),
            "released": lambda: answer_as_released(case, QUESTION, limit),
        }
        answer_with_generate(case, QUESTION, limit)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, run in sides.items():
                started = time.perf_counter()
                theirs = run()
                seconds[name].append(time.perf_counter() - started)
                check_same(name, ours, theirs)
        before = engine.stats().counters
        ask()
        after = engine.stats().counters
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    shown = ", ".join(f"{name} {value:.2f} s" for name, value in medians.items())
    print(f"(a, b) one request of {len(ours[0])} tokens and 3 targets: {shown} (same ids and masks)")
    return {
        "speedup_vs_released": medians["released"] / medians["engine"],
        "speedup_vs_generate": medians["generate"] / medians["engine"],
        "speedup_vs_generate_and_forward": medians["generate, forward"] / medians["engine"],
        "forwards_per_target": (after.group_forwards - before.group_forwards) / (after.targets - before.targets),
        "seconds_per_request": medians["engine"],
    }


def check_same(name: str, ours: tuple[list[int], list[Any]], theirs: tuple[list[int], list[Any]]) -> None:
    """Ends the benchmark where another side gives other ids or masks."""
    same = ours[0] == theirs[0] and len(ours[1]) == len(theirs[1])
    if not same or not all(np.array_equal(a.mask, b.mask) for a, b in zip(ours[1], theirs[1], strict=True)):
        raise SystemExit(f"{name} and the engine answer differently: {theirs[0]} and {ours[0]}")


def compare_batching(case: Case, num_requests: int, longest: int, repeats: int) -> dict[str, float]:
    """(c): requests of mixed lengths, continuous against static batches of eight, on a picture seen before."""
    write_endless_answers(case)
    rng = random.Random(0)
    lengths = [round(math.exp(rng.uniform(math.log(4), math.log(longest)))) for _ in range(num_requests)]
    work = [(f"Segment the cat number {i}.", length) for i, length in enumerate(lengths)]
    prompts = [case.processor.encode_prompt(question) for question, _ in work]
    bare = BareRunner(case, 8)
    limits = SchedulerLimits(max_batch_size=8, max_admissions=8)
    with PixelLMEngine(case.model, case.processor, options=EngineOptions(limits=limits)) as engine:

        def continuous() -> float:
            started = time.perf_counter()
            handles = [
                engine.submit_prepared(case.picture, prompt, GenerationOptions(max_new_tokens=length))
                for prompt, length in zip(prompts, lengths, strict=True)
            ]
            if [len(handle.result().token_ids) for handle in handles] != lengths:
                raise SystemExit("an answer of the mixed lengths ended early")
            return time.perf_counter() - started

        seconds = alternate({"continuous": continuous, "static": lambda: run_static_batches(bare, work, 8)}, repeats)
    ours, static = statistics.median(seconds["continuous"]), statistics.median(seconds["static"])
    print(
        f"(c) {num_requests} requests of {min(lengths)} to {max(lengths)} tokens ({sum(lengths)} in all), 8 at a time: "
        f"continuous {ours:.2f} s, static {static:.2f} s"
    )
    return {"continuous_vs_static": static / ours, "tokens_per_s": sum(lengths) / ours}


def measure_growth(case: Case, repeats: int) -> dict[str, float]:
    """(d): exponent of decoding seconds over tokens generated; 1 means that the cost per token is flat."""
    write_endless_answers(case)
    prompt = case.processor.encode_prompt(QUESTION)
    with PixelLMEngine(case.model, case.processor, max_batch_size=1) as engine:
        engine.submit_prepared(case.picture, prompt, GenerationOptions(max_new_tokens=16)).result()
        rounds = [seconds_until_tokens(engine, case, prompt) for _ in range(repeats)]
    seconds = [statistics.median(values) for values in zip(*rounds, strict=True)]
    exponent = np.polyfit(np.log(GROWTH_TOKENS), np.log(seconds), 1)[0]
    shown = zip(GROWTH_TOKENS, seconds, strict=True)
    per_token = ", ".join(f"{count}: {1000 * value / count:.1f}" for count, value in shown)
    print(f"(d) milliseconds per token by tokens generated: {per_token}; exponent {exponent:.3f}")
    return {"growth_exponent": float(exponent)}


def seconds_until_tokens(engine: PixelLMEngine, case: Case, prompt: Sequence[int]) -> list[float]:
    """Seconds from an answer's first token until it has each of `GROWTH_TOKENS` more, of one running answer."""
    start = engine.stats().counters.tokens
    handle = engine.submit_prepared(case.picture, prompt, GenerationOptions(max_new_tokens=max(GROWTH_TOKENS) + 1))
    moments: dict[int, float] = {}
    while not handle.is_done or max(GROWTH_TOKENS) not in moments:
        count = engine.stats().counters.tokens - start - 1
        for place in (0, *GROWTH_TOKENS):
            if place <= count:
                moments.setdefault(place, time.perf_counter())
        time.sleep(0.0005)
    return [moments[count] - moments[0] for count in GROWTH_TOKENS]


def compare_groups(case: Case, repeats: int) -> dict[str, float]:
    """(e): a group's positions in one forward against one forward each."""
    together, single = seconds_per_group(BareRunner(case, 1), QUESTION, repeats)
    print(f"(e) a group in one forward {1000 * together:.1f} ms, token by token {1000 * single:.1f} ms")
    return {"group_speedup": single / together}


@torch.inference_mode()
def measure_masks(case: Case, repeats: int) -> dict[str, Any]:
    """(f): one call for 1, 8 and 64 targets: seconds and growth of resident memory."""
    model = case.model
    features = model.encode_images(*case.pixel_values())
    width, group = model.config.text_config.hidden_size, model.config.group_size
    generator = torch.Generator().manual_seed(0)

    def jobs(count: int) -> list[MaskJob]:
        hidden = torch.randn(count, group, width, generator=generator)
        options = GenerationOptions()
        return [MaskJob(h, features, case.picture, options, i, "", lambda *_: None) for i, h in enumerate(hidden)]

    limit = EngineOptions().max_batch_targets
    prepared = {count: jobs(count) for count in MASK_COUNTS}
    sides = {
        str(count): (lambda work=work: seconds_of(lambda: decode_in_batches(model, work, limit)))
        for count, work in prepared.items()
    }
    seconds = {name: statistics.median(values) for name, values in alternate(sides, repeats).items()}
    peaks = {
        count: peak_growth(lambda work=work: decode_in_batches(model, work, limit)) for count, work in prepared.items()
    }
    shown = ", ".join(f"{n}: {1000 * seconds[str(n)]:.0f} ms, peak {peaks[n] / 2**20:.0f} MiB" for n in MASK_COUNTS)
    print(f"(f) masks at 480×480, at most {limit} targets decoded together: {shown}")
    return {
        "decode_64_over_1": seconds["64"] / seconds["1"],
        "mask_peak_mib": {str(count): round(peak / 2**20, 1) for count, peak in peaks.items()},
    }


def compare_numbers(case: Case, repeats: int) -> dict[str, Any]:
    """(g): one token for one and for eight rows in bf16 and in int8, against fp32."""
    models = {"fp32": case.model, "bf16": copy.deepcopy(case.model).bfloat16(), "int8-cpu": copy.deepcopy(case.model)}
    quantize_language_model_int8(models["int8-cpu"])
    speedups: dict[str, dict[str, float]] = {"bf16": {}, "int8-cpu": {}}
    for batch_size in (1, 8):
        sides = {}
        for name, model in models.items():
            bare = BareRunner(replace(case, model=model), batch_size)
            rows = bare.start([f"Segment the cat number {i}." for i in range(batch_size)])
            sides[name] = functools.partial(seconds_of, functools.partial(bare.run_tokens, rows, 8))
        medians = {name: statistics.median(values) for name, values in alternate(sides, repeats).items()}
        for name in speedups:
            speedups[name][str(batch_size)] = round(medians["fp32"] / medians[name], 3)
    print(f"(g) speed of generation over fp32 by batch size: {speedups}")
    return {"speedup_over_fp32": speedups}


def peak_growth(run: Callable[[], Any]) -> int:
    """Bytes by which resident memory rises at most while `run` runs, sampled every millisecond."""
    page, done = os.sysconf("SC_PAGE_SIZE"), threading.Event()

    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * page

    start = peak = resident()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return peak - start


@torch.inference_mode()
def write_endless_answers(case: Case) -> None:
    """A random head that never ends an answer and never points: only the number of tokens matters here."""
    weight = case.model.lm_head.weight
    weight.normal_(generator=torch.Generator().manual_seed(1))
    weight[[case.processor.tokenizer.eos_token_id, *case.processor.token_ids.codebook]] = 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", help="sizes of the network (default: small)")
    parser.add_argument(
        "--quick", action="store_true", help="shorter answers and fewer requests; below 5 minutes on 2 cores"
    )
    options = parser.parse_args(arguments)
    repeats = 5
    started = time.perf_counter()
    case = build_case(options.preset)
    print(f"preset {options.preset}: {sum(p.numel() for p in case.model.parameters()) / 1e6:.1f} M weights, fp32, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    result = describe("engine", preset=options.preset, quick=options.quick)
    result |= compare_answers(case, QUICK_ANSWER if options.quick else ANSWER, repeats)
    result |= compare_batching(case, *((24, 128) if options.quick else (48, 128)), repeats)
    result |= measure_growth(case, 2 if options.quick else repeats)
    result |= compare_groups(case, 9)
    result |= measure_masks(case, repeats)
    result |= compare_numbers(case, repeats)
    result["seconds"] = round(time.perf_counter() - started, 1)
    report(result)


if __name__ == "__main__":
    main()
