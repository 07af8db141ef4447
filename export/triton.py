"""A model repository for Triton Inference Server, made from one artifact.

`<folder>/<name>/config.pbtxt` describes the model, `<folder>/<name>/<version>/` holds the artifact with its manifest.
Versions are only ever added; Triton serves the newest and ignores folders that are not whole numbers. Neither Triton
nor its client is needed to write one.
"""

import contextlib
import errno
import itertools
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tnm_pipeline.engines.artifact import verify_artifact, write_manifest
from tnm_pipeline.engines.errors import ArtifactRejected
from tnm_pipeline.engines.manifest import Manifest, TensorSpec
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.protobuf_text import EnumName, Message, Value, to_text
from tnm_pipeline.training.atomic import write_atomically

_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}  # what Triton's backends look for
_BATCH = 64  # the largest by default, where the model takes any
_UNLIMITED = 2**31 - 1  # max_batch_size is an int32
# Stricter than Triton, which takes any folder: also safe in URLs and shells.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]*")


class RepositoryError(ValueError):
    """A name or a setting that does not go with the model or with the repository."""


@dataclass(frozen=True)
class Batching:
    """How Triton may join requests; see `write_repository`.

    Attributes:
        dim: The dynamic dimension that is the batch; None where the model has none.
        largest: `max_batch_size`; 0 means that requests carry the batch themselves.
        preferred: Sizes that are worth waiting for.
        delay_us: How long to wait, microseconds.
    """

    dim: str | None
    largest: int
    preferred: tuple[int, ...]
    delay_us: int


def write_repository(
    folder: Path,
    name: str,
    artifact: Path,
    *,
    max_batch: int | None = None,
    preferred: Sequence[int] = (),
    max_delay_us: int = 0,
    instances: int = 1,
    sizes: Mapping[str, int] | None = None,
) -> Path:
    """Add an artifact to a repository as the next version of a model.

    The first version also writes `config.pbtxt`. Later ones must go with it: it is shared by all of them. An artifact
    that is the newest version already is not added twice. What fails leaves the repository as it was. Several processes
    may add at once: each gets a version of its own.

    Args:
        folder: The repository; made if it does not exist.
        name: The model's name in it.
        artifact: An ONNX file or a TensorRT plan with its manifest.
        max_batch: The largest batch that Triton may form of requests; 0 for none. By default the largest that the plan
            was built for, and 64 for an ONNX file; 0 unless dimension 0 of every input and output is one and the same
            dynamic dimension.
        preferred: Batches to form if possible; none lets Triton take what is there.
        max_delay_us: How long a request may wait for them, microseconds.
        instances: Copies of the model on each GPU, or on the CPU.
        sizes: Usual sizes of dynamic dimensions (`{"sequence": 128}`) to warm an ONNX file up with, 1 by default. Plans
            are warmed up with the usual sizes of each profile.

    Returns:
        The folder of the version.

    Raises:
        ArtifactRejected: The artifact is not what its manifest says.
        ExportRejected: It is a plan of TensorRT for RTX, which no backend of Triton loads.
        RepositoryError: The name is not one for a folder and a URL, a setting does not go with the model, or the
            repository has another `config.pbtxt` for this name.
        OSError: The repository is read-only or full.
    """
    check_name(name)
    manifest = verify_artifact(artifact)
    if manifest.backend not in _FILES:
        source = "" if manifest.source_onnx is None else f", {artifact.parent / manifest.source_onnx}"
        raise ExportRejected(
            f"{artifact} is a plan of TensorRT for RTX, and Triton has no backend for those: give the ONNX file that "
            f"it was built from{source}, or build with trt.backend = tensorrt on the server's GPU"
        )
    batching = _batching(manifest, max_batch, preferred, max_delay_us)
    if instances < 1:
        raise RepositoryError(f"instances is {instances}: a model needs 1 or more")
    config = to_text(_config(name, manifest, batching, instances, sizes or {}))
    return _add_version(folder / name, artifact, manifest, config)


def check_name(name: str) -> None:
    """Refuse what cannot be a model's name, before anything is built for it.

    Raises:
        RepositoryError: The name is not one for a folder and a URL.
    """
    if not _NAME.fullmatch(name):
        raise RepositoryError(
            f"{name!r} cannot be a model's name: take up to 128 letters, digits, '_', '-' and '.', no '.' first"
        )


def _batching(manifest: Manifest, max_batch: int | None, preferred: Sequence[int], delay_us: int) -> Batching:
    dim, limit = _batch_dimension(manifest)
    largest = (_BATCH if limit == _UNLIMITED else limit) if max_batch is None else max_batch
    if not 0 <= largest <= limit:
        reason = "its inputs and outputs share no batch of 1" if dim is None else f"the model ends at {limit}"
        raise RepositoryError(f"max_batch is {largest}, and {reason}: leave it out, or take 0 for no batching")
    if delay_us < 0 or not all(1 <= size <= largest for size in preferred):
        raise RepositoryError(
            f"preferred batches {list(preferred)} must be between 1 and max_batch = {largest}, "
            f"and max_delay_us = {delay_us} not negative"
        )
    return Batching(dim if largest else None, largest, tuple(preferred), delay_us)


def _batch_dimension(manifest: Manifest) -> tuple[str | None, int]:
    """The dynamic dimension that every input and output begins with, and its largest size.

    None and 0 where there is no such dimension, and where a plan takes no batch of 1: Triton may send a single request.
    """
    dims = {spec.shape[0] if spec.shape else None for spec in (*manifest.inputs, *manifest.outputs)}
    dim = dims.pop()
    if dims or not isinstance(dim, str):
        return None, 0
    low, _, high = manifest.inputs[0].ranges.get(dim, (1, 1, _UNLIMITED))
    return (dim, high) if low <= 1 else (None, 0)


def _config(
    name: str, manifest: Manifest, batching: Batching, instances: int, sizes: Mapping[str, int]
) -> dict[str, Value]:
    """The fields of Triton's `ModelConfig`."""
    config: dict[str, Value] = {
        "name": name,
        "backend": manifest.backend,
        "max_batch_size": batching.largest,
        "input": [_tensor(spec, batching) for spec in manifest.inputs],
        "output": [_tensor(spec, batching) for spec in manifest.outputs],
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": _instances(manifest, instances),
    }
    if batching.largest > 1:
        delay: Message = {"max_queue_delay_microseconds": batching.delay_us} if batching.delay_us else {}
        config["dynamic_batching"] = {"preferred_batch_size": batching.preferred, **delay}
    if manifest.backend == "onnxruntime":
        # Extended optimisations, as everywhere else here: those of the CPU's memory layout, which are on by default,
        # crash the process on fp16 transformers.
        config["optimization"] = {"graph": {"level": 1}}
    config["model_warmup"] = _warmups(manifest, batching, sizes)
    return config


def _tensor(spec: TensorSpec, batching: Batching) -> Message:
    dims = [-1 if isinstance(size, str) else size for size in spec.shape[batching.dim is not None :]]
    tensor: Message = {"name": spec.name, "data_type": _data_type(spec)}
    # Triton wants at least one dimension, and takes it away again before the model sees it.
    return {**tensor, "dims": dims} if dims else {**tensor, "dims": 1, "reshape": {}}


def _data_type(spec: TensorSpec) -> EnumName:
    return EnumName("TYPE_" + spec.dtype.upper().replace("FLOAT", "FP"))


def _instances(manifest: Manifest, count: int) -> Message:
    if manifest.backend == "onnxruntime":
        return {"count": count, "kind": EnumName("KIND_AUTO")}  # on GPUs if the server has any
    # A plan's first profile alone would be used, were they not listed.
    profiles = [str(index) for index in range(len(manifest.profiles))] if len(manifest.profiles) > 1 else []
    return {"count": count, "kind": EnumName("KIND_GPU"), "profile": profiles}


def _warmups(manifest: Manifest, batching: Batching, sizes: Mapping[str, int]) -> list[Message]:
    """One request of zeros for every profile of a plan, or for the smallest and the largest batch of an ONNX file."""
    spans = manifest.profiles or ({dim: span for spec in manifest.inputs for dim, span in spec.ranges.items()},)
    usual = [{**sizes, **{dim: best for dim, (_, best, _) in ranges.items()}} for ranges in spans]
    if manifest.backend == "onnxruntime" and batching.dim is not None:
        usual = [{**sizes, batching.dim: batch} for batch in sorted({1, batching.largest})]
    warmups: list[Message] = []
    for chosen in usual:
        inputs = [_zeros(spec, batching, chosen) for spec in manifest.inputs]
        batch = 1 if batching.dim is None else min(chosen[batching.dim], batching.largest)
        warmups.append({"name": f"warm-up {len(warmups)}", "batch_size": batch, "inputs": inputs})
    return warmups


def _zeros(spec: TensorSpec, batching: Batching, sizes: Mapping[str, int]) -> Message:
    inner = spec.shape[batching.dim is not None :]
    dims = [sizes.get(size, 1) if isinstance(size, str) else size for size in inner]
    return {"key": spec.name, "value": {"data_type": _data_type(spec), "dims": dims or [1], "zero_data": True}}


def _add_version(model: Path, artifact: Path, manifest: Manifest, config: str) -> Path:
    file = _FILES[manifest.backend]
    # On a server there is no source file to fall back to; the path to it would lead nowhere.
    manifest = replace(manifest, artifact=file, source_onnx=None, source_sha256=None)
    shared = model / "config.pbtxt"
    _check_config(shared, config)
    number = _newest(model)
    if number and _holds(model / str(number) / file, manifest):
        return model / str(number)
    ours = not shared.exists()
    model.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".version-", dir=model) as made:
            draft = Path(made, "draft")
            draft.mkdir()
            shutil.copyfile(artifact, draft / file)
            for external in manifest.external:
                shutil.copyfile(artifact.with_name(external.name), draft / external.name)
            write_manifest(draft / file, manifest)
            verify_artifact(draft / file)
            _check_config(shared, config)  # again: another process may have written it since
            # Before the version, so that a server that looks now does not serve it by settings of its own.
            write_atomically(shared, config.encode())
            return _move(draft, model)
    except BaseException:
        _clear(model, shared if ours else None)
        raise


def _newest(model: Path) -> int:
    """The number of the newest version; 0 if there is none."""
    names = [path.name for path in model.iterdir()] if model.is_dir() else []
    return max((int(name) for name in names if _VERSION.fullmatch(name)), default=0)


def _move(draft: Path, model: Path) -> Path:
    """Give a draft the next number, or the one after it where another process took that in the meantime."""
    while True:
        try:
            return draft.rename(model / str(_newest(model) + 1))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _clear(model: Path, config: Path | None) -> None:
    """Remove the configuration that was just written and the model's folder, unless there is anything else in it."""
    with contextlib.suppress(OSError):  # not empty: it was there before, or another process works in it
        if config is not None and [path.name for path in model.iterdir()] == [config.name]:
            config.unlink()
        model.rmdir()


def _check_config(path: Path, config: str) -> None:
    """Refuse to add a version that needs another configuration than the versions that are there."""
    if not path.exists():
        return
    present, wanted = path.read_text(encoding="utf-8").splitlines(), config.splitlines()
    if present != wanted:
        pairs = itertools.zip_longest(present, wanted, fillvalue="nothing")
        line, (old, new) = next((line, pair) for line, pair in enumerate(pairs, 1) if pair[0] != pair[1])
        raise RepositoryError(
            f"{path} is shared by all versions, and differs from what this artifact needs: line {line} is "
            f"{old.strip()!r}, it would be {new.strip()!r}. Take another name, or move that file away to have it "
            "written anew"
        )


def _holds(path: Path, manifest: Manifest) -> bool:
    try:
        return verify_artifact(path) == manifest
    except ArtifactRejected:  # damaged, or somebody else's: it stays, and the new version comes after it
        return False
