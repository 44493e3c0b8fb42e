"""What the whole suite shares: one local Ray cluster, single-threaded torch, and no reach outside the machine."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves its workers beside the suite's other process
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("MLFLOW_TRACKING_URI", None)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden numbers (its README says what each file fixes)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def demo_data() -> Path:
    """The demo photographs with their genuine COCO masks, captions and MUSE questions."""
    return REPOSITORY / "platform" / "data" / "demo"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The suite's one local Ray cluster (4 logical CPUs); yields its address."""
    import ray

    context = ray.init(
        address="local",  # never one that runs on this machine already
        num_cpus=4,
        include_dashboard=True,
        dashboard_port=0,
        log_to_driver=False,
        configure_logging=False,
    )
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """A real browser for the pages; without one their tests fail and say what to install."""
    expect.set_options(timeout=60_000)  # five seconds are few on a busy machine
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        path = shutil.which(name)
        if path:
            return path
    pytest.fail("no Chromium on this machine: install Debian's package `chromium` (apt-get install -y chromium)")
