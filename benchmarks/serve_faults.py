"""The service under constant load while things break: what fails, what is refused, and whether every answer is right.

    python -m benchmarks.serve_faults [--preset tiny] [--quick]

A real registry, a real service on a local Ray cluster, clients that never stop asking: the champion moves, a bad
version is made champion, an engine replica is killed (kill -9), the ingress is killed, an engine hangs (SIGSTOP), and a
service scales to nothing and back. Every answer must equal the direct engine's. The last line is one JSON object.
"""

import argparse
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.harness import describe, report
from benchmarks.serve_case import (
    MAX_NEW_TOKENS,
    QUESTION,
    QUICK_ANSWER,
    Expected,
    expected_answer,
    free_port,
    local_ray,
    photo_bytes,
    processes_titled,
    save_case,
)
from pixellm.errors import OverloadedError, PixelLMError
from pixellm.jobs.models import register_model
from pixellm.model.engine import PixelLMEngine
from pixellm.platform.registry import resolve, set_alias
from pixellm.platform.settings import ServeSettings, Settings, TrackingSettings
from pixellm.platform.tracking import start_run
from pixellm.serve.app import ServiceHandle, deploy
from pixellm.serve.client import PixelLMClient

APP = "faults"
MODEL = "faults"
CHAMPION = f"models:/{MODEL}@champion"
_PATIENCE_S = 120
SETTINGS = ServeSettings(
    max_replicas=1,
    ingress_replicas=2,
    ingress_cpus=0.1,
    replica_cpus=0.5,
    health_check_period_s=1,
    health_check_timeout_s=4,
    stall_timeout_s=5,
    watch_period_s=1,
    drain_s=3,
    downscale_delay_s=2,
    upscale_delay_s=0,
)


@dataclass
class Tally:
    """What became of the requests."""

    sent: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)


class Load:
    """Clients in a closed loop, each on a connection of its own; a context manager."""

    def __init__(self, url: str, image: bytes, expected: Expected, num_clients: int) -> None:
        self.tally = Tally()
        self._url, self._image, self._expected = url, image, expected
        self._lock, self._is_over = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(_PATIENCE_S)
        hung = sum(thread.is_alive() for thread in self._threads)
        if hung:
            self.tally.failed += hung
            self.tally.failures.append(f"{hung} requests without an end")

    def wait_for_answers(self, count: int) -> None:
        """Returns when so many more answers have come."""
        goal = self.tally.answered + count
        wait_for(lambda: self.tally.answered >= goal, f"{count} more answers")

    def _run(self) -> None:
        with PixelLMClient(self._url, max_retries=8) as client:
            while not self._is_over.is_set():
                with self._lock:
                    self.tally.sent += 1
                try:
                    result = client.segment(self._image, QUESTION, max_tokens=MAX_NEW_TOKENS)
                except OverloadedError:
                    with self._lock:
                        self.tally.refused += 1
                except PixelLMError as error:
                    with self._lock:
                        self.tally.failed += 1
                        self.tally.failures.append(f"{type(error).__name__}: {str(error)[:160]}")
                else:
                    got = Expected(result.text, tuple(target.rle for target in result.targets))
                    with self._lock:
                        self.tally.answered += 1
                        self.tally.wrong += got != self._expected
                        self.tally.versions.append(result.model_version)


def wait_for(condition: Callable[[], Any], what: str, patience_s: float = _PATIENCE_S) -> float:
    """Seconds until a condition holds; ends the benchmark when it does not."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > patience_s:
            raise SystemExit(f"{what} did not come within {patience_s:g} s")
        time.sleep(0.05)
    return time.monotonic() - started


def track(service: ServiceHandle) -> dict[str, Any]:
    """What `/readyz` says about the served alias."""
    try:
        response = httpx.get(f"{service.url}/readyz", timeout=10, trust_env=False)
        state: dict[str, Any] = response.json()["tracks"][0] if response.status_code == 200 else {}
    except httpx.TransportError:
        state = {}
    return state


def engines() -> list[int]:
    """Processes of engine replicas."""
    return processes_titled(f"ray::ServeReplica:{APP}.")


def only_engine() -> int:
    """The one engine's process; waits for it, since Ray rewrites titles while it runs."""
    found: list[int] = []

    def is_one() -> bool:
        found[:] = engines()
        return len(found) == 1

    wait_for(is_one, "one engine")
    return found[0]


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def champion_moved(_service: ServiceHandle, tracking: TrackingSettings, load: Load) -> float:
    """Version 2 becomes champion; seconds until it answers everything."""
    set_alias(MODEL, "champion", 2, tracking)
    seconds = wait_for(lambda: load.tally.versions[-1:] == ["2"], "an answer of version 2")
    wait_for(lambda: len(engines()) == 1, "the end of version 1's engine")
    return seconds


def bad_version(service: ServiceHandle, tracking: TrackingSettings, _load: Load) -> float:
    """A version whose weights are another model's becomes champion; seconds until it is refused. Then 2 again."""
    set_alias(MODEL, "champion", 3, tracking)
    seconds = wait_for(lambda: track(service).get("failed"), "the refusal of version 3")
    if track(service)["serving"] != "2":
        raise SystemExit(f"after a bad version {track(service)} serves")
    set_alias(MODEL, "champion", 2, tracking)
    return seconds


def replica_killed(_service: ServiceHandle, _tracking: TrackingSettings, _load: Load) -> float:
    """kill -9 of the only engine; seconds until there is another."""
    pid = only_engine()
    os.kill(pid, signal.SIGKILL)
    return wait_for(lambda: not is_alive(pid) and engines(), "another engine")


def ingress_killed(_service: ServiceHandle, _tracking: TrackingSettings, _load: Load) -> float:
    """kill -9 of one ingress of two; seconds until there are two again."""
    title = f"ray::ServeReplica:{APP}:ingress"
    wait_for(lambda: len(processes_titled(title)) == SETTINGS.ingress_replicas, "both ingresses")
    pid = processes_titled(title)[0]
    os.kill(pid, signal.SIGKILL)
    return wait_for(lambda: not is_alive(pid) and len(processes_titled(title)) == 2, "another ingress")


def engine_stuck(_service: ServiceHandle, _tracking: TrackingSettings, _load: Load) -> float:
    """The engine's process stands still; seconds until it is found out and replaced."""
    pid = only_engine()
    os.kill(pid, signal.SIGSTOP)
    return wait_for(lambda: not is_alive(pid) and engines(), "the replacement of the stuck engine")


FAULTS = (champion_moved, bad_version, replica_killed, ingress_killed, engine_stuck)


def scale_to_zero(folder: Path, tally: Tally, image: bytes, expected: Expected) -> float:
    """No engine while nobody asks, one when somebody does, none again; seconds of the cold start."""
    settings = SETTINGS.model_copy(update={"min_replicas": 0, "ingress_replicas": 1})
    with deploy(settings, str(folder), port=free_port(), app_name=APP) as service:
        cold: list[float] = []
        for _round in range(2):
            wait_for(lambda: not engines(), "scaling to zero")
            started = time.monotonic()
            with Load(service.url, image, expected, 2) as load:
                load.wait_for_answers(4)
                cold.append(time.monotonic() - started)
            add(tally, load.tally)
        wait_for(lambda: not engines(), "scaling to zero again")
    return statistics.median(cold)


def add(total: Tally, part: Tally) -> None:
    """Counts one load's requests into another's."""
    total.sent += part.sent
    total.answered += part.answered
    total.refused += part.refused
    total.failed += part.failed
    total.wrong += part.wrong
    total.failures += part.failures


@contextmanager
def registered(folder: Path, scratch: Path) -> Iterator[TrackingSettings]:
    """A registry with versions 1 and 2 of the model, and 3 whose weights were damaged after it was registered."""
    tracking = TrackingSettings(root=str(scratch / "registry"))
    with start_run(Settings(tracking=tracking)) as run:
        for _version in range(3):
            register_model(folder, run, {"giou": 0.5}, name=MODEL)
    damage(resolve(f"models:/{MODEL}/3", tracking))
    set_alias(MODEL, "champion", 1, tracking)
    yield tracking


def damage(folder: Path) -> None:
    """Puts noise in the place of the language model's head: the folder loads, and is another model."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.randn_like(weights["lm_head.weight"])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def main(arguments: Sequence[str] | None = None) -> None:
    """Breaks things and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="sizes of the network (default: tiny)")
    parser.add_argument("--quick", action="store_true", help="fewer answers between faults; below 5 minutes")
    names = [fault.__name__ for fault in FAULTS] + ["scale_to_zero"]
    parser.add_argument("--only", choices=names, help="one fault alone")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    torch.set_num_threads(1)
    calm = 5 if options.quick else 20
    result = describe("serve_faults", preset=options.preset, quick=options.quick)
    total, failed, recover_s, in_flight = Tally(), {}, {}, 2
    image = photo_bytes()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = save_case(scratch / "model", options.preset, QUICK_ANSWER)
        with PixelLMEngine.from_pretrained(folder, max_batch_size=1) as engine:
            expected = expected_answer(engine, image)
        with registered(folder, scratch) as tracking, local_ray(6):
            with deploy(SETTINGS, CHAMPION, port=free_port(), app_name=APP, tracking=tracking) as service:
                for fault in FAULTS:
                    if options.only not in (None, fault.__name__):
                        continue
                    with Load(service.url, image, expected, in_flight) as load:
                        load.wait_for_answers(calm)
                        recover_s[fault.__name__] = round(fault(service, tracking, load), 1)
                        load.wait_for_answers(calm)
                    failed[fault.__name__] = load.tally.failed
                    add(total, load.tally)
                    say(fault.__name__, load.tally, recover_s[fault.__name__])
            if options.only in (None, "scale_to_zero"):
                tally = Tally()
                recover_s["scale_to_zero"] = round(scale_to_zero(folder, tally, image, expected), 1)
                failed["scale_to_zero"] = tally.failed
                add(total, tally)
                say("scale_to_zero", tally, recover_s["scale_to_zero"])
    result |= {"failed": failed, "sent": total.sent, "answered": total.answered, "refused": total.refused}
    result |= {"wrong_answers": total.wrong, "in_flight": in_flight, "recover_s": recover_s}
    result["seconds"] = round(time.perf_counter() - started, 1)
    report(result)


def say(name: str, tally: Tally, seconds: float) -> None:
    """One line about one fault."""
    print(
        f"{name}: {tally.sent} sent, {tally.answered} answered, {tally.refused} refused, {tally.failed} failed, "
        f"{tally.wrong} wrong; over after {seconds:.1f} s {tally.failures[:3] or ''}",
        flush=True,
    )


if __name__ == "__main__":
    main()
