"""`pixellm muse generate`: annotated pictures → requests → answers on disk → a dataset in four splits."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from pixellm.errors import ConfigError, DataError
from pixellm.jobs.muse.asker import AskPlan
from pixellm.jobs.muse.asking import AskOptions
from pixellm.jobs.muse.assemble import RELEASED_FOLDER, assemble
from pixellm.jobs.muse.decisions import read_decisions
from pixellm.jobs.muse.filters import FILTERS_VERSION
from pixellm.jobs.muse.ledger import NANO, Ledger
from pixellm.jobs.muse.outcomes import Outcome
from pixellm.jobs.muse.prompts import PROMPT_VERSION
from pixellm.jobs.muse.report import REPORT_FILE, MuseReport, make_report
from pixellm.jobs.muse.selection import Selection, select
from pixellm.jobs.muse.splits import SplitShares
from pixellm.jobs.muse.workers import LedgerPlace, ask_in_actors, ask_in_this_process
from pixellm.platform import storage
from pixellm.platform.data.shards import ShardedDataset

WORK_FOLDER = "work"

#: Called with (pictures gone through, pictures in all).
OnProgress = Callable[[int, int], None]


def generate(
    plan: AskPlan,
    out_uri: str,
    *,
    limit: int | None = None,
    budget_usd: float | None = None,
    seed: int = 0,
    shares: SplitShares | None = None,
    work_dir: Path | None = None,
    actors: int = 1,
    progress: OnProgress | None = None,
) -> MuseReport:
    """Builds a dataset of reasoning questions, or goes on with one: what was answered is never asked again.

    Args:
        plan: the shards, the service, what is asked, how many requests at a time.
        out_uri: gets `train/`, `val/`, `test-few/`, `test-many/` (shards), `released/` (the same as MUSE JSON with
            pictures), `report.json`, and `work/` with everything that was answered.
        limit: pictures at most.
        budget_usd: what all runs into this folder may cost together; None: no limit.
        seed: decides which pictures, where some are left out, and the splits.
        shares: shares of the pictures for val and test; the paper's by default.
        work_dir: a folder on this machine's disk for `work/`; needed where `out_uri` is in an object store.
        actors: async actors of the Ray Data pipeline; 0 asks from this process without Ray.
        progress: called as pictures are done.

    Raises:
        ConfigError: an option cannot be used as given.
        DataError: there are no shards, no picture fits the policy, or not one pair was kept.
        LanguageModelError: the service cannot be used; what was answered is kept.
    """
    folder = _work_folder(out_uri, work_dir)
    source = plan.source
    selection = select(source.scan(), plan.options.policy, seed, limit)
    if not selection.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in selection.passed_over.items())
        raise DataError(f"none of the {selection.looked_at} pictures at {source.uri} can be asked about: {reasons}")
    budget_nusd = None if budget_usd is None else int(budget_usd * NANO)
    stale_s = max(600.0, 4 * plan.service.timeout_s)
    place = LedgerPlace(folder, run_digest(source, plan.options), budget_nusd, stale_s)
    with place.open() as ledger:
        finished = ledger.finished_rows()
    rows = [row for row in selection.rows if row not in finished]
    if rows:
        _ask(plan, place, rows, len(selection.rows), actors, progress)
    with place.open() as ledger:
        report = _assemble(ledger, source, selection, out_uri, plan, budget_usd, seed, shares or SplitShares())
    text = json.dumps(report.to_json_dict(), indent=1, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(out_uri, REPORT_FILE), text.encode())
    if not report.pairs["kept"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items()) or "nothing could be asked"
        raise DataError(f"not one of {report.pairs['asked']} pairs was kept ({reasons}); see {out_uri}/{REPORT_FILE}")
    return report


def run_digest(source: ShardedDataset, options: AskOptions) -> str:
    """Names everything that decides the outcome of a picture: the shards, what is asked, what is kept."""
    parts = [source.digest, asdict(options), PROMPT_VERSION, FILTERS_VERSION]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _work_folder(out_uri: str, work_dir: Path | None) -> Path:
    if work_dir is not None:
        return work_dir
    local = storage.local_path(out_uri)
    if local is None:
        raise ConfigError(f"{out_uri} is not on this machine's disk; give --work a local folder for what is answered")
    return local / WORK_FOLDER


def _ask(
    plan: AskPlan, place: LedgerPlace, rows: list[int], total: int, actors: int, progress: OnProgress | None
) -> None:
    done = total - len(rows)

    def count(pictures: int) -> None:
        nonlocal done
        done += pictures
        if progress is not None:
            progress(done, total)

    if actors:
        ask_in_actors(plan, place, rows, count, actors=actors)
    else:
        ask_in_this_process(plan, place, rows, count)


def _assemble(
    ledger: Ledger,
    source: ShardedDataset,
    selection: Selection,
    out_uri: str,
    plan: AskPlan,
    budget_usd: float | None,
    seed: int,
    shares: SplitShares,
) -> MuseReport:
    """Under the ledger's lock, so that no other run writes the same folder."""
    _sweep(out_uri)
    selected = frozenset(selection.rows)

    def read_outcomes() -> Iterator[tuple[int, Outcome]]:
        for row, text in ledger.outcomes():
            if row in selected:
                yield row, Outcome.from_json(text)

    decisions = read_decisions(out_uri)
    assembled = assemble(source, read_outcomes, out_uri, seed=seed, shares=shares, decisions=decisions)
    return make_report(
        uri=out_uri,
        model=plan.options.model,
        generator=plan.options.generator,
        looked_at=selection.looked_at,
        selected=len(selection.rows),
        passed_over=selection.passed_over,
        asked=sum(1 for _ in read_outcomes()),
        assembled=assembled,
        balance=ledger.balance(),
        budget_usd=budget_usd,
        prices={"usd_per_million_prompt": plan.prices.prompt, "usd_per_million_completion": plan.prices.completion},
    )


def _sweep(out_uri: str) -> None:
    """Removes half-written folders that a killed run has left beside the splits."""
    local = storage.local_path(out_uri)
    if local is None:
        return
    for folder in (local, local / RELEASED_FOLDER):
        for path in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
            shutil.rmtree(path, ignore_errors=True)
