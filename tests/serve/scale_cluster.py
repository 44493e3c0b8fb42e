"""A program: engines that ask for one GPU each, on raylets that pretend to have one. Prints what came of each step.

Run by `test_scale.py` in a process of its own, since the suite's Ray session is another one.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from pixellm.platform.settings import ServeSettings, TrackingSettings
from pixellm.serve.app import ENGINE_DEPLOYMENT, engine_application
from pixellm.serve.controller import run_applications
from pixellm.serve.model_card import ModelCard
from pixellm.serve.protocol import Question

SETTINGS = ServeSettings(min_replicas=3, max_replicas=3, replica_gpus=1, replica_cpus=0.1)
CARD = ModelCard("m", "1", "models:/m/1", "models:/m@champion", 0)


class Standing:
    """Stands where an engine would: says on which node and which GPU."""

    def __init__(self, *_arguments: Any) -> None:
        context = ray.get_runtime_context()
        self._place = (context.get_node_id(), ray.get_gpu_ids())

    async def answer(self, _question: object) -> tuple[str, list[int]]:
        return self._place


def states() -> dict[str, int]:
    deployment = serve.status().applications["scale"].deployments.get(ENGINE_DEPLOYMENT)
    if deployment is None:  # the controller has not got to it yet
        return {}
    return {str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items() if count}


def wait_for(condition: Callable[[], bool], patience_s: float = 120) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"did not come: {states()}")
        time.sleep(0.1)


def places(count: int) -> list[tuple[str, list[int]]]:
    """Where replicas are; asked until each of `count` has answered (the router chooses two at random)."""
    handle = serve.get_deployment_handle(ENGINE_DEPLOYMENT, "scale").options(method_name="answer")
    seen: dict[str, tuple[str, list[int]]] = {}
    deadline = time.monotonic() + 60
    while len(seen) < count and time.monotonic() < deadline:
        node, gpus = handle.remote(None).result(timeout_s=30)
        seen[node] = (node, gpus)
    return list(seen.values())


def homes(num_pictures: int) -> dict[str, list[str]]:
    """For each of some pictures, the nodes that two questions about it went to."""
    handle = serve.get_deployment_handle(ENGINE_DEPLOYMENT, "scale").options(method_name="answer")
    questions = [Question(b"", "what?", picture_digest=str(number)) for number in range(num_pictures)]
    return {
        question.picture_digest: [handle.remote(question).result(timeout_s=30)[0] for _ in range(2)]
        for question in questions
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, "dashboard_port": 0, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1, num_gpus=1)
            ray.init(address=cluster.address, log_to_driver=False)
            serve.start(proxy_location="Disabled")
            application = engine_application(SETTINGS, CARD, TrackingSettings(), engine=Standing)
            run_applications([(application, "scale", None)])
            wait_for(lambda: states() == {"RUNNING": 2, "STARTING": 1})
            two, waiting = places(2), states()
            cluster.add_node(num_cpus=1, num_gpus=1)
            wait_for(lambda: states() == {"RUNNING": 3})
            seen = {"two": two, "waiting": waiting, "three": places(3), "grown": states(), "homes": homes(15)}
            print(json.dumps(seen), flush=True)
            serve.shutdown()
        finally:
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    main()
    sys.exit(0)
