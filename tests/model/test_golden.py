"""Ours against the released numbers, array by array, within the tolerances of tests/golden/README.md."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY))

from benchmarks import golden, golden_e2e  # noqa: E402

RTOL, ATOL, PIXEL_ATOL = 1e-4, 1e-5, 1e-4


def assert_agree(pairs: golden.Pairs) -> None:
    """rtol 1e-4 and atol 1e-5, the latter on the array's scale: logits of ±40 cross zero with fp32 noise of 4e-5."""
    assert pairs
    for name, (ours, wanted) in pairs.items():
        if name.endswith("(exact)"):
            np.testing.assert_array_equal(ours, wanted, err_msg=name)
        else:
            atol = PIXEL_ATOL if name.startswith("pre.") else ATOL * max(1.0, float(np.abs(wanted).max()))
            np.testing.assert_allclose(ours, wanted, rtol=RTOL, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def e2e_members(golden_dir: Path) -> dict[str, Path]:
    return golden_e2e.e2e_members(sorted(golden_dir.glob("e2e_a_*")))["a"]


@pytest.fixture(scope="module")
def e2e_pairs(e2e_members: dict[str, Path]) -> tuple[golden.Pairs, golden.Pairs]:
    return golden_e2e.compare_e2e(e2e_members)


@pytest.mark.parametrize("name", ["fusion", "decoder_a", "losses", "image"])
def test_every_array_of_the_file_is_reproduced(golden_dir: Path, name: str) -> None:
    form = name.split("_")[0]
    assert_agree(golden._FORMS[form](golden_dir / f"{name}.npz"))


def test_the_converted_model_gives_the_released_losses_masks_and_words(e2e_pairs) -> None:
    assert_agree(e2e_pairs[0])


def test_the_converted_model_gives_the_released_gradients(e2e_pairs) -> None:
    assert len(e2e_pairs[1]) > 150
    assert_agree(e2e_pairs[1])


def test_no_golden_array_of_the_converted_model_is_left_out(e2e_members, e2e_pairs) -> None:
    inputs = ("in.", "gen.0.p", "gen.1.p", "gen.2.p", "gen.3.p", "gen.4.p", "gen.5.p")
    stored = {key for key in np.load(e2e_members["io"]) if not key.startswith(inputs)}
    assert stored == {name.removesuffix(" (exact)") for name in e2e_pairs[0]}


def test_an_unknown_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "surprise.npz").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"surprise\.npz is of no known form"):
        golden.compare_dir(tmp_path)


def test_a_model_without_all_its_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "e2e_b_io.npz").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"e2e_b lacks config\.json, state\.npz, vision_state\.npz"):
        golden.compare_dir(tmp_path)


def test_a_number_of_ours_that_is_not_finite_is_as_wrong_as_can_be() -> None:
    right, wrong = np.ones(3), np.array([1.0, np.nan, 1.0])
    assert golden.max_relative_error({"a": (right, right), "b": (wrong, right)}) == 1.0


def test_a_folder_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give --dir"):
        golden.compare_dir(tmp_path / "none")


def test_the_benchmarks_last_line_gives_the_largest_error_by_file(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = dict(np.load(golden_dir / "fusion.npz"))
    np.savez(tmp_path / "fusion.npz", **stored)
    largest = np.abs(stored["3x2.fused"]).max()
    stored["3x2.fused"] = stored["3x2.fused"].copy()
    stored["3x2.fused"].flat[0] += 0.01 * largest
    np.savez(tmp_path / "fusion_b.npz", **stored)
    monkeypatch.setattr(sys, "argv", ["golden", "--dir", str(tmp_path)])
    golden.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "golden"
    assert result["files"] == 2
    assert result["max_relative_error"]["fusion.npz"] < 1e-6
    assert result["max_relative_error"]["fusion_b.npz"] == pytest.approx(0.01, rel=0.02)
