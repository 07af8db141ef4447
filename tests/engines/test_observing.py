"""What Prometheus and OpenTelemetry see of a session."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tnm_pipeline.engines import FeedError, load
from tnm_pipeline.engines.opentelemetry import spans
from tnm_pipeline.engines.prometheus import register

openmetrics: Any = importlib.import_module("prometheus_client.openmetrics.exposition")  # without types
openmetrics_parser: Any = importlib.import_module("prometheus_client.openmetrics.parser")
FEEDS = {"input": np.zeros((2, 8), np.float32)}


@pytest.mark.parametrize("describe", [False, True])
def test_prometheus_reads_what_the_metrics_say(model: Path, describe: bool) -> None:
    """Two sessions in a registry, also one like the default, which compares names; read by both parsers."""
    registry = CollectorRegistry(auto_describe=describe)
    with load(model, device="cpu") as session, load(model, device="cpu") as other:
        register(session, "main", registry)
        register(other, "other", registry)
        with pytest.raises(ValueError, match="registered as 'main' already"):
            register(other, "main", registry)
        for _ in range(3):
            session.run(FEEDS)
        session.submit(FEEDS).result()
        with pytest.raises(FeedError):
            session.run({})
        classic, modern = generate_latest(registry).decode(), openmetrics.generate_latest(registry).decode()
        metrics = session.metrics()
    for families in (
        text_string_to_metric_families(classic),
        openmetrics_parser.text_string_to_metric_families(modern),
    ):
        samples = {
            (
                sample.name,
                *(value for label, value in sorted(sample.labels.items()) if label != "session"),
            ): sample.value
            for family in families
            for sample in family.samples
            if sample.labels["session"] == "main"
        }
        assert samples["tnm_session_answered_total",] == samples["tnm_session_runs_total",] == 4
        assert samples["tnm_session_errors_total", "FeedError"] == 1
        assert samples["tnm_session_reloads_total",] == samples["tnm_session_waiting",] == 0
        assert samples["tnm_session_fallback", ""] == 0
        assert samples["tnm_session_run_seconds_count",] == samples["tnm_session_run_seconds_bucket", "+Inf"] == 4
        assert samples["tnm_session_run_seconds_sum",] == pytest.approx(metrics.run.total)
        assert samples["tnm_session_queue_seconds_count",] == 1
        below = [value for key, value in samples.items() if key[0] == "tnm_session_run_seconds_bucket"]
        assert below == sorted(below)
        assert len(below) == 31


def test_a_closed_session_makes_room_for_its_name(model: Path) -> None:
    registry = CollectorRegistry()
    for _ in range(2):
        with load(model, device="cpu") as session:
            register(session, "main", registry)
            assert b'tnm_session_answered_total{session="main"} 0.0' in generate_latest(registry)
    assert b'session="main"' not in generate_latest(registry)


def test_calls_become_spans_below_the_callers(model: Path) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    with load(model, device="cpu", on_call=spans(tracer)) as session:
        with tracer.start_as_current_span("request") as request:
            session.run(FEEDS)
            session.submit(FEEDS).result()
        with pytest.raises(FeedError):
            session.run({})
    first, second, parent, failed = exporter.get_finished_spans()
    assert (first.name, second.name, parent.name, failed.name) == ("tnm.run", "tnm.run", "request", "tnm.run")
    for span in (first, second):
        assert span.parent is not None
        assert span.parent.span_id == request.get_span_context().span_id
        assert span.attributes is not None
        assert span.attributes["tnm.artifact"] == model.name
        assert span.start_time is not None
        assert span.end_time is not None
        lasted: Any = span.attributes["tnm.queue_seconds"] + span.attributes["tnm.run_seconds"]  # type: ignore[operator] # numbers here
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(lasted, abs=1e-6)
    assert failed.status.description == "FeedError"
    assert failed.events[0].name == "exception"


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("prometheus_client", "from tnm_pipeline.engines.prometheus import register; register(None, 'main')"),
        ("opentelemetry", "from tnm_pipeline.engines.opentelemetry import spans; spans()"),
    ],
)
def test_without_the_package_the_command_is_named(package: str, code: str) -> None:
    hidden = f"import sys; sys.modules[{package!r}] = None; {code}"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert "EnvironmentLacks: " in done.stderr
    assert "pip install 'tnm-pipeline[observe]'" in done.stderr
