"""Overlays: colours tie masks to names, whatever overlaps."""

import numpy as np

from pixellm.platform.overlay import draw_overlay, overlay_colors, paint_masks


def _disc(height: int, width: int, y: int, x: int, radius: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def test_the_first_colours_stay_and_all_differ() -> None:
    assert overlay_colors(3) == overlay_colors(20)[:3]
    assert len(set(overlay_colors(20))) == 20


def test_pixels_outside_every_mask_and_its_outline_are_untouched() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    mask = _disc(120, 160, 60, 80, 20)
    painted = paint_masks(picture, [mask])
    far = ~_disc(120, 160, 60, 80, 26)
    assert np.array_equal(painted[far], picture[far])
    inside = _disc(120, 160, 60, 80, 14)
    expected = 0.55 * picture[inside] + 0.45 * np.array(overlay_colors(1)[0])
    assert np.abs(painted[inside] - expected).max() <= 1


def test_a_small_target_on_a_large_one_keeps_its_own_colour_in_any_order() -> None:
    picture = np.full((120, 160, 3), 100, dtype=np.uint8)
    large, small = _disc(120, 160, 60, 80, 50), _disc(120, 160, 60, 80, 15)
    red, blue = (255, 0, 0), (0, 0, 255)
    for masks, colors in (([large, small], [red, blue]), ([small, large], [blue, red])):
        painted = paint_masks(picture, masks, colors)
        assert painted[60, 80].tolist() == [55, 55, 170]
        assert painted[60, 80 - 35].tolist() == [170, 55, 55]


def test_the_legend_shows_each_name_in_the_colour_of_its_mask() -> None:
    picture = np.full((100, 300, 3), 128, dtype=np.uint8)
    masks = [_disc(100, 300, 50, 60, 20), _disc(100, 300, 50, 200, 20)]
    sheet = np.asarray(draw_overlay(picture, masks, ["the cat", "the laptop"], question="Where?", note="IoU 0.9"))
    assert sheet.shape[1] == 300
    legend = sheet[-(sheet.shape[0] - 100) // 2 :]
    for color in overlay_colors(2):
        assert (np.abs(legend.astype(int) - color).sum(-1) == 0).any()


def test_long_questions_and_names_never_leave_the_sheet_and_no_target_is_said() -> None:
    picture = np.full((60, 90, 3), 255, dtype=np.uint8)
    long = "an extraordinarily long description of something " * 4
    tall = draw_overlay(picture, [_disc(60, 90, 30, 40, 10)], [long], question=long)
    assert tall.width == 90
    assert tall.height > 200  # the question is wrapped, not cut
    assert np.asarray(draw_overlay(picture, [], [])).shape[0] > 60


def test_an_empty_mask_is_drawn_without_a_fuss() -> None:
    picture = np.full((40, 50, 3), 7, dtype=np.uint8)
    painted = paint_masks(picture, [np.zeros((40, 50), dtype=bool)])
    assert np.array_equal(painted, picture)
