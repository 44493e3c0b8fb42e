"""coco: the packaged demo photographs with their genuine masks and captions, in the plain layout."""

import shutil
from pathlib import Path

from tests.platform.source_fixtures import SourceFixture

DEMO = Path(__file__).resolve().parents[3] / "platform" / "data" / "demo"


def copy_demo(folder: Path) -> None:
    shutil.copytree(DEMO, folder, dirs_exist_ok=True)


FIXTURES = (SourceFixture("coco", copy_demo, rows=32, targets=202),)
