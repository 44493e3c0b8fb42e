"""What every benchmark shares: how sides take turns, and the one JSON object that ends it."""

import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

from pixellm.platform.version import code_version


def describe(name: str, device: str = "", **more: Any) -> dict[str, Any]:
    """The keys that every result starts with: the benchmark's name, where it ran, and the commit ("" outside git)."""
    place = {"device": device or f"cpu ({platform.machine()})", "num_cpus": os.cpu_count()}
    return {"benchmark": name, **more, **place, "commit": code_version().commit or ""}


def report(result: dict[str, Any], digits: int | None = 4) -> None:
    """Prints the result on one line, with numbers rounded to so many digits (None: as they are)."""
    print(json.dumps(result if digits is None else _rounded(result, digits)))


def alternate(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Runs each side once to warm up, then all sides in turn; returns every side's seconds."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            seconds[name].append(run())
    return seconds


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    return round(value, digits) if isinstance(value, float) else value
