"""One JSON line per request of the API on standard error: who, what, how long; no picture, prompts only if asked."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

_LOG = logging.getLogger("pixellm.access")


class AccessLog:
    """Writes the lines.

    Args:
        mode: "off" | "stderr".
    """

    def __init__(self, mode: str) -> None:
        self._is_on = mode == "stderr"
        if self._is_on and not _LOG.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(message)s"))
            _LOG.addHandler(handler)
            _LOG.setLevel(logging.INFO)
            _LOG.propagate = False

    def write(self, **fields: Any) -> None:
        """Writes one line; fields that are None are left out. JSON escapes what would break a line."""
        if self._is_on:
            record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
            record |= {name: value for name, value in fields.items() if value is not None}
            _LOG.info(json.dumps(record, default=str))
