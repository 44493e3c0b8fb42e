"""What a cluster says about itself over its dashboard: which Python it runs, and what it waits for.

The answers of Ray's dashboard are dictionaries with camel-case keys; where one is not as expected, nothing is said.
"""

import platform
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pixellm.errors import ClusterError

_ANSWER_TIMEOUT_S = 5.0
_SHOWN = ("CPU", "GPU")
_LOOK_EVERY_S = 5.0


def check_python(url: str, ours: str | None = None) -> None:
    """Compares the Python of this process with the cluster's.

    Args:
        url: the dashboard.
        ours: MAJOR.MINOR…; this interpreter's unless given.

    Raises:
        ClusterError: they are of different minor versions.
    """
    ours = ours or platform.python_version()
    theirs = str(_ask(url, "/api/v0/cluster_metadata").get("pythonVersion") or "")
    if theirs and ours.split(".")[:2] != theirs.split(".")[:2]:
        raise ClusterError(
            f"the cluster at {url} runs Python {theirs}, this is {ours}; submit from an environment with Python "
            f"{'.'.join(theirs.split('.')[:2])} (python{'.'.join(theirs.split('.')[:2])} -m venv …), or start the "
            "cluster from one like this"
        )


def look_for_waiting(url: str) -> str | None:
    """What cannot be placed now, in words; None where everything has its place, or the dashboard does not say."""
    return describe_waiting((_ask(url, "/api/cluster_status").get("clusterStatus") or {}).get("loadMetricsReport"))


def describe_waiting(load: Mapping[str, Any] | None) -> str | None:
    """`waiting for resources: 2 × {CPU: 1} wanted; in use: CPU 2 of 2`, from a load report; None if nothing waits.

    Args:
        load: `loadMetricsReport`: demands as [resources, count] pairs, use as name → [used, all].
    """
    if not load:
        return None
    wanted = [(demand, count) for demand, count in load.get("resourceDemand") or []]
    for group, count in load.get("pgDemand") or []:
        wanted += [(bundle, number * count) for bundle, number in group.get("bundles") or []]
    if not wanted:
        return None
    said = ", ".join(f"{count} × {{{_listed(demand)}}}" for demand, count in wanted)
    usage = load.get("usage") or {}
    used = ", ".join(f"{name} {usage[name][0]:g} of {usage[name][1]:g}" for name in _SHOWN if name in usage)
    return f"waiting for resources: {said} wanted; in use: {used or 'nothing that counts'}"


@contextmanager
def waiting_is_said(url: str, every_s: float = _LOOK_EVERY_S) -> Iterator[None]:
    """Says on standard error what the cluster waits for, when it is the same at two looks in a row, and once each."""
    is_over = threading.Event()

    def look() -> None:
        before, said = None, None
        while not is_over.wait(every_s):
            now = look_for_waiting(url)
            if now and now == before and now != said:
                said = now
                print(now, file=sys.stderr, flush=True)
            before = now

    threading.Thread(target=look, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _listed(demand: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {amount:g}" for name, amount in demand.items() if not name.startswith("node:"))


def _ask(url: str, path: str) -> dict[str, Any]:
    import requests  # slow; Ray's job client is built on it
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    try:
        answer = requests.get(url + path, headers=get_auth_headers_if_auth_enabled({}), timeout=_ANSWER_TIMEOUT_S)
        data = answer.json().get("data") if answer.ok else None
    except (requests.RequestException, ValueError, AttributeError):
        return {}
    return data if isinstance(data, dict) else {}
