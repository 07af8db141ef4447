"""What production code holds: `load(path)` verifies an artifact and returns a `Session` that answers."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tnm_pipeline.engines.artifact import Content, read_verified
from tnm_pipeline.engines.backends import Array, Backend
from tnm_pipeline.engines.driver import probe
from tnm_pipeline.engines.errors import ArtifactRejected, EnvironmentLacks, SessionClosed
from tnm_pipeline.engines.feeds import check_feeds
from tnm_pipeline.engines.limits import Limits
from tnm_pipeline.engines.manifest import Manifest, TensorSpec

FALLBACKS = ("error", "onnxruntime")
DEVICES = ("auto", "cpu", "cuda")


class Session:
    """A loaded artifact. One thread at a time: give each thread its own session. Made by `load`.

    Attributes:
        manifest: The manifest of the artifact that answers: after a fallback, the source ONNX's.
        backend: The runtime that answers: `"onnxruntime"`, `"tensorrt"` or `"tensorrt_rtx"`.
        device: Where it answers: `"cpu"` or `"cuda"`.
        fallback_reason: Why the plan does not answer, None where the artifact that was asked for does.
    """

    def __init__(self, manifest: Manifest, backend: Backend, fallback_reason: str | None = None) -> None:
        self.manifest = manifest
        self.backend = manifest.backend
        self.device = backend.device
        self.fallback_reason = fallback_reason
        self._backend: Backend | None = backend

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype, shape and ranges of every input."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of every output."""
        return self.manifest.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the network once.

        Args:
            feeds: Input name -> array, of exactly the dtype and shape in `inputs`.

        Returns:
            Output name -> array, owned by the caller.

        Raises:
            FeedError: An array is missing, unexpected, or of the wrong dtype, rank or size.
            SessionClosed: After `close`.
        """
        if self._backend is None:
            raise SessionClosed(f"the session of {self.manifest.artifact} is closed: load it again to run it")
        return self._backend.run(check_feeds(self.inputs, feeds))

    def close(self) -> None:
        """Free what the runtime holds; a second call does nothing."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    path: str | Path,
    *,
    fallback: Literal["error", "onnxruntime"] = "error",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Session:
    """Verify an artifact and make it ready to run.

    The manifest and the artifact's SHA-256 are checked before any runtime is imported, and the driver is
    probed before TensorRT is.

    Args:
        path: An ONNX file or a plan, with its manifest beside it.
        fallback: What to do where a plan cannot run on this machine: raise, or answer with the ONNX file it
            was built from, which is verified in the same way. A rejected artifact is never replaced.
        device: For ONNX Runtime: `"auto"` takes a GPU where there is one and a provider for it, `"cuda"`
            demands both. A plan always runs on the GPU.

    Returns:
        The session, to be closed or used as a context manager.

    Raises:
        ArtifactRejected: A file or its manifest is missing, corrupt or edited.
        EnvironmentLacks: A driver, GPU, runtime or provider is absent; the message says what to do.
        ValueError: An unknown `fallback` or `device`.
    """
    if fallback not in FALLBACKS:
        raise ValueError(f"fallback is {fallback!r}; choose one of {', '.join(FALLBACKS)}")
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}; choose one of {', '.join(DEVICES)}")
    path = Path(path)
    content = read_verified(path)
    manifest = content.manifest
    if manifest.backend == "onnxruntime":
        return Session(manifest, _onnxruntime(content, device))
    try:
        return Session(manifest, _tensorrt(content))
    except EnvironmentLacks as error:
        if fallback == "error":
            raise _with_ways_out(error, path, manifest) from error.__cause__
        return _fall_back(path, manifest, str(error), device)


# The two imports wait until the bytes are verified: a refused artifact reaches no runtime.


def _onnxruntime(content: Content, device: str) -> Backend:
    from tnm_pipeline.engines.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(
        content.manifest,
        content.artifact,
        weights=content.external,
        device=device,
        driver=probe(),
        limits=Limits(),
    )


def _tensorrt(content: Content) -> Backend:
    from tnm_pipeline.engines.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(content.manifest, content.artifact, driver=probe(), limits=Limits())


def _fall_back(path: Path, plan: Manifest, reason: str, device: str) -> Session:
    if plan.source_onnx is None:
        raise EnvironmentLacks(f"{reason}. Its manifest names no source ONNX to fall back to")
    source = path.parent / plan.source_onnx
    content = read_verified(source)
    manifest = content.manifest
    if manifest.sha256 != plan.source_sha256:
        raise ArtifactRejected(
            f"{source} has sha256 {manifest.sha256}, and {path.name} was built from {plan.source_sha256}. "
            "Build the plan again from this file with `tnm-pipeline export --trt`, or restore the file"
        )
    if manifest.backend != "onnxruntime":
        raise ArtifactRejected(f"{source} is a {manifest.backend} plan, not the ONNX file that {path.name} names")
    return Session(manifest, _onnxruntime(content, device), fallback_reason=reason)


def _with_ways_out(error: EnvironmentLacks, path: Path, plan: Manifest) -> EnvironmentLacks:
    if plan.source_onnx is None:
        return error
    source = os.path.normpath(path.parent / plan.source_onnx)
    return EnvironmentLacks(f"{error}; or pass fallback='onnxruntime'; or load the source ONNX: load({source!r})")
