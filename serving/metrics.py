"""What a server counts, as Prometheus reads it."""

from collections.abc import Callable

from stereovla.extras import extra

with extra("serve"):
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server.

    Args:
        connections, requests, held: the numbers of now.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, connections: Callable[[], float], requests: Callable[[], float], held: Callable[[], float]):
        self.registry = CollectorRegistry()
        for name, text, value in (
            ("connections", "Connections that are open.", connections),
            ("requests_in_flight", "Requests that are waited for or computed.", requests),
            ("held_bytes", "Bytes of messages that wait or are being answered.", held),
        ):
            Gauge(f"stereovla_{name}", text, registry=self.registry).set_function(value)
        self.answers = Counter(
            "stereovla_answers", "Requests by what became of them.", ["outcome"], registry=self.registry
        )
        self.latency = Histogram(
            "stereovla_latency_seconds", "From a message to its answer.", buckets=SECONDS, registry=self.registry
        )
        self.infer = Histogram(
            "stereovla_infer_seconds", "In the model, by batch.", buckets=SECONDS, registry=self.registry
        )
        self.batch = Histogram("stereovla_batch_size", "Requests of a batch.", buckets=BATCHES, registry=self.registry)

    def page(self) -> bytes:
        """In Prometheus' text form, `content_type`."""
        return generate_latest(self.registry)
