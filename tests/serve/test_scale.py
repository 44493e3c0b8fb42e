"""Where engines go: one GPU each, spread over nodes, waiting when none is free, coming when a node joins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.drill
def test_engines_take_one_gpu_each_wait_for_one_and_come_when_a_node_joins() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    program = Path(__file__).with_name("scale_cluster.py")
    run = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    seen = json.loads(next(line for line in run.stdout.splitlines() if line.startswith('{"two"')))  # Ray prints, too
    assert seen["waiting"] == {"RUNNING": 2, "STARTING": 1}
    assert seen["grown"] == {"RUNNING": 3}
    for step, count in (("two", 2), ("three", 3)):
        nodes = {node for node, _gpus in seen[step]}
        assert len(nodes) == len(seen[step]) == count  # each on a node of its own
        assert all(len(gpus) == 1 for _node, gpus in seen[step])
    # two questions about one picture go to one engine, and pictures go to all engines
    assert all(first == second for first, second in seen["homes"].values())
    assert len({first for first, _second in seen["homes"].values()}) == 3
