"""What gpu_engines.py asks its questions of: a network as an artifact, in a runtime."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from gpu_export_networks import Network

from tnm_pipeline.engines import Limits
from tnm_pipeline.engines.artifact import read_verified, write_manifest
from tnm_pipeline.engines.backends import Backend
from tnm_pipeline.engines.driver import probe
from tnm_pipeline.export.latency import LatencyTable, measure

Way: TypeAlias = Literal["tensorrt", "tensorrt_rtx", "onnxruntime"]


@dataclass(frozen=True)
class Case:
    """One artifact in one runtime.

    Attributes:
        network: What it computes.
        way: Its runtime.
        path: The artifact.
        source: The ONNX file that it comes from.
        quick: On the CPU, few rounds.
    """

    network: Network
    way: str
    path: Path
    source: Path
    quick: bool

    @property
    def device(self) -> str:
        """Of ONNX Runtime."""
        return "cpu" if self.quick else "cuda"

    def load(self, **limits: int) -> Backend:
        """A new backend, warm."""
        network = backend(self.path, self.device, **limits)
        network.warm_up()
        return network

    def feeds(self, batch: int) -> dict[str, Any]:
        """The inputs of a batch."""
        return {read_verified(self.path).manifest.inputs[0].name: self.network.inputs(batch).numpy()}


def timed(baseline: str, calls: Mapping[str, Callable[[], object]], samples: int, *, quick: bool) -> LatencyTable:
    """Calls in turns; one is `baseline`, another `control`."""
    return measure(
        calls,
        repeats=10 if quick else 300,
        warmup=3 if quick else 50,
        baseline=baseline,
        control="control",
        samples=samples,
        on_gpu=not quick,
    )


def backend(path: Path, device: str, **limits: int) -> Backend:
    """An artifact in its runtime, verified as production does it."""
    content = read_verified(path)
    bounds = Limits(**limits)
    if content.manifest.backend != "onnxruntime":
        from tnm_pipeline.engines.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(content.manifest, content.artifact, driver=probe(), limits=bounds)
    from tnm_pipeline.engines.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(
        content.manifest, content.artifact, weights=content.external, device=device, driver=probe(), limits=bounds
    )


def make(network: Network, way: Way, folder: Path) -> tuple[Path, Path]:
    """The artifact for a runtime, and the ONNX file that it comes from."""
    from tnm_pipeline.export.artifacts import onnx_manifest
    from tnm_pipeline.export.onnx import export_onnx
    from tnm_pipeline.export.sparsity import inspect_onnx
    from tnm_pipeline.export.tensorrt import build_plan

    source = folder / "model.fp32.onnx"
    export_onnx(network.dense(), network.inputs(2), source)
    sparsity = inspect_onnx(source).summary()
    write_manifest(source, onnx_manifest(source, precision="fp32", sparsity=sparsity))
    if way == "onnxruntime":
        return source, source
    plan = folder / "model.plan"
    build_plan(
        source,
        plan,
        sparse=False,
        precision="fp32",
        sparsity=sparsity,
        backend=way,
        profiles=[{"batch": (1, network.batches[1], network.batches[-1])}],
        compute_capabilities=(probe().gpus[0].compute_capability,),
    )
    return plan, source
