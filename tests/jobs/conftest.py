"""The demo's shards, and the process group of one that DeepSpeed needs."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pixellm.jobs.prepare import prepare_demo

sys.path.append(str(Path(__file__).parent))  # for `from toy import …`, `from micro_run import …`
sys.path.append(str(Path(__file__).parents[2]))  # for `from benchmarks import …`


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """One gloo group of one for the whole session: DeepSpeed keeps groups that outlive a second initialisation."""
    from pixellm.jobs.train.deepspeed_engine import single_process_group

    with single_process_group():
        yield


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards of the packaged demo data, by group of questions."""
    return prepare_demo(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def masks_model_dir(demo_shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained very small model that starts a group at once: its answers are all masks."""
    from micro_run import micro_settings

    from benchmarks.untrained import start_groups
    from pixellm.jobs.train.build import build_model, build_processor

    folder = tmp_path_factory.mktemp("model")
    settings = micro_settings(demo_shards, folder)
    model, processor = build_model(settings), build_processor(settings)
    start_groups(model, processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
