"""`cluster.yaml` is what Ray's cluster launcher accepts, and says what the design asks of it."""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "cluster.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def prepared(written: dict[str, Any]) -> dict[str, Any]:
    """With Ray's own defaults filled in, as `ray up` does before it validates."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(copy.deepcopy(written))


def test_it_is_valid_by_rays_own_schema(prepared: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared)


def test_the_schema_would_catch_a_misspelt_key(prepared: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_timout_minutes"):
        validate_config(prepared | {"idle_timout_minutes": 5})


def test_every_key_survives_rays_defaults(written: dict[str, Any], prepared: dict[str, Any]) -> None:
    assert {key: prepared[key] for key in ("head_node_type", "rsync_filter", "file_mounts", "max_workers")} == {
        key: written[key] for key in ("head_node_type", "rsync_filter", "file_mounts", "max_workers")
    }


def test_the_head_runs_no_work_and_gpus_start_from_none(prepared: dict[str, Any]) -> None:
    nodes = prepared["available_node_types"]
    assert nodes[prepared["head_node_type"]]["resources"]["CPU"] == 0
    assert {name: node["min_workers"] for name, node in nodes.items()} == {"head": 0, "data": 0, "gpu": 0}
    assert nodes["gpu"]["max_workers"] > 0
    assert sum(node["max_workers"] for node in nodes.values()) <= prepared["max_workers"]


def test_head_and_workers_ask_for_a_token_that_the_file_does_not_hold(prepared: dict[str, Any]) -> None:
    for commands in (prepared["head_start_ray_commands"], prepared["worker_start_ray_commands"]):
        [start] = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
        assert "RAY_AUTH_TOKEN=" not in start
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_its_images_carry_the_pinned_ray_and_python(prepared: dict[str, Any]) -> None:
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
    images = [prepared["docker"]["image"], prepared["available_node_types"]["gpu"]["docker"]["worker_image"]]
    for image in images:
        assert f":{pins['ray']}-py311-" in image


def test_nothing_that_jobs_need_is_left_behind_by_the_copy_filter(prepared: dict[str, Any]) -> None:
    assert set(prepared["rsync_exclude"]) == {"**/.git", "**/.venv"}
    assert (REPOSITORY / "constraints.txt").is_file()
