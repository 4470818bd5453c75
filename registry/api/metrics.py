"""What Prometheus scrapes at /metrics.

    registry_http_requests_total{method,route,status}     registry_http_request_seconds{method,route}
    registry_http_received_bytes_total{route}             registry_http_sent_bytes_total{route}
    registry_http_requests_in_progress
    registry_jobs{state}           asked of the database at each scrape, so it is of all workers
    registry_downloads_total       of versions, by REST and by the Hub's protocol, since the process began
    process_*, python_*            memory, CPU seconds, open files

A route is the template of a path (``/api/v1/bases/{name}``), never a path: no name becomes a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from registry.services.jobs import JobService
    from registry.services.local import LocalRegistry

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class _Counted(Collector):
    """What the services know, read when it is asked for."""

    def __init__(self, registry: LocalRegistry, jobs: JobService) -> None:
        self._registry = registry
        self._jobs = jobs

    def describe(self) -> Iterator[Metric]:
        """The names alone: registering asks no database."""
        yield GaugeMetricFamily("registry_jobs", "Jobs by state.", labels=["state"])
        yield CounterMetricFamily("registry_downloads", "Downloads of versions since the process began.")

    def collect(self) -> Iterator[Metric]:
        """The numbers of this moment."""
        states = GaugeMetricFamily("registry_jobs", "Jobs by state.", labels=["state"])
        for state, count in self._jobs.counts().items():
            states.add_metric([state.value], count)
        yield states
        yield CounterMetricFamily(
            "registry_downloads", "Downloads of versions since the process began.", self._registry.downloads.total
        )


class Metrics:
    """The metrics of one application."""

    def __init__(self, registry: LocalRegistry, jobs: JobService) -> None:
        self._collected = CollectorRegistry()
        self._collected.register(_Counted(registry, jobs))
        ProcessCollector(registry=self._collected)
        PlatformCollector(registry=self._collected)
        of_request, into = ["method", "route"], self._collected
        self._requests = Counter(
            "registry_http_requests_total", "Requests answered.", [*of_request, "status"], registry=into
        )
        self._seconds = Histogram(
            "registry_http_request_seconds", "From the first byte of a request to the last of its answer.",
            of_request, buckets=SECONDS, registry=into,
        )  # fmt: skip
        self._received = Counter("registry_http_received_bytes", "Bytes of bodies received.", ["route"], registry=into)
        self._sent = Counter("registry_http_sent_bytes", "Bytes of bodies sent.", ["route"], registry=into)
        self.in_progress = Gauge("registry_http_requests_in_progress", "Requests being served.", registry=into)

    def observe(self, method: str, route: str, status: int, seconds: float, received: int, sent: int) -> None:
        """Count one request."""
        self._requests.labels(method, route, status).inc()
        self._seconds.labels(method, route).observe(seconds)
        self._received.labels(route).inc(received)
        self._sent.labels(route).inc(sent)

    def render(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._collected)
