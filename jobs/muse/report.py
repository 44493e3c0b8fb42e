"""What a run of `muse generate` did, in numbers that add up, beside the paper's."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pixellm.jobs.muse.assemble import PAPER, Assembled
from pixellm.jobs.muse.ledger import NANO, Balance

REPORT_FILE = "report.json"


@dataclass(frozen=True)
class MuseReport:
    """The report, also in `report.json`.

    Attributes:
        uri: where the splits are.
        model: the generator's model.
        generator: "vision" or "text".
        pictures: looked_at, asked (a request was answered or failed for good), remaining (not asked: no money).
        passed_over: pictures not asked about, by reason.
        pairs: asked, kept, repaired.
        dropped: pairs asked for and not kept, by reason. asked = kept + the sum of these.
        examples: details of the first few, by reason.
        splits: pictures, pairs, masks and digest of each.
        targets_per_answer: histogram, number of targets → kept pairs.
        mean_targets: targets per kept answer.
        requests: answered requests by kind, over all runs into this folder.
        cost: spent_usd over all runs; lost_usd_at_most, what attempts without an answer may have cost besides;
            budget_usd; usd_per_kept_pair; remaining_usd_estimate, what the remaining pictures would cost at this pace;
            the prices per million tokens.
        paper: the paper's numbers.
    """

    uri: str
    model: str
    generator: str
    pictures: dict[str, int]
    passed_over: dict[str, int]
    pairs: dict[str, int]
    dropped: dict[str, int]
    examples: dict[str, list[str]]
    splits: dict[str, dict[str, Any]]
    targets_per_answer: dict[int, int]
    mean_targets: float
    requests: dict[str, int]
    cost: dict[str, float | None]
    paper: dict[str, Any] = field(default_factory=lambda: dict(PAPER))

    @property
    def is_complete(self) -> bool:
        """Whether every selected picture was asked about and answered."""
        return not self.pictures["remaining"]

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """The report as lines for a terminal."""
        pictures, pairs = self.pictures, self.pairs
        lines = [
            f"{self.model} ({self.generator}): {pictures['looked_at']} pictures looked at, {pictures['selected']} "
            f"selected, {pictures['asked']} asked about",
            f"pairs     {pairs['asked']} asked = {pairs['kept']} kept + {pairs['asked'] - pairs['kept']} dropped; "
            f"{pairs['repaired']} corrected by the model",
        ]
        lines += [f"dropped   {count}: {reason}" for reason, count in self.dropped.items()]
        lines += [f"passed    {count} pictures: {reason}" for reason, count in self.passed_over.items()]
        for name, split in self.splits.items():
            mean = split["masks"] / split["pairs"]
            lines.append(
                f"{name:<9} {split['pairs']} pairs, {split['pictures']} pictures, {split['masks']} masks, "
                f"{mean:.1f} targets per answer"
            )
        lines.append(
            f"in all    {pairs['kept']} pairs, {self.mean_targets:.1f} targets per answer (the paper: "
            f"{PAPER['pairs']:,} pairs, {PAPER['targets_per_answer']})"
        )
        lines += self._cost_lines()
        return "\n".join([*lines, f"written to {self.uri}"])

    def _cost_lines(self) -> list[str]:
        cost, pairs = self.cost, self.pairs
        requests = ", ".join(f"{count} {kind}" for kind, count in self.requests.items()) or "no requests"
        lines = [f"cost      {_usd(cost['spent_usd'])} for {requests}: it bought {pairs['kept']} pairs"]
        if cost["lost_usd_at_most"]:
            lines.append(f"          at most {_usd(cost['lost_usd_at_most'])} more for attempts that gave no answer")
        if cost["budget_usd"] is not None:
            lines.append(f"budget    {_usd(cost['budget_usd'])}")
        if self.pictures["remaining"]:
            lines.append(
                f"remaining {self.pictures['remaining']} pictures, about {_usd(cost['remaining_usd_estimate'])} more; "
                "the same command with a larger --budget-usd goes on from here"
            )
        return lines


def make_report(
    *,
    uri: str,
    model: str,
    generator: str,
    looked_at: int,
    selected: int,
    passed_over: dict[str, int],
    asked: int,
    assembled: Assembled,
    balance: Balance,
    budget_usd: float | None,
    prices: dict[str, float],
) -> MuseReport:
    """Puts the numbers together.

    Args:
        uri: where the splits are.
        model: the generator's.
        generator: "vision" or "text".
        looked_at: pictures in the shards.
        selected: pictures that were to be asked about.
        passed_over: pictures that were not, by reason.
        asked: pictures with an outcome.
        assembled: what became of the pairs.
        balance: what was paid.
        budget_usd: the limit, None without one.
        prices: by name, USD per million tokens.
    """
    kept = assembled.kept
    spent = balance.spent_nusd / NANO
    remaining = selected - asked
    return MuseReport(
        uri=uri,
        model=model,
        generator=generator,
        pictures={"looked_at": looked_at, "selected": selected, "asked": asked, "remaining": remaining},
        passed_over=passed_over,
        pairs={"asked": assembled.asked, "kept": kept, "repaired": assembled.repaired},
        dropped=assembled.dropped,
        examples=assembled.examples,
        splits={name: asdict(numbers) for name, numbers in assembled.splits.items()},
        targets_per_answer=assembled.targets_per_answer,
        mean_targets=assembled.masks / kept if kept else 0.0,
        requests=balance.requests,
        cost={
            "spent_usd": spent,
            "lost_usd_at_most": balance.lost_nusd / NANO,
            "budget_usd": budget_usd,
            "usd_per_kept_pair": spent / kept if kept else None,
            "remaining_usd_estimate": remaining * spent / asked if asked else None,
            **prices,
        },
    )


def _usd(amount: float | None) -> str:
    return "an unknown sum" if amount is None else f"${amount:.4f}" if amount < 1 else f"${amount:,.2f}"
