"""What the server counts for Prometheus."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from bifocal.hub.search.encoder import Piece

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INPUTS = (1, 2, 4, 8, 16, 32, 64, 128)
HUNG_UP = 499  # status of a request whose client did not wait for the answer, as nginx counts it


class Metrics:
    """The counters of one server.

    Args:
        queue_length: returns the number of inputs that wait or are embedded.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, queue_length: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "bifocal_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self._latency = Histogram(
            "bifocal_request_seconds", "Seconds from the header of a request to the end of its answer.", ["route"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge(
            "bifocal_requests_in_flight", "Requests of programs that are not answered yet.", registry=registry
        )
        Gauge(
            "bifocal_queue_inputs", "Texts and images that wait or are embedded.", registry=registry
        ).set_function(queue_length)  # fmt: skip
        self._batches = Histogram(
            "bifocal_batch_inputs", "Texts and images that were embedded together.", buckets=_INPUTS, registry=registry
        )
        self._embedded = Counter("bifocal_embedded_inputs", "Inputs embedded, by kind.", ["kind"], registry=registry)
        self.tokens = Counter("bifocal_tokens", "Tokens of the texts that clients sent.", registry=registry)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that is over."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def count_batch(self, pieces: Sequence[Piece]) -> None:
        """Count a batch that is about to be embedded, of the page's searches, too."""
        texts, images = sum(len(piece.texts) for piece in pieces), sum(len(piece.images) for piece in pieces)
        self._batches.observe(texts + images)
        self._embedded.labels("text").inc(texts)
        self._embedded.labels("image").inc(images)

    def text(self) -> bytes:
        """Return all counters in Prometheus' text format."""
        return generate_latest(self._registry)
