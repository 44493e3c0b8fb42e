"""How a process reaches Ray: a local cluster that ends with it, or one that runs already.

A cluster elsewhere has no checkout: `connect` ships the wheel of the running code to its workers (`runtime_env`).
Inside a submitted job Ray has done so already. Ray itself waits for minutes when nothing listens at an address; here it
is probed first, and the error says what to do.
"""

import logging
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixellm.errors import ClusterError, ConfigError
from pixellm.platform.settings import ClusterSettings, from_environment, is_inside_ray_job
from pixellm.platform.wheel import build_wheel

_log = logging.getLogger(__name__)

_DEFAULT = ClusterSettings()
_PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ClusterInfo:
    """The cluster this process is connected to.

    Attributes:
        address: host:port of its control store (GCS).
        dashboard_url: http://host:port, also where jobs are submitted; None when the dashboard is off.
        num_cpus: logical CPUs of all nodes.
        num_gpus: GPUs of all nodes.
        is_ours: whether this process started it, so that `disconnect` ends it.
    """

    address: str
    dashboard_url: str | None
    num_cpus: float
    num_gpus: float
    is_ours: bool


def connect(cluster: ClusterSettings = _DEFAULT, *, env_vars: Mapping[str, str] | None = None) -> ClusterInfo:
    """Connects this process to Ray, once: a second call returns what it is connected to.

    The address is `cluster.address`, else `RAY_ADDRESS`, else none: then a local cluster starts, with its dashboard on
    (Ray Train needs it) and on free ports.

    Args:
        cluster: address, or size of a local cluster.
        env_vars: environment variables of all workers.

    Raises:
        ConfigError: the address is the dashboard's (http://…): that is for `pixellm submit`.
        ClusterError: nothing answers at the address, it refuses us, or a local cluster does not start.
    """
    import ray  # slow (1 s)

    if ray.is_initialized():
        return _describe(is_ours=False)
    address = cluster.address or from_environment().get("RAY_ADDRESS")
    if address in (None, "local"):
        _start_local(cluster.num_cpus, env_vars)
        return _describe(is_ours=True)
    _join(str(address), env_vars)
    return _describe(is_ours=False)


def disconnect() -> None:
    """Leaves the cluster; one that this process started ends. Does nothing when there is no connection."""
    import ray  # slow

    if ray.is_initialized():
        ray.shutdown()


def runtime_env(wheel: Path | None, env_vars: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Ray's runtime environment for our code: the wheel as `py_modules`, never a working directory of the checkout.

    Args:
        wheel: what `build_wheel` wrote; None where the workers have the code (local cluster, inside a job).
        env_vars: environment variables of the workers.
    """
    environment: dict[str, Any] = {}
    if wheel is not None:
        environment["py_modules"] = [str(wheel)]
    if env_vars:
        environment["env_vars"] = dict(env_vars)
    return environment


def is_local_host(host: str) -> bool:
    """Whether a host name or address is this machine."""
    if host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname()):
        return True
    try:
        address = socket.getaddrinfo(host, None)[0][4][0]
    except OSError:
        return False
    with socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET) as probe:
        try:
            probe.bind((str(address), 0))  # only an address of this machine can be bound
        except OSError:
            return False
    return True


def use_local_token() -> bool:
    """Lets Ray present its token (`RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH`, `~/.ray/auth_token`), if there is one.

    Ray does so by itself only for a cluster that it finds or starts, never for an address that it is given: a token is
    not for whoever listens there. Call this for an address on this machine only. `RAY_AUTH_MODE`, when set, decides.

    Returns:
        Whether Ray presents a token now.
    """
    # The one function of Ray that enables the token in a running process; there is no public one.
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    # It announces "enabled for this cluster", which is for whoever starts one.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    return bool(maybe_enable_token_auth_if_token_available(warn_if_disabled=False))


def probe(host: str, port: int, what: str, timeout_s: float = _PROBE_TIMEOUT_S) -> None:
    """Opens and closes a TCP connection.

    Raises:
        ClusterError: nothing accepts it within `timeout_s` seconds.
    """
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        raise ClusterError(
            f"no {what} answers at {host}:{port} ({error.strerror or error}); is the cluster up (ray start --head), "
            "and is the address right?"
        ) from None


def _start_local(num_cpus: int | None, env_vars: Mapping[str, str] | None) -> None:
    import ray  # slow

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(
            address="local",  # never the cluster of another user or of a stale file in Ray's temporary folder
            num_cpus=num_cpus,
            include_dashboard=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=runtime_env(None, env_vars),
        )
    except Exception as error:  # process boundary: Ray raises bare Exception when its processes do not come up
        _log.exception("a local Ray cluster does not start")
        raise ClusterError(
            f"a local Ray cluster does not start: {_first_line(error)}; `pixellm doctor` looks for the cause"
        ) from error


def _join(address: str, env_vars: Mapping[str, str] | None) -> None:
    import ray  # slow

    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"cluster.address is {address}, the dashboard's; use it with `pixellm submit … --address`, and give "
            "cluster.address the control store's host:port (6379 by default)"
        )
    target = _find_running() if address == "auto" else address
    host, _, port = target.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"cluster.address is {address!r}; wanted host:port, ray://host:port, auto or local")
    host = host.strip("[]")
    probe(host, int(port), "Ray cluster")
    if is_local_host(host):
        use_local_token()
    with tempfile.TemporaryDirectory(prefix="pixellm-wheel-") as scratch:
        wheel = None if is_inside_ray_job() else build_wheel(scratch)
        try:
            ray.init(
                address=target,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=runtime_env(wheel, env_vars),
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ClusterError(f"the Ray cluster at {target} refuses us: {_first_line(error)}") from error


def _find_running() -> str:
    # Ray has no public call that finds a running cluster without joining it, and joining one that died takes minutes.
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return str(canonicalize_bootstrap_address_or_die("auto"))
    except ConnectionError:
        raise ClusterError(
            "no Ray cluster runs on this machine; start one (ray start --head), or leave cluster.address empty"
        ) from None


def _describe(*, is_ours: bool) -> ClusterInfo:
    import ray  # slow
    from ray._private.worker import get_dashboard_url  # public only as a result of ray.init, once

    context = ray.get_runtime_context()
    resources = ray.cluster_resources()
    url = get_dashboard_url()
    return ClusterInfo(
        address=context.gcs_address,
        dashboard_url=f"http://{url}" if url else None,
        num_cpus=float(resources.get("CPU", 0)),
        num_gpus=float(resources.get("GPU", 0)),
        is_ours=is_ours,
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
