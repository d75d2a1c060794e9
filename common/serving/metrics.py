"""What /metrics shows of the inference server beside requests and their latency by route."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from common.serving.model_process import ModelProcess
from common.web import app as web


class ServingMetrics:
    """Figures of answers, batches and what is loaded.

    Args:
        processes: the models' processes, when they are asked for.
        audit_failures: how many audit lines could not be written so far.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        processes: Callable[[], list[ModelProcess]],
        audit_failures: Callable[[], int],
    ) -> None:
        def histogram(name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self.seconds = histogram(
            "inference_seconds", "From request to answer, by adapter and task.", ("adapter", "task"), web.SECONDS
        )
        self.batch_rows = histogram(
            "batch_rows",
            "Rows that shared a forward pass; for each text, those that were being written as it ended.",
            ("base", "task"),
            [2**i for i in range(12)],
        )
        self.margin = histogram(
            "top2_margin", "Best minus second-best score, in nats.", ("adapter",), (0.1, 0.25, 0.5, 1, 2, 4, 8, 16)
        )
        self.predictions = Counter("predictions", "Predictions per class.", ("adapter", "label"), registry=registry)
        self.cascade = Counter(
            "cascade_rows",
            "Rows handed on to the teacher, by what came of it.",
            ("adapter", "outcome"),
            registry=registry,
        )
        self.loading = {
            kind: Gauge(name, text, ("name",), registry=registry)
            for kind, name, text in (
                ("base", "base_load_seconds", "Loading a base model."),
                ("adapter", "adapter_load_seconds", "Loading an adapter."),
                ("prior", "prior_warmup_seconds", "Computing a prior, or reading it from the disk."),
            )
        }
        depth = Gauge("queue_rows", "Rows that wait.", registry=registry)
        depth.set_function(lambda: sum(process.rows for process in processes()))
        bases = Gauge("bases_loaded", "Base models in memory.", registry=registry)
        bases.set_function(lambda: sum(process.loaded for process in processes()))
        failures = Gauge("audit_failures", "Audit lines that could not be written.", registry=registry)
        failures.set_function(audit_failures)
        memory = Gauge("gpu_memory_bytes", "GPU memory of what is loaded; 0 without one.", registry=registry)
        memory.set_function(lambda: sum(process.state.gpu_bytes for process in processes()))
        self._children: dict[tuple, Any] = {}

    def child(self, metric: Counter | Histogram, *labels: str) -> Any:
        """`metric.labels`, looked up once."""
        key = (metric, *labels)
        if key not in self._children:
            self._children[key] = metric.labels(*labels)
        return self._children[key]
