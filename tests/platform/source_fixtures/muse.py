"""muse: the packaged demo photographs with their questions, in the released JSON."""

from tests.platform.source_fixtures import SourceFixture
from tests.platform.source_fixtures.coco import copy_demo

FIXTURES = (SourceFixture("muse", copy_demo, rows=32, targets=91),)
