"""What a run reports to Ray's metrics, and so to Prometheus and Grafana (`cluster/monitoring/`).

Every name gets the prefix `ray_`; every series has the label `run`. A new worker process is a new series, so queries
take the maximum by run; the counters are summed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# metric of a step -> (name, what it is)
GAUGES = {
    "step": ("vlmo_step", "steps done"),
    "total_steps": ("vlmo_total_steps", "steps of the whole run"),
    "samples": ("vlmo_samples", "rows consumed"),
    "loss": ("vlmo_loss", "the weighted sum of all terms"),
    "lr": ("vlmo_learning_rate", "of the step"),
    "grad_norm": ("vlmo_grad_norm", "norm of the whole gradient"),
    "samples_per_s": ("vlmo_samples_per_second", "of all workers together"),
    "mfu": ("vlmo_mfu", "share of the GPUs' peak, by the model's FLOPs"),
    "data_wait": ("vlmo_data_wait", "share of a step spent waiting for rows"),
    "workers": ("vlmo_workers", "of the run"),
    "checkpoint_age_s": ("vlmo_checkpoint_age_seconds", "since the newest checkpoint was complete, or the start"),
}
COUNTERS = {
    "masked_rows": ("vlmo_masked_rows", "rows that could not be read"),
    "skipped": ("vlmo_skipped_steps", "steps without an update, as they were not finite"),
    "repeated_steps": ("vlmo_repeated_steps", "steps that were done again after a loss of workers"),
}
TERM = ("vlmo_term", "a term of the loss, by the label term")


class Gauges:
    """Called with the metrics of every step, on the first worker. Ray sends them to the node's agent by itself."""

    def __init__(self, run: str):
        from ray.util.metrics import Counter, Gauge

        self._labels = {"run": run}
        self._gauges = {key: Gauge(name, description=text, tag_keys=("run",)) for key, (name, text) in GAUGES.items()}
        counters = COUNTERS.items()
        self._counters = {key: Counter(name, description=text, tag_keys=("run",)) for key, (name, text) in counters}
        name, text = TERM
        self._term = Gauge(name, description=text, tag_keys=("run", "term"))

    def __call__(self, figures: Mapping[str, float], terms: tuple[str, ...] = ()) -> None:
        for key, gauge in self._gauges.items():
            if math.isfinite(value := figures.get(key, math.nan)):
                gauge.set(value, self._labels)
        for key, counter in self._counters.items():
            if (value := figures.get(key, 0.0)) > 0:
                counter.inc(value, self._labels)
        for term in terms:
            if math.isfinite(value := figures.get(term, math.nan)):
                self._term.set(value, self._labels | {"term": term})
