"""The mixture that a recipe asks for: its sources opened, its order built, and what share each source really gets."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pixellm.errors import ConfigError
from pixellm.platform.data.compose import ComposeLimits, QuestionSource
from pixellm.platform.data.length_order import LengthGroupedOrder
from pixellm.platform.data.order import MixtureOrder, Order
from pixellm.platform.settings import DataSettings, SourceSettings


def compose_limits(data: DataSettings, source: SourceSettings) -> ComposeLimits:
    """What a dialogue composed from one source may hold."""
    return ComposeLimits(
        max_targets=source.max_targets or data.max_targets,
        max_questions=data.max_questions,
        min_target_share=data.min_target_share,
        negative_share=data.negative_share,
        variation=data.text_variation,
        min_questions=data.min_questions,
    )


def open_sources(data: DataSettings) -> tuple[QuestionSource, ...]:
    """Opens every source of the recipe.

    Raises:
        DataError: a source has no shards, or no row that can give its kind of question.
    """
    return tuple(QuestionSource.open(source.uri, source.group, compose_limits(data, source)) for source in data.sources)


def source_weights(data: DataSettings) -> list[float]:
    """Each source's share of the samples; they add up to 1.

    With `group_weights`, a group's share is divided among its sources in the ratio of their own weights.

    Raises:
        ConfigError: a group that has a source has no weight, or one that has a weight has no source.
    """
    own = [source.weight for source in data.sources]
    if not data.group_weights:
        return [weight / sum(own) for weight in own]
    groups = [source.group for source in data.sources]
    odd = set(groups) ^ set(data.group_weights)
    if odd:
        raise ConfigError(
            f"data.group_weights and the groups of data.sources differ in {', '.join(sorted(odd))}; give each group "
            "with a source a weight, and no other"
        )
    in_group = {group: sum(w for w, g in zip(own, groups, strict=True) if g == group) for group in set(groups)}
    total = sum(data.group_weights.values())
    return [
        data.group_weights[group] / total * weight / in_group[group] for weight, group in zip(own, groups, strict=True)
    ]


def mixture_order(data: DataSettings, sources: Sequence[QuestionSource], seed: int) -> MixtureOrder:
    """The order over opened sources, before texts are grouped by length."""
    return MixtureOrder(
        [len(source) for source in sources],
        source_weights(data),
        seed,
        caps=[source.max_samples for source in data.sources],
        replacement=data.replacement,
    )


def build_order(
    data: DataSettings,
    sources: Sequence[QuestionSource],
    seed: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
) -> Order:
    """The order that training consumes, texts grouped by length where the recipe says so."""
    order = mixture_order(data, sources, seed)
    if not data.length_window:
        return order
    window = data.length_window * global_batch_size
    return LengthGroupedOrder(order, sources, group_size=micro_batch_size, window=window, seed=seed)


def steps_for_epochs(
    data: DataSettings, sources: Sequence[QuestionSource], seed: int, *, global_batch_size: int
) -> int | None:
    """Optimiser steps until `data.epochs` are done, rounded up; None where the recipe counts steps instead."""
    if data.epochs is None:
        return None
    return -(-mixture_order(data, sources, seed).positions_for(data.epochs) // global_batch_size)


@dataclass(frozen=True, slots=True)
class RealisedMix:
    """What a stretch of an order really drew.

    Attributes:
        counts: samples drawn from each source.
        asked: each source's share as asked for, 0..1.
        max_error: the largest difference between a realised and an asked share.
        p_value: of the chi-square test that the counts follow the asked shares; small: they do not.
    """

    counts: tuple[int, ...]
    asked: tuple[float, ...]
    max_error: float
    p_value: float


def realised_mix(order: Order, asked: Sequence[float], start: int, count: int) -> RealisedMix:
    """Draws `count` positions from `start` on and compares each source's share with the asked ones."""
    from scipy.stats import chisquare  # slow, and every driver and worker imports this module

    drawn = Counter(order.sample_at(position).source for position in range(start, start + count))
    counts = [drawn[source] for source in range(len(asked))]
    shares = [share / sum(asked) for share in asked]
    max_error = max(abs(number / count - share) for number, share in zip(counts, shares, strict=True))
    p_value = float(chisquare(counts, [share * count for share in shares]).pvalue) if len(shares) > 1 else 1.0
    return RealisedMix(tuple(counts), tuple(shares), max_error, p_value)
