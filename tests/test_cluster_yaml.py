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


def test_the_head_runs_no_work_and_every_worker_starts_from_none(prepared: dict[str, Any]) -> None:
    nodes = prepared["available_node_types"]
    head = nodes[prepared["head_node_type"]]
    assert (head["resources"]["CPU"], head["max_workers"]) == (0, 0)
    assert {node["min_workers"] for node in nodes.values()} == {0}
    assert sum(node["max_workers"] for node in nodes.values()) <= prepared["max_workers"]


@pytest.mark.parametrize("kind", ["data", "gpu"])
def test_each_kind_of_worker_is_asked_for_on_spot_first_and_else_on_demand(kind: str, written: dict[str, Any]) -> None:
    spot = copy.deepcopy(written["available_node_types"][f"{kind}_spot"])
    on_demand = written["available_node_types"][f"{kind}_on_demand"]
    assert spot["priority"] > on_demand["priority"]
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot | {"priority": 0} == on_demand


def test_rays_scheduler_takes_spot_and_after_a_refusal_the_other(written: dict[str, Any]) -> None:
    """Ray's own v2 scheduler, asked for one machine of 8 GPUs, before and after the cloud had no spot machine."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    types = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=0,
            max_worker_nodes=node["max_workers"],
            resources={"CPU": 96, "GPU": 8} if name.startswith("gpu") else {"CPU": 16},
            priority=node["priority"],
        )
        for name, node in written["available_node_types"].items()
        if name != "head"
    }

    monitor = CloudResourceMonitor()

    def asked() -> list[str]:
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            max_num_nodes=written["max_workers"],
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 8})]),
            recoverable_resource_availabilities=monitor.get_recoverable_resource_availabilities(),
        )
        return [launch.instance_type for launch in ResourceDemandScheduler().schedule(request).to_launch]

    assert asked() == ["gpu_spot"]
    refused = Instance.ALLOCATION_TIMEOUT
    monitor.notify([InstanceUpdateEvent(instance_id="1", instance_type="gpu_spot", new_instance_status=refused)])
    assert asked() == ["gpu_on_demand"]


def test_head_and_workers_ask_for_a_token_that_the_file_does_not_hold(prepared: dict[str, Any]) -> None:
    for commands in (prepared["head_start_ray_commands"], prepared["worker_start_ray_commands"]):
        [start] = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
        assert "RAY_AUTH_TOKEN=" not in start
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_its_images_carry_the_pinned_ray_and_python(prepared: dict[str, Any]) -> None:
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
    images = [prepared["docker"]["image"], prepared["available_node_types"]["gpu_spot"]["docker"]["worker_image"]]
    for image in images:
        assert f":{pins['ray']}-py311-" in image


def test_nothing_that_jobs_need_is_left_behind_by_the_copy_filter(prepared: dict[str, Any]) -> None:
    assert set(prepared["rsync_exclude"]) == {"**/.git", "**/.venv"}
    assert (REPOSITORY / "constraints.txt").is_file()
