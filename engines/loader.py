"""From a path to a session: everything is checked before a runtime is imported, then the runtime is chosen."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tnm_pipeline.engines.artifact import Content, read_verified
from tnm_pipeline.engines.backends import Backend
from tnm_pipeline.engines.batching import Batching
from tnm_pipeline.engines.calls import Observer
from tnm_pipeline.engines.driver import probe
from tnm_pipeline.engines.engine import Engine
from tnm_pipeline.engines.errors import ArtifactRejected, EnvironmentLacks
from tnm_pipeline.engines.keys import TrustedKey
from tnm_pipeline.engines.limits import Limits
from tnm_pipeline.engines.machine import check_machine
from tnm_pipeline.engines.manifest import Manifest
from tnm_pipeline.engines.session import Session

BACKENDS = ("auto", "onnxruntime", "tensorrt")
FALLBACKS = ("error", "onnxruntime")
DEVICES = ("auto", "cpu", "cuda")


def load(
    path: str | Path,
    *,
    backend: Literal["auto", "onnxruntime", "tensorrt"] = "auto",
    fallback: Literal["error", "onnxruntime"] = "error",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    limits: Limits | None = None,
    batching: Batching | None = None,
    trusted_keys: Sequence[TrustedKey] | None = None,
    finite: bool = False,
    warm_up: bool = True,
    on_call: Observer | None = None,
) -> Session:
    """Verify an artifact and make it ready to run.

    The manifest, its signature and the SHA-256 of every file are checked before any runtime is imported, and the driver
    is probed before TensorRT is.

    Args:
        path: An ONNX file or a plan, with its manifest beside it.
        backend: `"auto"`: the runtime of the artifact. `"onnxruntime"`: of a plan, let the source ONNX answer.
            `"tensorrt"`: refuse what is no plan.
        fallback: What to do where a plan cannot run on this machine: raise, or answer with the ONNX file it
            was built from, which is verified in the same way. A rejected artifact is never replaced.
        device: For ONNX Runtime: `"auto"` takes a GPU where there is one and a provider for it, `"cuda"`
            demands both. A plan always runs on the GPU.
        limits: Bounds on contexts, waiting and queue.
        batching: Join calls that come together.
        trusted_keys: Ed25519 public keys, as PEM files or 32 bytes, of which one must have signed the manifest, and
            that of the source ONNX where it answers; None: signatures are not looked at.
        finite: Refuse inputs with NaN or infinities.
        warm_up: Run on zeros before the first call: a plan at the sizes of its profiles, an ONNX file at the smallest,
            where the network takes them. A plan that cannot run so is refused with what `Session.run` would raise.
        on_call: Called after every call, in the caller's thread or a worker, with the caller's context variables.

    Returns:
        The session, to be closed or used as a context manager.

    Raises:
        ArtifactRejected: A file or its manifest is missing, corrupt, edited, or not signed as demanded.
        EnvironmentLacks: A driver, GPU, runtime or provider is absent, the plan is of another operating system or CPU,
            or keys are given and `cryptography` is not installed; the message says what to do.
        KeyRejected: A trusted key is none.
        ValueError: An option has no such value, or this artifact's calls cannot be joined.
    """
    loader = Loader(backend, fallback, device, limits or Limits(), trusted_keys, finite, warm_up)
    return Session(Path(path), loader.open, limits=loader.limits, batching=batching, on_call=on_call)


@dataclass(frozen=True)
class Loader:
    """How artifacts become engines; `load` says what each option means.

    Raises:
        ValueError: An option has no such value.
    """

    backend: str
    fallback: str
    device: str
    limits: Limits
    trusted_keys: Sequence[TrustedKey] | None
    finite: bool
    warm_up: bool

    def __post_init__(self) -> None:
        for option, value, known in (
            ("backend", self.backend, BACKENDS),
            ("fallback", self.fallback, FALLBACKS),
            ("device", self.device, DEVICES),
        ):
            if value not in known:
                raise ValueError(f"{option} is {value!r}; choose one of {', '.join(known)}")

    def open(self, path: Path) -> Engine:
        """Verify an artifact and hand it to its runtime.

        Raises:
            ArtifactRejected: A file or its manifest is missing, corrupt, edited, or not signed as demanded.
            EnvironmentLacks: A driver, GPU, runtime or provider is absent; the message says what to do.
        """
        content = read_verified(path, self.trusted_keys)
        manifest = content.manifest
        if manifest.backend == "onnxruntime":
            if self.backend == "tensorrt":
                raise EnvironmentLacks(
                    f"{path.name} is an ONNX file, and backend='tensorrt' runs plans: build one with "
                    "`tnm-pipeline export --trt` and load that, or pass backend='auto'"
                )
            return self._engine(path, content, _onnxruntime(content, self), f"{path.name} is an ONNX file")
        if self.backend == "onnxruntime":
            return self._source(path, manifest, "backend='onnxruntime' was asked for", None)
        try:
            check_machine(manifest)
            backend = _tensorrt(content, self)
        except EnvironmentLacks as error:
            if self.fallback == "error":
                raise _with_ways_out(error, path, manifest) from error.__cause__
            return self._source(path, manifest, f"the plan cannot run here: {error}", str(error))
        return self._engine(path, content, backend, f"{path.name} is a {manifest.backend} plan")

    def _source(self, path: Path, plan: Manifest, why: str, fallback_reason: str | None) -> Engine:
        """The ONNX file that a plan was built from."""
        if plan.source_onnx is None:
            raise EnvironmentLacks(f"{why}. The manifest of {path.name} names no source ONNX to answer instead")
        source = path.parent / plan.source_onnx
        content = read_verified(source, self.trusted_keys)
        manifest = content.manifest
        if manifest.sha256 != plan.source_sha256:
            raise ArtifactRejected(
                f"{source} has sha256 {manifest.sha256}, and {path.name} was built from {plan.source_sha256}. "
                "Build the plan again from this file with `tnm-pipeline export --trt`, or restore the file"
            )
        if manifest.backend != "onnxruntime":
            raise ArtifactRejected(f"{source} is a {manifest.backend} plan, not the ONNX file that {path.name} names")
        return self._engine(source, content, _onnxruntime(content, self), why, fallback_reason)

    def _engine(
        self, path: Path, content: Content, backend: Backend, why: str, fallback_reason: str | None = None
    ) -> Engine:
        if self.warm_up:
            try:
                backend.warm_up()
            except BaseException:
                backend.close()
                raise
        return Engine(
            path,
            content.manifest,
            backend,
            why=why,
            fallback_reason=fallback_reason,
            signed=self.trusted_keys is not None,
            finite=self.finite,
        )


# The two imports wait until the bytes are verified: a refused artifact reaches no runtime.


def _onnxruntime(content: Content, loader: Loader) -> Backend:
    try:
        from tnm_pipeline.engines.backends.onnxruntime import OnnxRuntimeBackend
    except ImportError as error:
        raise EnvironmentLacks(
            f"{content.manifest.artifact} needs ONNX Runtime: {error}. Run `pip install onnxruntime`, or on a machine "
            "with a GPU `pip install 'onnxruntime-gpu[cuda,cudnn]'`"
        ) from error

    return OnnxRuntimeBackend(
        content.manifest,
        content.artifact,
        weights=content.external,
        device=loader.device,
        driver=probe(),
        limits=loader.limits,
    )


def _tensorrt(content: Content, loader: Loader) -> Backend:
    from tnm_pipeline.engines.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(content.manifest, content.artifact, driver=probe(), limits=loader.limits)


def _with_ways_out(error: EnvironmentLacks, path: Path, plan: Manifest) -> EnvironmentLacks:
    if plan.source_onnx is None:
        return error
    source = os.path.normpath(path.parent / plan.source_onnx)
    return EnvironmentLacks(f"{error}; or pass fallback='onnxruntime'; or load the source ONNX: load({source!r})")
