"""What `champion` asks of a model version: a pure decision on numbers, no registry involved."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixellm.errors import ConfigError

_REQUIREMENT = re.compile(r"\s*([^\s<>=:]+)\s*>=\s*(\S+)\s*")
_NO_REGRESSION = re.compile(r"\s*([^\s<>=:]+)\s*(?::\s*(\S+)\s*)?")


@dataclass(frozen=True)
class Gate:
    """A condition on one metric (higher is better).

    Attributes:
        metric: name of the metric, as the version has it: "giou", or "muse.giou" of a suite that it was evaluated on.
        floor: the least value that passes; None asks for none.
        max_regression: how far below the champion's value is still accepted, in the metric's unit; None compares with
            nothing.
    """

    metric: str = "giou"
    floor: float | None = 0.0
    max_regression: float | None = 0.02


@dataclass(frozen=True)
class GateDecision:
    """Whether a version passed, and one sentence that says why or why not."""

    passed: bool
    reason: str


def suite_metric(suite: str, metric: str) -> str:
    """The name under which a version keeps a metric of a suite: ("mrefcoco+", "ciou") → "mrefcoco-plus.ciou"."""
    return _stored(f"{suite}.{metric}")


def parse_requirement(text: str) -> Gate:
    """ "muse.giou>=0.40" → a gate.

    Raises:
        ConfigError: it is not written so.
    """
    match = _REQUIREMENT.fullmatch(text)
    floor = None if match is None else _number(match[2])
    if match is None or floor is None:
        raise ConfigError(f"the requirement is {text!r}; wanted METRIC>=VALUE, e.g. 'muse.giou>=0.40'")
    return Gate(_stored(match[1]), floor, None)


def parse_no_regression(text: str) -> Gate:
    """ "mrefcoco.ciou:0.5" → a gate that lets the metric fall by 0.5 percentage points, which is 0.005 (default: 0).

    Raises:
        ConfigError: it is not written so.
    """
    match = _NO_REGRESSION.fullmatch(text)
    points = None if match is None else _number(match[2] or "0")
    if match is None or points is None or points < 0:
        raise ConfigError(
            f"the metric that must not regress is {text!r}; wanted METRIC or METRIC:POINTS, e.g. mrefcoco.ciou:0.5 for "
            "half a percentage point"
        )
    return Gate(_stored(match[1]), None, points / 100)


def decide_all(
    gates: Sequence[Gate], candidate: Mapping[str, float], champion: Mapping[str, float] | None
) -> GateDecision:
    """Decides by several conditions, which must all pass; see `decide`. The reason names each that did not."""
    decisions = [decide(gate, candidate, champion) for gate in gates]
    failed = [decision for decision in decisions if not decision.passed]
    return GateDecision(not failed, "; ".join(decision.reason for decision in failed or decisions))


def decide(gate: Gate, candidate: Mapping[str, float], champion: Mapping[str, float] | None) -> GateDecision:
    """Decides whether a candidate may become champion.

    Args:
        gate: the condition.
        candidate: metric name → value of the version that wants to be champion.
        champion: the same of the present champion; None when there is none.

    Returns:
        The decision. A metric that is missing or not a number, on either side, does not pass: what cannot be compared
        is not shown to be no worse.
    """
    value = candidate.get(gate.metric, math.nan)
    if math.isnan(value):
        suite = gate.metric.rpartition(".")[0]
        mend = f"; `pixellm evaluate --suite {suite} --model …` adds it" if suite else ""
        return GateDecision(False, f"the version has no {gate.metric!r}; it has {_named(candidate)}{mend}")
    if gate.floor is not None and value < gate.floor:
        return GateDecision(False, f"{gate.metric} {value:.4g} is below the floor {gate.floor:.4g}")
    reached = f"{gate.metric} {value:.4g}" + ("" if gate.floor is None else f" reaches the floor {gate.floor:.4g}")
    if gate.max_regression is None:
        return GateDecision(True, reached)
    if champion is None:
        return GateDecision(True, f"{reached}; no champion before it")
    best = champion.get(gate.metric, math.nan)
    if math.isnan(best):
        return GateDecision(False, f"the champion has no {gate.metric!r} to compare with; it has {_named(champion)}")
    if value < best - gate.max_regression:
        return GateDecision(
            False,
            f"{gate.metric} {value:.4g} is more than {gate.max_regression:.4g} below the champion's {best:.4g}",
        )
    return GateDecision(True, f"{gate.metric} {value:.4g} against the champion's {best:.4g}")


def _named(metrics: Mapping[str, float]) -> str:
    return ", ".join(sorted(metrics)) or "no metrics"


def _stored(metric: str) -> str:
    return metric.replace("+", "-plus")  # the store's names have no plus


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
