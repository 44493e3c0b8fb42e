"""The service over HTTP against the engine called directly, and against a plain one-at-a-time server.

    python -m benchmarks.serve [--preset small] [--quick]

Loopback, closed loop, one replica, the same number of threads for the model on every side: (a) what the platform adds
to a request, (b) answers per second with 1, 4 and 16 clients against FastAPI + lock, (c) time to the first token and
the first mask, (d) three times the capacity offered: what is answered, how soon the rest is refused, whether memory
stays flat. Every answer must equal the engine's. The last line is one JSON object; a ratio above 1 means that ours is
better, but for `overhead_ratio`, which is ours over the engine's.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.harness import describe, report
from benchmarks.serve_case import (
    ANSWER,
    MAX_NEW_TOKENS,
    QUESTION,
    QUICK_ANSWER,
    Expected,
    expected_answer,
    free_port,
    local_ray,
    photo_bytes,
    plain_server,
    processes_titled,
    resident_mib,
    save_case,
)
from pixellm.model.engine import PixelLMEngine
from pixellm.platform.settings import ServeSettings
from pixellm.serve.app import deploy
from pixellm.serve.client import PixelLMClient, RemoteTarget, RemoteText

APP = "benchmark"
CLIENTS = (1, 4, 16)
NUM_THREADS = 1
SETTINGS = ServeSettings(
    max_replicas=1,
    threads_per_replica=NUM_THREADS,
    max_batch_size=16,
    max_ongoing_requests=16,
    max_queued_requests=16,  # a burst counts as queued until each of it has a replica
    target_ongoing_requests=16,
)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Asker:
    """Sends the question over one connection and checks the answer."""

    def __init__(self, url: str, image: bytes, expected: Expected) -> None:
        self._http = httpx.Client(base_url=url, timeout=120, trust_env=False)
        self._image, self._expected = image, expected

    def ask(self) -> httpx.Response:
        """One request; any status."""
        fields = {"prompt": QUESTION, "max_tokens": str(MAX_NEW_TOKENS)}
        return self._http.post("/v1/segment", data=fields, files={"image": ("p.jpg", self._image)})

    def answered(self) -> None:
        """One request that must be answered, and equal to the engine's."""
        response = self.ask()
        response.raise_for_status()
        body = response.json()
        if (body["text"], tuple(target["mask"] for target in body["targets"])) != (
            self._expected.text,
            self._expected.rles,
        ):
            raise SystemExit(f"an answer over HTTP differs from the engine's: {body['text']!r}")


def measure_overhead(engine: PixelLMEngine, asker: Asker, image: bytes, repeats: int) -> dict[str, float]:
    """(a): p50 through HTTP and of the engine called directly, in turn."""
    direct, over_http = [], []
    for number in range(repeats + 2):
        started = time.perf_counter()
        engine.segment(image, QUESTION, max_new_tokens=MAX_NEW_TOKENS)
        between = time.perf_counter()
        asker.answered()
        if number >= 2:
            direct.append(between - started)
            over_http.append(time.perf_counter() - between)
    ours, theirs = statistics.median(over_http), statistics.median(direct)
    print(f"(a) one request: over HTTP {1000 * ours:.1f} ms, engine {1000 * theirs:.1f} ms (p50 of {repeats})")
    return {"overhead_ms": 1000 * (ours - theirs), "overhead_ratio": ours / theirs, "direct_p50_ms": 1000 * theirs}


def answers_per_s(make: Callable[[], Asker], num_clients: int, each: int) -> float:
    """Closed loop: clients that ask again as soon as they are answered."""
    askers = [make() for _ in range(num_clients)]

    def run(asker: Asker) -> None:
        for _ in range(each):
            asker.answered()

    started = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(run, askers))
    return num_clients * each / (time.perf_counter() - started)


def compare_throughput(
    ours: Callable[[], Asker], plain: Callable[[], Asker], each: int, repeats: int
) -> dict[str, Any]:
    """(b): answers per second by number of clients, both servers in turn."""
    rates: dict[str, dict[int, list[float]]] = {"ours": {}, "plain": {}}
    for num_clients in CLIENTS:
        for _ in range(repeats):
            for name, make in (("ours", ours), ("plain", plain)):
                rate = answers_per_s(make, num_clients, max(1, each // num_clients))
                rates[name].setdefault(num_clients, []).append(rate)
    medians = {name: {n: statistics.median(v) for n, v in by.items()} for name, by in rates.items()}
    for n in CLIENTS:
        print(f"(b) {n:>2} clients: {medians['ours'][n]:.2f} answers/s, plain {medians['plain'][n]:.2f}")
    by_clients = {str(n): round(medians["ours"][n] / medians["plain"][n], 3) for n in CLIENTS}
    return {
        "throughput_vs_plain": medians["ours"][CLIENTS[-1]] / medians["plain"][CLIENTS[-1]],
        "throughput_vs_plain_by_clients": by_clients,
        "answers_per_s": medians["ours"][CLIENTS[-1]],
    }


def measure_streams(url: str, image: bytes, repeats: int) -> dict[str, float]:
    """(c): milliseconds from the request to the first words and to the first mask."""
    tokens, masks = [], []
    with PixelLMClient(url) as client:
        for _ in range(repeats):
            started = time.perf_counter()
            seen: dict[type, float] = {}
            for event in client.chat_stream(image, QUESTION, max_tokens=MAX_NEW_TOKENS):
                seen.setdefault(type(event), 1000 * (time.perf_counter() - started))
            tokens.append(seen[RemoteText])
            masks.append(seen[RemoteTarget])
    found = {"ttft_p50_ms": statistics.median(tokens), "ttft_p95_ms": percentile(tokens, 0.95)}
    found |= {"first_mask_p50_ms": statistics.median(masks), "first_mask_p95_ms": percentile(masks, 0.95)}
    print("(c) " + ", ".join(f"{name} {value:.1f}" for name, value in found.items()))
    return found


def measure_overload(make: Callable[[], Asker], capacity: float, seconds: float) -> dict[str, Any]:
    """(d): arrivals at three times the capacity, whatever happens to them, for some seconds."""
    wanted = max(60, int(3 * capacity * seconds))
    outcomes: list[tuple[float, int, float]] = []
    lock = threading.Lock()
    askers = threading.local()
    pids = processes_titled(f"ray::ServeReplica:{APP}")
    before = resident_mib(pids)
    started = time.perf_counter()

    def arrive(number: int) -> None:
        due = started + number / (3 * capacity)
        time.sleep(max(0.0, due - time.perf_counter()))
        if not hasattr(askers, "mine"):
            askers.mine = make()
        sent = time.perf_counter()
        status = askers.mine.ask().status_code
        with lock:
            outcomes.append((time.perf_counter() - started, status, time.perf_counter() - sent))

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(arrive, range(wanted)))
    offered_s = wanted / (3 * capacity)
    answered = [at for at, status, _ in outcomes if status == 200]
    goodput = len(answered) / max(answered, default=offered_s) / capacity  # until the queue is empty again
    refused = [took for _, status, took in outcomes if status in (429, 503)]
    others = sorted({status for _, status, _ in outcomes} - {200, 429, 503})
    growth = resident_mib(pids) - before
    print(
        f"(d) {wanted} requests at {3 * capacity:.1f}/s: {len(answered)} answered ({100 * goodput:.0f} % of capacity), "
        f"{len(refused)} refused in {1000 * percentile(refused or [0], 0.95):.0f} ms (p95), other statuses {others}, "
        f"memory {growth:+.0f} MiB"
    )
    return {
        "overload_goodput": goodput,
        "refusal_p50_ms": 1000 * statistics.median(refused or [0]),
        "refusal_p95_ms": 1000 * percentile(refused or [0], 0.95),
        "overload_others": others,
        "overload_growth_mib": growth,
        "hung": wanted - len(outcomes),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", help="sizes of the network (default: small)")
    parser.add_argument("--quick", action="store_true", help="a shorter answer and fewer requests; below 5 minutes")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    torch.set_num_threads(NUM_THREADS)
    result = describe("serve", preset=options.preset, quick=options.quick)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_case(Path(scratch) / "model", options.preset, QUICK_ANSWER if options.quick else ANSWER)
        image = photo_bytes()
        with (
            PixelLMEngine.from_pretrained(folder, max_batch_size=1) as engine,
            local_ray(4),
            plain_server(folder, NUM_THREADS) as plain_url,
        ):
            expected = expected_answer(engine, image)
            with deploy(SETTINGS, str(folder), port=free_port(), app_name=APP) as service:
                print(f"preset {options.preset}, {NUM_THREADS} thread for the model on every side; {expected.text!r}")

                def ours() -> Asker:
                    return Asker(service.url, image, expected)

                def plain() -> Asker:
                    return Asker(plain_url, image, expected)

                result |= measure_overhead(engine, ours(), image, 25 if options.quick else 41)
                result |= compare_throughput(ours, plain, 32, 3 if options.quick else 5)
                result |= measure_streams(service.url, image, 12 if options.quick else 40)
                result |= measure_overload(ours, result["answers_per_s"], 15 if options.quick else 40)
    result["seconds"] = round(time.perf_counter() - started, 1)
    report(result)


if __name__ == "__main__":
    main()
