"""What `champion` asks of a model version: a pure decision on numbers, no registry involved."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gate:
    """A condition on one metric (higher is better).

    Attributes:
        metric: name of the metric, as registered with the version.
        floor: the least value that passes.
        max_regression: how far below the champion's value is still accepted, in the metric's unit.
    """

    metric: str = "giou"
    floor: float = 0.0
    max_regression: float = 0.02


@dataclass(frozen=True)
class GateDecision:
    """Whether a version passed, and one sentence that says why or why not."""

    passed: bool
    reason: str


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
        return GateDecision(False, f"the version has no {gate.metric!r}; it has {_named(candidate)}")
    if value < gate.floor:
        return GateDecision(False, f"{gate.metric} {value:.4g} is below the floor {gate.floor:.4g}")
    if champion is None:
        return GateDecision(
            True, f"{gate.metric} {value:.4g} reaches the floor {gate.floor:.4g}; no champion before it"
        )
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
