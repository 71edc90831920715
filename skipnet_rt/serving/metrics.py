"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from skipnet_rt.serving.predictor import Prediction

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of :meth:`Metrics.text`."""

_SECONDS = (.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Of one application, in a registry of its own.

    Args:
        num_blocks: of the network.
    """

    def __init__(self, num_blocks: int) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("skipnet_requests", "Requests answered", ["path", "status"], registry=self._registry)
        self._latency = Histogram("skipnet_request_seconds", "From a prediction's request to its answer",
                                  buckets=_SECONDS, registry=self._registry)
        self._batch_sizes = Histogram("skipnet_batch_size", "Images in a call of the engine", buckets=_SIZES,
                                      registry=self._registry)
        self._blocks = Histogram("skipnet_executed_blocks", "Residual blocks that an image ran",
                                 buckets=range(1, num_blocks + 1), registry=self._registry)
        self._engine_seconds = Counter("skipnet_engine_seconds", "Spent in calls of the engine",
                                       registry=self._registry)
        self._inside = Gauge("skipnet_requests_inside", "Predictions taken and not answered yet",
                             registry=self._registry)

    def request(self, path: str, status: int, seconds: float | None = None) -> None:
        """A request was answered; `seconds` of a prediction."""
        self._requests.labels(path, str(status)).inc()
        if seconds is not None:
            self._latency.observe(seconds)

    def batch(self, predictions: list[Prediction]) -> None:
        """A batch was computed."""
        self._batch_sizes.observe(len(predictions))
        self._engine_seconds.inc(predictions[0].milliseconds / 1e3)
        for prediction in predictions:
            self._blocks.observe(prediction.blocks_run)

    def inside(self, count: int) -> None:
        """So many predictions have been taken and not been answered yet."""
        self._inside.set(count)

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)
