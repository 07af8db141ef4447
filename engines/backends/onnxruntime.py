"""ONNX Runtime on the CPU or on CUDA, without its silent fallback from one to the other."""

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import (
    onnxruntime_pybind11_state as errors,  # pyright: ignore[reportAttributeAccessIssue] - compiled, no stubs
)

from tnm_pipeline.engines.arrays import Feed
from tnm_pipeline.engines.backends.onnxruntime_binding import DeviceRuns
from tnm_pipeline.engines.driver import Driver
from tnm_pipeline.engines.errors import ArtifactRejected, EnvironmentLacks, FeedError, RunFailed
from tnm_pipeline.engines.limits import Limits
from tnm_pipeline.engines.manifest import Manifest, TensorSpec
from tnm_pipeline.engines.pool import Pool

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_SEVERITY_ERROR, _SEVERITY_FATAL = 3, 4
# ONNX Runtime 1.31 ends the process with SIGSEGV when this optimiser meets an fp16 pre-norm transformer on the CPU.
_CRASHING_ON_FP16 = ["NchwcTransformer"]
_GRAPH_ERRORS = (errors.InvalidGraph, errors.InvalidProtobuf, errors.NoModel)
_RUN_ERRORS = (errors.Fail, errors.InvalidArgument, errors.RuntimeException, errors.EPFail)
_LOAD_ERRORS = (*_GRAPH_ERRORS, *_RUN_ERRORS)
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


class OnnxRuntimeBackend:
    """A verified ONNX model in ONNX Runtime.

    Args:
        manifest: The manifest of the model.
        model: The bytes that the manifest describes.
        weights: The content of its external files by name.
        device: `"cpu"`; `"cuda"`: the whole network there, or an error; `"auto"`: CUDA where there is a GPU
            and a provider for it, with a warning where the provider then fails to start, the CPU otherwise.
        driver: What the driver probe found.
        limits: Of its session.

    Raises:
        ArtifactRejected: ONNX Runtime refuses the model, or its inputs and outputs are not the manifest's.
        EnvironmentLacks: CUDA was demanded and cannot run all of the network here, or an operator is missing.
    """

    def __init__(
        self,
        manifest: Manifest,
        model: bytes,
        *,
        weights: Mapping[str, bytes],
        device: str,
        driver: Driver,
        limits: Limits,
    ) -> None:
        on_gpu = _wants_gpu(device, driver)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SEVERITY_ERROR
        # The bytes that were hashed, not the files, which somebody may have replaced since.
        options.add_external_initializers_from_files_in_memory(
            list(weights), list(weights.values()), [len(content) for content in weights.values()]
        )
        # ONNX Runtime looks for others in the working directory, where no hash covers them: point it at a folder that
        # cannot contain a file.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        if device == "cuda":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        providers = [_CUDA, _CPU] if on_gpu and device == "auto" else [_CUDA] if on_gpu else [_CPU]
        try:
            # enable_fallback=0: the Python wrapper would otherwise print and retry on the CPU
            self._session = onnxruntime.InferenceSession(
                model,
                options,
                providers=providers,
                enable_fallback=0,
                disabled_optimizers=_CRASHING_ON_FP16 if manifest.precision == "fp16" else None,
            )
        except errors.NotImplemented as error:
            way_out = (
                "Its CPU has no bf16: load the fp32 or fp16 file here, or run this one on a GPU"
                if manifest.precision == "bf16" and not on_gpu
                else "Install a newer ONNX Runtime"
            )
            raise EnvironmentLacks(
                f"ONNX Runtime {onnxruntime.__version__} lacks an operator of {manifest.artifact}: {error}. {way_out}"
            ) from error
        except _LOAD_ERRORS as error:
            if on_gpu and not isinstance(error, _GRAPH_ERRORS):
                raise EnvironmentLacks(_no_cuda(manifest, str(error))) from error
            raise ArtifactRejected(
                f"{manifest.artifact} matches its manifest, and ONNX Runtime {onnxruntime.__version__} "
                f"refuses it: {error}. Export it again with the weights inside: `tnm-pipeline export`"
            ) from error
        self.version = str(onnxruntime.__version__)
        self.device = "cuda" if _CUDA in self._session.get_providers() else "cpu"  # what ONNX Runtime confirmed
        self._check_provider(manifest, device, on_gpu)
        _check_tensors("inputs", manifest.inputs, self._session.get_inputs())
        _check_tensors("outputs", manifest.outputs, self._session.get_outputs())
        self._artifact = manifest.artifact
        self._inputs = manifest.inputs
        self._outputs = [spec.name for spec in manifest.outputs]
        self._turns = Pool([None] * limits.contexts, limits.patience)
        self._device_runs = DeviceRuns(self._session, self._outputs) if self.device == "cuda" else None

    def run(
        self, feeds: Mapping[str, Feed], deadline: float | None = None, *, on_device: bool = False
    ) -> dict[str, Any]:
        """See `Backend.run`."""
        bound = on_device
        for feed in feeds.values():
            if type(feed) is not np.ndarray:
                bound = True
        turn = self._turns.take(deadline)
        try:
            if bound:
                return self._run_bound(feeds, on_device)
            answers: Sequence[Any] = self._session.run(self._outputs, feeds)
        except _RUN_ERRORS as error:
            shapes = {name: feed.shape for name, feed in feeds.items()}
            raise RunFailed(
                f"{self._artifact} fails on inputs of shapes {shapes} in ONNX Runtime {onnxruntime.__version__}: "
                f"{error}. Give sizes and values that the network can take; where memory is short, a smaller batch"
            ) from error
        finally:
            self._turns.give_back(turn)
        return dict(zip(self._outputs, answers, strict=True))

    def warm_up(self) -> None:
        """Run zeros once, so that memory is allocated and, on CUDA, kernels are loaded.

        An ONNX file says nothing of the sizes it will be asked for: a dynamic dimension has the one that the manifest
        was told is usual, else 1. A network that cannot take these stays cold.
        """
        usual = {dim: best for spec in self._inputs for dim, (_, best, _) in spec.ranges.items()}
        feeds = {
            spec.name: np.zeros([dim if isinstance(dim, int) else usual.get(dim, 1) for dim in spec.shape], spec.dtype)
            for spec in self._inputs
        }
        quiet = onnxruntime.RunOptions()
        quiet.log_severity_level = _SEVERITY_FATAL
        with suppress(*_RUN_ERRORS):
            self._session.run(self._outputs, feeds, quiet)

    def describe(self) -> dict[str, object]:
        """See `Backend.describe`."""
        return {"contexts": self._turns.size, "providers": list(self._session.get_providers())}

    def close(self) -> None:
        """Drop the session; ONNX Runtime frees it with the last reference."""
        del self._session
        self._device_runs = None

    def _run_bound(self, feeds: Mapping[str, Feed], on_device: bool) -> dict[str, Any]:
        if self._device_runs is None:
            raise FeedError(
                f"{self._artifact} runs on the CPU, and {'on_device' if on_device else 'an input'} asks for a GPU: "
                "pass numpy arrays, or load it with device='cuda'"
            )
        return self._device_runs.run(feeds, on_device=on_device)

    def _check_provider(self, manifest: Manifest, device: str, on_gpu: bool) -> None:
        if not on_gpu or self.device == "cuda":
            return
        if device == "cuda":
            raise EnvironmentLacks(_no_cuda(manifest, f"ONNX Runtime chose {self._session.get_providers()}"))
        warnings.warn(
            f"{manifest.artifact} runs on the CPU: this machine has a GPU, and ONNX Runtime's CUDA provider "
            "did not start (its log says why). Pass device='cpu' if that is meant, device='cuda' to get an error",
            RuntimeWarning,
            stacklevel=7,
        )


def _wants_gpu(device: str, driver: Driver) -> bool:
    available = _CUDA in onnxruntime.get_available_providers()
    if device != "cuda":
        return device == "auto" and available and bool(driver.gpus)
    if driver.reason is not None:
        raise EnvironmentLacks(
            f"device='cuda' needs a GPU: {driver.reason}. Run on a machine with an NVIDIA driver, or pass device='cpu'"
        )
    if not available:
        raise EnvironmentLacks(
            f"this ONNX Runtime has only {onnxruntime.get_available_providers()}. "
            "Run `pip uninstall onnxruntime && pip install onnxruntime-gpu`, or pass device='cpu'"
        )
    return True


def _no_cuda(manifest: Manifest, cause: str) -> str:
    return (
        f"CUDA cannot run all of {manifest.artifact}: {cause}. Install CUDA and cuDNN for this build with "
        "`pip install 'onnxruntime-gpu[cuda,cudnn]'`, or pass device='cpu'"
    )


def _check_tensors(side: str, specs: tuple[TensorSpec, ...], found: Sequence[Any]) -> None:
    """The model's own names, dtypes and ranks must be the manifest's."""
    stated = [(spec.name, spec.dtype, len(spec.shape)) for spec in specs]
    actual = [(node.name, _dtype(node.type), len(node.shape)) for node in found]
    if stated != actual:
        raise ArtifactRejected(
            f"the model's {side} (name, dtype, rank) are {actual}, its manifest states {stated}. "
            "Write both again with `tnm-pipeline export`"
        )


def _dtype(onnx_type: str) -> str:
    """`tensor(float)` -> `float32`; `tensor(int64)` -> `int64`."""
    return _DTYPES.get(onnx_type, onnx_type.removeprefix("tensor(").removesuffix(")"))
