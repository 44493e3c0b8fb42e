"""A background writer of metrics: the training step hands numbers over and goes on, one thread talks to the store.

Numbers are sent in order, up to MLflow's limit per request. A request that fails is tried again a few times; what is
still refused is counted and reported by `flush` and `close`, never dropped in silence.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from pixellm.errors import TrackingError

_log = logging.getLogger(__name__)

_METRICS_PER_REQUEST = 1000  # MLflow's own limit


class MetricPoint(NamedTuple):
    """One value of one metric, as `mlflow.entities.Metric` takes it."""

    key: str
    value: float
    timestamp_ms: int
    step: int


class MetricWriter:
    """Writes the metrics of one run from a thread that starts with the first value.

    Args:
        client: an `MlflowClient`, or anything with its `log_batch(run_id, metrics=…)`.
        run_id: the run written to.
        attempts: tries of one request before its values count as lost.
        retry_wait_s: pause before the second try; it doubles with each further one.
    """

    def __init__(self, client: Any, run_id: str, *, attempts: int = 4, retry_wait_s: float = 0.5) -> None:
        self._client = client
        self._run_id = run_id
        self._attempts = attempts
        self._retry_wait_s = retry_wait_s
        self._changed = threading.Condition()
        self._waiting: list[MetricPoint] = []
        self._in_flight = 0
        self._num_lost = 0
        self._last_error = ""
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def put(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes values over; returns without waiting for the store.

        Raises:
            TrackingError: the writer is closed.
        """
        now_ms = int(time.time() * 1000)
        points = [MetricPoint(key, float(value), now_ms, step) for key, value in metrics.items()]
        with self._changed:
            if self._is_closed:
                raise TrackingError(f"the run {self._run_id} is closed; log metrics before finish()")
            self._waiting += points
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mlflow-metrics", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> None:
        """Waits until everything taken over is written.

        Raises:
            TrackingError: values were refused, or are not written after `timeout_s` seconds.
        """
        with self._changed:
            is_done = self._changed.wait_for(lambda: not self._waiting and not self._in_flight, timeout_s)
            lost, self._num_lost = self._num_lost, 0
            num_left = len(self._waiting) + self._in_flight
        if lost:
            raise TrackingError(
                f"{lost} metric values of run {self._run_id} could not be written ({self._last_error}); "
                "is the MLflow store reachable and its disk not full?"
            )
        if not is_done:
            raise TrackingError(
                f"{num_left} metric values of run {self._run_id} are not written after {timeout_s:g} s; "
                "is the MLflow store reachable?"
            )

    def close(self, timeout_s: float = 60.0) -> None:
        """Flushes and ends the thread; a second call does nothing.

        Raises:
            TrackingError: as `flush`.
        """
        try:
            self.flush(timeout_s)
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._is_closed)
                if not self._waiting:
                    return
                batch = self._waiting[:_METRICS_PER_REQUEST]
                del self._waiting[: len(batch)]
                self._in_flight = len(batch)
            error = self._send(batch)
            with self._changed:
                self._in_flight = 0
                if error is not None:
                    self._num_lost += len(batch)
                    self._last_error = (str(error).splitlines() or [""])[0][:200]
                self._changed.notify_all()

    def _send(self, batch: list[MetricPoint]) -> Exception | None:
        from mlflow.entities import Metric  # slow

        metrics = [Metric(point.key, point.value, point.timestamp_ms, point.step) for point in batch]
        wait_s = self._retry_wait_s
        for attempt in range(1, self._attempts + 1):
            try:
                self._client.log_batch(self._run_id, metrics=metrics)
            except Exception as error:  # thread boundary: handed to flush(), which raises it in the caller's thread
                if attempt == self._attempts:
                    _log.exception("%d metric values of run %s could not be written", len(batch), self._run_id)
                    return error
                time.sleep(wait_s)
                wait_s *= 2
            else:
                return None
        return None
