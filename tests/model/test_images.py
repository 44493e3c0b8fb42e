"""Any picture file becomes what a person sees, or a clear error; hostile files cost no memory."""

import contextlib
import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixellm.errors import DataError
from pixellm.model.images import (
    logits_at_original_size,
    mask_on_canvas,
    open_rgb,
    prepare_image,
    prepare_training_image,
    resized_hw,
)
from pixellm.model.processing import PixelLMProcessor


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, 255 - rows * 255 // height], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "image.npz"))


@pytest.mark.parametrize("case", range(4))
def test_preprocessing_agrees_with_the_released_numbers(golden: dict[str, np.ndarray], case: int) -> None:
    prepared = prepare_image(Image.fromarray(golden[f"pre.{case}.image"]), 448)
    assert prepared.valid_hw == tuple(golden[f"pre.{case}.resized"])
    processor = PixelLMProcessor.for_preset("small")
    values = processor.normalise(prepared.pixels[None], np.array([prepared.valid_hw]))[0]
    np.testing.assert_allclose(values[:, ::37, ::41].numpy(), golden[f"pre.{case}.rows"], atol=1e-4, rtol=0)
    np.testing.assert_allclose([values.mean(), values.std()], golden[f"pre.{case}.mean_std"], rtol=1e-5)
    assert values[:, prepared.valid_hw[0] :].abs().max().nan_to_num() == 0 if prepared.valid_hw[0] < 448 else True


@pytest.mark.parametrize("case", range(4))
def test_postprocessing_agrees_with_the_released_numbers(golden: dict[str, np.ndarray], case: int) -> None:
    low = torch.from_numpy(golden[f"post.{case}.low"]).float()
    size = golden[f"pre.{case}.image"].shape[:2]
    logits = logits_at_original_size(low, 448, tuple(golden[f"pre.{case}.resized"]), size)
    assert logits.shape == (len(low), *size)
    np.testing.assert_allclose(logits[:, ::13, ::7].numpy(), golden[f"post.{case}.rows"], rtol=1e-4, atol=1e-5)
    assert (logits > 0).sum((1, 2)).tolist() == golden[f"post.{case}.binary_area"].tolist()


def test_transparency_lies_over_white() -> None:
    pixels = np.dstack([gradient(), np.full((40, 60), 255, np.uint8)])
    pixels[:, :30, 3] = 0
    pixels[:, 30:40, 3] = 128
    seen = np.asarray(open_rgb(encoded(Image.fromarray(pixels), "PNG"))).astype(int)
    assert (seen[:, :30] == 255).all()
    half = pixels[:, 30:40, :3].astype(int) * 128 / 255 + 127
    assert np.abs(seen[:, 30:40] - half).max() <= 1
    np.testing.assert_array_equal(seen[:, 40:], pixels[:, 40:, :3])


@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_picture_shows_its_colours(transparent: bool) -> None:
    indexed = Image.new("P", (8, 6), 1)
    indexed.putpalette([255, 0, 0, 10, 200, 30] + [0] * 750)
    indexed.putpixel((0, 0), 0)
    options = {"transparency": 0} if transparent else {}
    seen = open_rgb(encoded(indexed, "PNG", **options))
    assert seen.getpixel((5, 5)) == (10, 200, 30)
    assert seen.getpixel((0, 0)) == ((255, 255, 255) if transparent else (255, 0, 0))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    seen = np.asarray(open_rgb(encoded(Image.fromarray(values), "PNG")))
    np.testing.assert_array_equal(seen[..., 0].ravel(), np.arange(256))
    np.testing.assert_array_equal(seen[..., 0], seen[..., 2])


@pytest.mark.parametrize(
    ("values", "top"),
    [
        (np.array([[0, 40000], [65535, 100]], np.int32), 65535),
        (np.array([[0.0, 0.25], [1.0, np.nan]], np.float32), 1.0),
    ],
)
def test_32_bit_and_float_pictures_are_scaled(values: np.ndarray, top: float) -> None:
    seen = np.asarray(open_rgb(encoded(Image.fromarray(values), "TIFF")))[..., 0]
    np.testing.assert_allclose(seen, np.rint(np.nan_to_num(values) / top * 255), atol=0)


def test_grey_and_one_bit_pictures_become_rgb() -> None:
    grey = Image.fromarray(gradient()[..., 0])
    np.testing.assert_array_equal(np.asarray(open_rgb(encoded(grey, "PNG")))[..., 1], np.asarray(grey))
    assert set(np.unique(np.asarray(open_rgb(encoded(grey.convert("1"), "PNG"))))) == {0, 255}


def test_cmyk_shows_the_colours_it_was_made_from() -> None:
    picture = Image.new("RGB", (32, 32), (200, 40, 90))
    seen = np.asarray(open_rgb(encoded(picture.convert("CMYK"), "JPEG", quality=95))).astype(int)
    assert np.abs(seen - [200, 40, 90]).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_rotated_photo_is_upright_and_sized_as_seen(orientation: int) -> None:
    upright = Image.fromarray(gradient())
    to_stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(to_stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    prepared = prepare_image(encoded(stored, "PNG", exif=exif), 60)
    assert prepared.original_hw == (40, 60)
    np.testing.assert_array_equal(prepared.pixels[:40], np.asarray(upright))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert open_rgb(data).getpixel((3, 3)) == (255, 0, 0)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 400), side=st.sampled_from([28, 84, 224]))
def test_every_shape_fits_the_canvas_and_comes_back_at_its_own_size(height: int, width: int, side: int) -> None:
    prepared = prepare_image(Image.new("RGB", (width, height), (9, 9, 9)), side)
    assert prepared.pixels.shape == (side, side, 3)
    assert max(prepared.valid_hw) == side
    assert min(prepared.valid_hw) >= 1
    assert (prepared.pixels[: prepared.valid_hw[0], : prepared.valid_hw[1]] == 9).all()
    assert prepared.pixels.sum() == 27 * prepared.valid_hw[0] * prepared.valid_hw[1]
    logits = logits_at_original_size(torch.ones(2, 7, 7), side, prepared.valid_hw, prepared.original_hw)
    assert logits.shape == (2, height, width)
    torch.testing.assert_close(logits, torch.ones_like(logits))


@pytest.mark.parametrize("size", [(1, 1), (3000, 100), (100, 3000), (5000, 1)])
def test_extreme_shapes_are_usable(size: tuple[int, int]) -> None:
    prepared = prepare_image(encoded(Image.new("RGB", size), "PNG"), 448)
    assert prepared.original_hw == size[::-1]
    assert min(prepared.valid_hw) >= 1


def test_a_100_megapixel_picture_is_refused_before_it_is_decoded() -> None:
    data = encoded(Image.new("L", (10_000, 10_000)), "PNG")
    tracemalloc.start()
    with pytest.raises(DataError, match=r"100\.0 million pixels.*64\.0 million"):
        open_rgb(data)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert open_rgb(data[:], max_pixels=100_000_000).size == (10_000, 10_000)


def test_a_decompression_bomb_is_a_data_error() -> None:
    header = encoded(Image.new("L", (10, 10)), "PNG")
    huge = header[:16] + (60_000).to_bytes(4, "big") * 2 + header[24:]
    with pytest.raises(DataError):
        open_rgb(huge)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_file_cut_anywhere_is_a_data_error_or_a_picture_but_never_another_exception(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    refused = 0
    for cut in range(0, len(data), max(1, len(data) // 40)):
        try:
            open_rgb(data[:cut])
        except DataError:
            refused += 1
    assert refused > 20


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=300), kind=st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF"]), place=st.integers(0, 200)
)
def test_random_bytes_in_a_file_never_raise_another_exception(data: bytes, kind: str, place: int) -> None:
    good = encoded(Image.fromarray(gradient(8, 8)), kind)
    for attempt in (data, good[:place] + data + good[place + len(data) :]):
        with contextlib.suppress(DataError):
            open_rgb(attempt)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF"]
)
def test_what_is_not_a_picture_is_refused_with_the_formats_that_are(data: bytes) -> None:
    with pytest.raises(DataError, match="JPEG, PNG"):
        open_rgb(data)


def test_another_type_is_refused() -> None:
    with pytest.raises(DataError, match="ndarray"):
        open_rgb(np.zeros((4, 4, 3), np.uint8))  # type: ignore[arg-type]


def test_the_callers_picture_is_left_as_it_was() -> None:
    picture = Image.fromarray(np.dstack([gradient(), gradient()[..., 0]]))
    before = picture.tobytes()
    open_rgb(picture)
    assert (picture.mode, picture.tobytes()) == ("RGBA", before)


def test_a_mask_covers_on_the_canvas_what_the_pixels_cover() -> None:
    mask = np.zeros((123, 77), bool)
    mask[20:80, 10:50] = True
    small = mask_on_canvas(mask, 56)
    canvas = prepare_image(Image.fromarray(mask.astype(np.uint8) * 255), 448).pixels[..., 0] / 255
    by_area = canvas.reshape(56, 8, 56, 8).mean((1, 3))
    assert small.dtype == np.uint8
    assert np.mean((by_area > 0.5) != small) < 0.01


@pytest.mark.parametrize("mask_size", [28, 112, 448])
def test_a_small_target_never_vanishes(mask_size: int) -> None:
    mask = np.zeros((640, 480), bool)
    mask[321, 100] = True
    small = mask_on_canvas(mask, mask_size)
    assert small.sum() == 1
    row, column = np.argwhere(small)[0]
    assert abs(row / mask_size - 321.5 / 640) < 1 / mask_size
    assert abs(column / mask_size - 100.5 / 640) < 1 / mask_size
    assert mask_on_canvas(np.zeros((9, 9), bool), mask_size).sum() == 0


def test_the_longest_side_is_rounded_as_released() -> None:
    assert resized_hw(640, 427, 448) == (448, int(427 * 448 / 640 + 0.5))
    assert resized_hw(1, 1, 448) == (448, 448)


@pytest.mark.parametrize("image_size", [448, 192, 96])
def test_training_pictures_are_a_level_off_here_and_there_at_most(demo_data: Path, image_size: int) -> None:
    for path in sorted((demo_data / "images").iterdir())[:6]:
        encoded = path.read_bytes()
        exact, fast = (prepare(encoded, image_size) for prepare in (prepare_image, prepare_training_image))
        assert (fast.valid_hw, fast.original_hw) == (exact.valid_hw, exact.original_hw)
        difference = np.abs(exact.pixels.astype(int) - fast.pixels.astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


@given(st.integers(1, 90), st.integers(1, 90), st.integers(4, 40), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_cell_of_the_mask_canvas_is_set_where_half_of_its_area_is_covered(
    height: int, width: int, mask_size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    top, left = rng.integers(0, height), rng.integers(0, width)
    mask[top : top + rng.integers(1, height + 1), left : left + rng.integers(1, width + 1)] = True
    mask &= rng.random(mask.shape) < 0.9
    side = max(height, width)
    if mask_size > side:
        return
    fine = np.zeros((side, side))  # every pixel cut into mask_size² pieces: cells hold whole pieces
    fine[:height, :width] = mask
    fine = np.kron(fine, np.ones((mask_size, mask_size)))
    covered = fine.reshape(mask_size, side, mask_size, side).mean((1, 3))
    canvas = mask_on_canvas(mask, mask_size)
    clear = np.abs(covered - 0.5) > 1e-4
    if (covered >= 0.5).any():
        assert np.array_equal(canvas[clear], covered[clear] > 0.5)
    else:
        assert canvas.sum() == mask.any()
