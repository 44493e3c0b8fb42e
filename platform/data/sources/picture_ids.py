"""One id for one photograph, whichever dataset's file name it comes under."""

import re
from pathlib import PurePosixPath

_COCO_NAME = re.compile(r"(?:COCO_[a-z]+\d*_)?0*(\d+)")


def picture_id(file_name: str) -> str:
    """COCO's number where the file is named after it ("COCO_train2014_000000000042.jpg" → "42"), else the bare name."""
    stem = PurePosixPath(file_name).stem
    match = _COCO_NAME.fullmatch(stem)
    return match.group(1) if match and stem.isascii() else stem
