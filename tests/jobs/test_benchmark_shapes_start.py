"""The start that `benchmarks.shapes_start` makes: symbols say what stands where, and the network can be trained on."""

from pathlib import Path

import torch

from benchmarks.shapes_start import Pupil, learn, symbols_of, teach
from pixellm.jobs.train.build import build_model, build_processor
from pixellm.model.networks import load_network
from pixellm.platform.data.shape_scenes import COLORS, KINDS
from pixellm.platform.data.sources.shapes import ShapesSource
from pixellm.platform.settings import load_settings

_SIDE = 6


def test_every_object_has_a_cell_of_its_own_with_its_name_and_place() -> None:
    rows = [ShapesSource(split="val").row_at(index) for index in range(40)]
    symbols = symbols_of(rows, _SIDE)
    for number, row in enumerate(rows):
        cells = symbols.colors[number].nonzero().flatten().tolist()
        found = {}
        for cell in cells:
            color = list(COLORS)[symbols.colors[number, cell] - 1]
            x, y, _ = symbols.places[number, cell].tolist()
            found[f"{color} {KINDS[symbols.kinds[number, cell] - 1]}"] = (x, y)
            assert abs((x + 1) / 2 * _SIDE - cell % _SIDE - 0.5) < 0.501
            assert abs((y + 1) / 2 * _SIDE - cell // _SIDE - 0.5) < 0.501
        assert found.keys() == {target.phrase for target in row.targets}
        left_to_right = sorted(found, key=lambda name: found[name])
        assert left_to_right == [target.phrase for target in row.targets]


def test_a_network_learns_to_write_symbols_for_pictures_it_has_not_seen() -> None:
    settings = load_settings("ablations/full")
    pupil = Pupil(build_model(settings), build_processor(settings))
    held_out = [ShapesSource(split="val").row_at(index) for index in range(8)]
    before = float(pupil.sight_loss(held_out).detach())
    trained = [weight for weight in pupil.model.parameters() if weight.requires_grad]
    rows = [ShapesSource().row_at(index) for index in range(64)]
    learn("sight", 16, 1e-3, trained, lambda step: pupil.sight_loss(rows[step % 8 * 8 :][:8]))
    assert float(pupil.sight_loss(held_out).detach()) < 0.8 * before


def test_the_start_is_a_model_folder_and_says_what_it_can_do(tmp_path: Path) -> None:
    result = teach("ablations/full", 2, 1, tmp_path / "start", num_held_out=2)
    assert result["right_from_symbols"].keys() == {"all", "one", "several"}
    assert all(0 <= share <= 1 for share in result["right_from_pictures"].values())
    network = load_network(tmp_path / "start", dtype=torch.float32)
    settings = load_settings("shapes", [f"--model.init_from={tmp_path / 'start'}"])
    model = build_model(settings)
    assert torch.equal(model.lm_head.weight, network.lm_head.weight)
