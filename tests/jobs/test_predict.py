"""Predictions about pictures on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pixellm.errors import DataError, ModelLoadError
from pixellm.jobs.predict import predict


@pytest.fixture
def pictures(demo_data: Path, tmp_path: Path) -> list[Path]:
    """Two photographs with the same file name in different folders."""
    originals = sorted((demo_data / "images").iterdir())[:2]
    copies = [tmp_path / name / "photo.jpg" for name in ("a", "b")]
    for original, copy in zip(originals, copies, strict=True):
        copy.parent.mkdir()
        copy.write_bytes(original.read_bytes())
    return copies


def test_each_picture_gets_an_overlay_and_masks_that_pycocotools_reads(
    masks_model_dir: Path, pictures: list[Path], tmp_path: Path
) -> None:
    result = predict(
        pictures, "Segment everything.", masks_model_dir, tmp_path / "out", max_new_tokens=30, batch_size=1
    )
    assert [prediction.image for prediction in result.predictions] == [str(path) for path in pictures]
    assert len({prediction.overlay for prediction in result.predictions}) == 2
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert written["question"] == "Segment everything."
    for prediction, described, path in zip(result.predictions, written["predictions"], pictures, strict=True):
        photo = Image.open(path)
        overlay = Image.open(prediction.overlay)
        assert overlay.width == photo.width
        assert overlay.height > photo.height  # question above, legend below
        for target, stored in zip(prediction.targets, described["targets"], strict=True):
            mask = coco_mask.decode(stored["rle"])
            assert mask.shape == (photo.height, photo.width)
            assert mask.sum() == target.area == stored["area"]
    assert sum(len(prediction.targets) for prediction in result.predictions) > 0
    assert str(pictures[0]) in result.to_text()


def test_a_damaged_picture_is_named_and_the_others_are_answered(
    masks_model_dir: Path, pictures: list[Path], tmp_path: Path
) -> None:
    pictures[0].write_bytes(pictures[0].read_bytes()[:2000])
    with pytest.raises(DataError, match=rf"1 of 2 pictures cannot be used: {pictures[0]}.*others are in"):
        predict(pictures, "Segment the cat.", masks_model_dir, tmp_path / "out", max_new_tokens=8)
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [prediction["image"] for prediction in written["predictions"]] == [str(pictures[1])]


def test_an_absent_picture_or_model_is_refused_before_anything_is_written(
    masks_model_dir: Path, pictures: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="cannot read the picture"):
        predict([tmp_path / "absent.jpg"], "Segment the cat.", masks_model_dir, tmp_path / "out")
    with pytest.raises(ModelLoadError, match="does not exist"):
        predict(pictures, "Segment the cat.", tmp_path / "no-model", tmp_path / "out")
    assert not (tmp_path / "out" / "predictions.json").exists()
    assert np.asarray(Image.open(pictures[0])).size
