"""What both serving benchmarks stand on: a model whose answer is known, a photograph, and a local Ray cluster."""

import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from PIL import Image

import pixellm
from benchmarks.engine_baselines import Case, write_answers
from pixellm.model.config import PixelLMConfig
from pixellm.model.engine import PixelLMEngine
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.processing import PixelLMProcessor

QUESTION = "Segment the cat, the bird and the bowl."
ANSWER = "Sure, the cat {seg} sits next to the bird {seg} and in front of the bowl {seg}."
QUICK_ANSWER = "the cat {seg}, the bird {seg}, the bowl {seg}"
MAX_NEW_TOKENS = 80
_PHOTO = Path(pixellm.__file__).parent / "platform" / "data" / "demo" / "images" / "000000196393.jpg"


@dataclass(frozen=True)
class Expected:
    """The direct engine's answer: words, and each mask's run lengths."""

    text: str
    rles: tuple[object, ...]


def photo_bytes() -> bytes:
    """A photograph, cropped square, as JPEG."""
    buffer = io.BytesIO()
    with Image.open(_PHOTO) as photo:
        side = min(photo.size)
        photo.crop((0, 0, side, side)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def save_case(folder: Path, preset: str, answer: str) -> Path:
    """Writes an untrained network that answers `QUESTION` about the photograph as written; returns the folder."""
    torch.manual_seed(0)
    model = PixelLMForConditionalGeneration(PixelLMConfig.from_preset(preset)).eval()
    processor = PixelLMProcessor.for_preset(preset)
    case = Case(model, processor, processor.prepare_image(photo_bytes()))
    write_answers(case, [(QUESTION, answer)])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def expected_answer(engine: PixelLMEngine, image: bytes) -> Expected:
    """What every served answer must be equal to."""
    result = engine.segment(image, QUESTION, max_new_tokens=MAX_NEW_TOKENS)
    if len(result.targets) != 3:
        raise SystemExit(f"the engine's answer has {len(result.targets)} targets: {result.text!r}")
    return Expected(result.text, tuple(target.rle for target in result.targets))


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """A Ray cluster of this process alone, in a folder of its own; its workers as urgent as this process."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    with tempfile.TemporaryDirectory(prefix="ray-", dir=tempfile.gettempdir()) as folder:
        ray.init(num_cpus=num_cpus, _temp_dir=folder, include_dashboard=False, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def plain_server(folder: Path, num_threads: int) -> Iterator[str]:
    """The same model behind FastAPI and a lock, one question at a time (`benchmarks.serve_plain`); yields its URL."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.serve_plain", str(folder), str(port), str(num_threads)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(num_threads)})
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not _answers(url):
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit("the plain server did not start")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def processes_titled(prefix: str) -> list[int]:
    """Ids of processes whose title begins so (Ray names its workers after what they run, and renames them often)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(prefix.encode()):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def resident_mib(pids: list[int]) -> float:
    """Resident memory of processes, MiB."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * page / 2**20
