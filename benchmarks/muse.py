"""The MUSE pipeline against a local endpoint: is its data valid, does it survive, what does it cost, how fast is it.

    python -m benchmarks.muse [--quick] [--data DIR]

Four measurements on genuine photographs (the demo's, or a COCO folder given with --data): (a) an endpoint on a bad day,
checked by `muse_checker`; (b) kill -9 at three random moments, against an undisturbed run; (c) a budget, against the
endpoint's own books; (d) 64 requests at a time against a fixed latency of 200 ms, in an async actor of the Ray Data
pipeline (the default; median of three turns) and in one process, with the memory. The endpoint is a process of its own.
The last line is one JSON object.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.harness import describe, report
from benchmarks.muse_checker import adds_up, fingerprint, invalid_pairs
from pixellm.jobs.muse.asker import AskPlan
from pixellm.jobs.muse.asking import AskOptions
from pixellm.jobs.muse.run import generate
from pixellm.jobs.prepare import DEMO_DATA, prepare
from pixellm.platform.cluster import connect, disconnect
from pixellm.platform.data.schema import Row
from pixellm.platform.data.shards import open_shards, write_shards
from pixellm.platform.llm_service import ServiceSettings

BAD_DAY = {
    "busy": 0.06, "error": 0.06, "timeout": 0.02, "cut": 0.05, "garbage": 0.03,
    "json": 0.07, "markers": 0.08, "unknown": 0.08, "single": 0.07, "duplicate": 0.1, "leak": 0.07, "unmarked": 0.08,
    "refuse": 0.05, "unsafe": 0.05, "fewer": 0.05,
}  # fmt: skip
LATENCY_S, CONCURRENCY = 0.2, 64
REPEATS = 3


class ServerProcess:
    """`muse_server` in a process of its own; a context manager."""

    def __init__(self, **options: Any) -> None:
        command = [sys.executable, "-m", "benchmarks.muse_server", json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def books(self) -> dict[str, Any]:
        """See `MuseServer.books`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        books: dict[str, Any] = json.loads(self._process.stdout.readline())
        return books

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def plan_for(server: ServerProcess, shards: Path, concurrency: int) -> AskPlan:
    service = ServiceSettings(server.url, timeout_s=5.0, back_off_s=0.05)
    return AskPlan(open_shards(shards), AskOptions("scripted"), service, concurrency=concurrency)


def measure_bad_day(folder: Path, shards: Path, annotations: Path) -> dict[str, Any]:
    """(a): pairs that the checker finds fault with, and whether the counts add up."""
    with ServerProcess(faults=BAD_DAY, stubborn=0.3, hang_s=10.0) as server:
        plan = plan_for(server, shards, 16)
        plan = replace(plan, service=replace(plan.service, timeout_s=1.0))
        report = generate(plan, str(folder / "bad_day"), actors=0).to_json_dict()
        happened = server.books()["happened"]
    problems = invalid_pairs(folder / "bad_day", annotations)
    for problem in problems[:5]:
        print(f"    {problem}")
    pairs, pictures = report["pairs"], report["pictures"]["asked"]
    print(f"(a) a bad day: {pictures} pictures, {pairs['asked']} pairs asked, {pairs['kept']} kept, "
          f"{pairs['repaired']} corrected, {len(problems)} invalid; dropped {report['dropped']}; "
          f"it happened: {happened}")  # fmt: skip
    return {"invalid_pairs": len(problems), "counts_add_up": adds_up(report), "pairs_kept": pairs["kept"]}


def measure_kills(folder: Path, shards: Path, actors: int) -> dict[str, Any]:
    """(b): the dataset after kill -9 at three random moments against the undisturbed one, requests repeated, cost."""
    concurrency, out = 8, folder / "killed"
    with ServerProcess() as server:
        plan = plan_for(server, shards, concurrency)
        calm = generate(plan, str(folder / "calm"), actors=0)
        answers = server.books()["answers"]
    command = [sys.executable, "-m", "pixellm.cli", "muse", "generate", "--images", str(shards), "--out", str(out),
               "--model", "scripted", "--concurrency", str(concurrency), "--actors", str(actors), "--json"]  # fmt: skip
    moments = sorted(random.Random().sample(range(1, answers), 3))
    with ServerProcess(latency_s=0.1) as server:
        command += ["--base-url", server.url]
        for moment in moments:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while server.books()["answers"] < moment and process.poll() is None:
                time.sleep(0.005)
            process.kill()
            process.wait()
        report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        repeated = server.books()["repeated"]
    is_equal = fingerprint(out) == fingerprint(folder / "calm")
    is_cost_equal = report["cost"]["spent_usd"] == calm.cost["spent_usd"]
    print(f"(b) kill -9 after answers {moments} of {answers}, {actors} actors: dataset "
          f"{'equal' if is_equal else 'DIFFERS'}, cost {'equal' if is_cost_equal else 'DIFFERS'}, {repeated} requests "
          f"repeated ({len(moments)} × {plan.max_under_way} were under way at most)")  # fmt: skip
    is_resumed = is_equal and is_cost_equal and repeated <= len(moments) * concurrency
    return {"resume_equal": is_resumed, "requests_repeated": repeated}


def measure_budget(folder: Path, shards: Path) -> dict[str, Any]:
    """(c): by how much the endpoint's bill passes the budget."""
    budget_usd = 0.10
    with ServerProcess(faults={"timeout": 0.03, "cut": 0.05, "busy": 0.1}, hang_s=10.0) as server:
        plan = plan_for(server, shards, 16)
        plan = replace(plan, service=replace(plan.service, timeout_s=1.0))
        report = generate(plan, str(folder / "budget"), actors=0, budget_usd=budget_usd)
        billed_usd = server.books()["billed_nusd"] / 1e9
    print(f"(c) budget ${budget_usd:.2f}: billed ${billed_usd:.4f} for {report.pairs['kept']} kept pairs; "
          f"{report.pictures['remaining']} pictures remain, about "
          f"${report.cost['remaining_usd_estimate']:.2f}")  # fmt: skip
    return {"overspend_usd": max(0.0, billed_usd - budget_usd), "billed_usd": billed_usd}


def measure_throughput(folder: Path, shards: Path, requests: int, actors: int) -> dict[str, float]:
    """(d): answers a second against CONCURRENCY / LATENCY_S; memory in the last quarter against the second."""
    memory: list[int] = []
    with ServerProcess(latency_s=LATENCY_S) as server:
        plan = plan_for(server, shards, CONCURRENCY)
        out = tempfile.mkdtemp(prefix=f"fast-{actors}-", dir=folder)
        generate(plan, out, actors=actors, progress=lambda _done, _total: memory.append(resident_bytes()))
        books = server.books()
    share = books["answers"] / books["seconds"] / (CONCURRENCY / LATENCY_S)
    quarter = max(1, len(memory) // 4)
    growth = statistics.median(memory[-quarter:]) / statistics.median(memory[quarter : 2 * quarter] or memory)
    where = f"{actors} actor" if actors else "one process"
    print(f"(d) {where}: {books['answers']} of {requests} requests in {books['seconds']:.1f} s, {100 * share:.1f} % "
          f"of the ideal rate, {books['most_open']} open at most; this process's memory × {growth:.2f}")  # fmt: skip
    return {"share": share, "rss_growth": growth}


def many_pictures(shards: Path, count: int) -> Iterator[Row]:
    """Genuine photographs over and over, each time another file: bytes behind a JPEG's end change no pixel."""
    rows = [row for row in open_shards(shards).scan(with_images=True) if len({one.category for one in row.targets}) > 1]
    rows = [row for row in rows if len(row.targets) > 2]
    for number in range(count):
        row = rows[number % len(rows)]
        yield replace(row, image_id=f"p{number}", image=row.image + number.to_bytes(4, "big"))


def resident_bytes() -> int:
    """Memory of this process, from /proc."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests; below 5 minutes on 2 cores")
    parser.add_argument("--preset", help="accepted and unused: no network is run")
    parser.add_argument("--data", type=Path, default=DEMO_DATA, help="a COCO folder: images/ and instances.json")
    options = parser.parse_args(arguments)
    # The endpoint is a process of this machine; Ray's own 15 would leave the actors what it leaves over.
    os.environ.setdefault("RAY_worker_niceness", "0")
    started = time.perf_counter()
    result = describe("muse", quick=options.quick)
    requests = 1600 if options.quick else 4800
    with tempfile.TemporaryDirectory(prefix="pixellm-muse-") as scratch:
        folder = Path(scratch)
        shards = folder / "shards"
        prepare("coco", options.data, shards)
        result |= measure_bad_day(folder, shards, options.data / "instances.json")
        result |= measure_kills(folder, shards, actors=1)
        result |= measure_budget(folder, shards)
        write_shards(many_pictures(shards, requests), folder / "many", name="many")
        here = measure_throughput(folder, folder / "many", requests, actors=0)
        cluster = connect()
        try:
            runs = [measure_throughput(folder, folder / "many", requests, actors=1) for _ in range(REPEATS)]
        finally:
            if cluster.is_ours:
                disconnect()
    result |= {
        "throughput_share": statistics.median(run["share"] for run in runs),
        "throughput_share_one_process": here["share"],
    }
    result |= {"rss_growth": here["rss_growth"], "seconds": round(time.perf_counter() - started, 1)}
    report(result)


if __name__ == "__main__":
    main()
