"""What two engines, or one at several batches, say about themselves before anybody blames sparsity."""

from collections.abc import Mapping
from dataclasses import asdict, replace

from tnm_pipeline.engines.manifest import Manifest
from tnm_pipeline.export.reasons import Finding, finding

# The flag and the file's own identity may differ between a plan and its dense twin, and what follows from them.
_MAY_DIFFER = ("artifact", "sha256", "bytes", "sparse_weights_flag", "provenance")
VERDICT = "verdict"  # key of `Manifest.sparsity` in a plan
_FLAT = 1.1  # a call that takes hardly longer with twice the batch


def runtime_finding(backend: str) -> Finding | None:
    """Whether a runtime cannot use 2:4 at all.

    Args:
        backend: What ran it, as a manifest calls it.

    Returns:
        `wrong-runtime` for ONNX Runtime, None for TensorRT.
    """
    return finding("wrong-runtime", runtime="ONNX Runtime") if backend == "onnxruntime" else None


def compare_twins(sparse: Manifest, dense: Manifest) -> Finding | None:
    """Whether a plan and its dense twin differ in more than the flag.

    Args:
        sparse: The plan built with sparse weights allowed.
        dense: Its twin.

    Returns:
        `twins-differ`, naming the fields; None where the comparison is fair.
    """
    ours, theirs = _settings(sparse), _settings(dense)
    fields = [name for name in ours if name not in _MAY_DIFFER and ours[name] != theirs[name]]
    return finding("twins-differ", fields=", ".join(fields)) if fields else None


def _settings(manifest: Manifest) -> dict[str, object]:
    """All that is stated, but not what became of each layer: that is what twins are made to find out."""
    sparsity = {key: value for key, value in manifest.sparsity.items() if key != VERDICT}
    return asdict(replace(manifest, sparsity=sparsity))


def launch_finding(median_us: Mapping[int, float], batch: int) -> Finding | None:
    """Whether the time of a call goes to something else than arithmetic.

    Args:
        median_us: Batch -> median time of a call, microseconds.
        batch: The one that is of interest, a key of `median_us`.

    Returns:
        `launch-bound` where a batch at least twice as large takes less than 1.1 times as long; else None.
    """
    larger = [size for size in median_us if size >= 2 * batch and median_us[size] < _FLAT * median_us[batch]]
    if not larger:
        return None
    size = max(larger)
    return finding("launch-bound", factor=size / batch, ratio=median_us[size] / median_us[batch])
