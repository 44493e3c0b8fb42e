"""What a cluster's dashboard says: its Python, and what cannot be placed."""

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from pixellm.errors import ClusterError
from pixellm.jobs.cluster_state import check_python, describe_waiting, look_for_waiting


@pytest.fixture
def dashboard() -> Iterator[str]:
    """Answers as the dashboard of a cluster under Python 3.12 does, with nothing else known."""

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.path == "/api/v0/cluster_metadata"
            self.send_response(200 if is_known else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"data": {"pythonVersion": "3.12.4"}}).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_another_minor_version_of_python_is_refused_and_both_are_named(dashboard: str) -> None:
    check_python(dashboard, "3.12.0")
    with pytest.raises(ClusterError, match=r"runs Python 3\.12\.4, this is 3\.11\.7; .*python3\.12"):
        check_python(dashboard, "3.11.7")


def test_a_dashboard_that_does_not_say_is_no_obstacle(dashboard: str) -> None:
    assert look_for_waiting(dashboard) is None
    check_python("http://127.0.0.1:9", "3.11.7")


def test_what_waits_is_counted_with_the_bundles_of_placement_groups() -> None:
    load = {
        "usage": {"CPU": [2.0, 2.0], "memory": [0.0, 1e9]},
        "resourceDemand": [[{"CPU": 1.0}, 2]],
        "pgDemand": [[{"bundles": [[{"CPU": 0.5, "GPU": 1.0}, 2]], "strategy": "PACK"}, 3]],
    }
    assert describe_waiting(load) == (
        "waiting for resources: 2 × {CPU: 1}, 6 × {CPU: 0.5, GPU: 1} wanted; in use: CPU 2 of 2"
    )
    assert describe_waiting({"resourceDemand": [], "pgDemand": []}) is None
    assert describe_waiting(None) is None
