"""Two artifacts to be timed against each other: what each is, what it may be called, and whether that is fair."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import onnx

from tnm_pipeline.engines import ArtifactRejected, EnvironmentLacks, Manifest, TensorSpec, load
from tnm_pipeline.engines.artifact import manifest_path, read_manifest, sha256_of
from tnm_pipeline.export.artifacts import read_onnx
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.reasons import Finding, finding
from tnm_pipeline.export.sparsity import SparsityReport, inspect_onnx
from tnm_pipeline.export.verdicts.comparison import compare_twins, runtime_finding
from tnm_pipeline.pipeline.errors import ConfigError
from tnm_pipeline.pipeline.foreign import ForeignSession, inputs_of
from tnm_pipeline.pipeline.source import refuse_checkpoint, source_of
from tnm_pipeline.pipeline.turns import Open
from tnm_pipeline.pipeline.twins import ENGINE

Runtime = Literal["onnxruntime", "tensorrt"]

_OF_THE_FILE = frozenset(("sparsity", "external"))  # in which the ONNX files of twins differ, as their weights do


class Rival:
    """A file to be timed.

    Args:
        path: An ONNX file, or a plan with its manifest.
        runtime: `"onnxruntime"` takes the ONNX file that a plan was built from instead.

    Attributes:
        path: The file that is timed.
        manifest: What is stated of it; None of anybody's ONNX file.

    Raises:
        ArtifactRejected: It is missing, a checkpoint, or a plan whose manifest or source is.
        ConfigError: An ONNX file is to run in TensorRT.
    """

    def __init__(self, path: Path, runtime: Runtime | None) -> None:
        if not path.is_file():
            raise ArtifactRejected(f"{path} is no file: give an .onnx file or a .plan")
        refuse_checkpoint(path)
        self.path = path
        self.manifest = _manifest(path)
        if self.backend == "onnxruntime" and runtime == "tensorrt":
            raise ConfigError(f"{path} is no plan: build one with `tnm-pipeline export --trt`, and time that")
        if self.manifest is not None and self.backend != "onnxruntime" and runtime == "onnxruntime":
            self.path = source_of(path, self.manifest)
            self.manifest = _manifest(self.path)

    @property
    def backend(self) -> str:
        """The runtime that answers."""
        return "onnxruntime" if self.manifest is None else self.manifest.backend

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a call must give."""
        return inputs_of(self.path) if self.manifest is None else self.manifest.inputs

    @cached_property
    def report(self) -> SparsityReport:
        """Every weight of an ONNX file, counted."""
        return inspect_onnx(self.path)

    @property
    def may_skip_zeros(self) -> bool:
        """Whether a plan was built with sparse tactics allowed, or an ONNX file has a layer that is eligible."""
        if self.manifest is not None and self.backend != "onnxruntime":
            return bool(self.manifest.sparse_weights_flag)
        return any(layer.eligible for layer in self.report.layers)

    @property
    def open(self) -> Open:
        """How to load it."""
        return partial(ForeignSession, self.path) if self.manifest is None else partial(_load, self.path, self.backend)


def twin_of(path: Path) -> Path | None:
    """The dense twin that `export` writes beside an artifact; None where there is none."""
    if path.name == ENGINE:
        twin = next(iter(sorted(path.parent.glob("*.dense.plan"))), path.with_suffix(".dense.plan"))
    elif path.suffix == ".plan":
        twin = path.with_suffix(".dense.plan")
    elif path.name.startswith("model."):
        twin = path.with_name(f"dense.{path.name.removeprefix('model.')}")
    else:
        return None
    return twin if twin.is_file() else None


def check_rivals(one: Rival, other: Rival) -> None:
    """Refuse what cannot be compared.

    Raises:
        ConfigError: They are one file, or run in different runtimes.
        ExportRejected: They take different inputs.
    """
    if one.path.samefile(other.path):
        raise ConfigError(f"{one.path} is given twice: give another file by --against")
    if one.backend != other.backend:
        raise ConfigError(
            f"{one.path} runs in {one.backend} and {other.path} in {other.backend}: such a difference is none of "
            "sparsity. Give two of one runtime, or time the ONNX files of plans by --runtime onnxruntime"
        )
    if one.inputs != other.inputs:
        raise ExportRejected(
            f"{one.path} takes {_show(one.inputs)}, and {other.path} {_show(other.inputs)}: give twins of one model"
        )


def names_of(one: Rival, other: Rival) -> tuple[str, str]:
    """`("sparse", "dense")` where that is known of them; else the names of the files."""
    if one.may_skip_zeros and not other.may_skip_zeros:
        return "sparse", "dense"
    if one.path.name != other.path.name:
        return one.path.name, other.path.name
    return str(one.path), str(other.path)


def caveats(one: Rival, other: Rival) -> Iterator[str]:
    """What a reader of the figures must know, one sentence each."""
    if sha256_of(one.path) == sha256_of(other.path):
        yield "the two files are the same byte for byte: whatever is measured, it is no effect of sparsity"
    if (unfair := _unfair(one, other)) is not None:
        yield f"{unfair}"
    if one.may_skip_zeros and (wrong := runtime_finding(one.backend)) is not None:
        yield f"{wrong}"


def _unfair(one: Rival, other: Rival) -> Finding | None:
    """In what more than their zeros they differ."""
    differing = []
    if one.manifest is not None and other.manifest is not None:
        if one.backend != "onnxruntime":
            return compare_twins(one.manifest, other.manifest)
        alike = {name: getattr(one.manifest, name) for name in _OF_THE_FILE}
        if (found := compare_twins(one.manifest, replace(other.manifest, **alike))) is not None:
            return found
    if _products(one) != _products(other):
        differing.append("the shapes of their weights")
    if _types(one.path) != _types(other.path):
        differing.append("the types of their weights")
    return finding("twins-differ", fields=", ".join(differing)) if differing else None


def _products(rival: Rival) -> list[tuple[str, tuple[int, ...]]]:
    return [(layer.op, layer.shape) for layer in rival.report.layers]


def _types(path: Path) -> set[str]:
    """Of matrices and larger weights: small constants come and go with the tool."""
    weights = (tensor for tensor in read_onnx(path).graph.initializer if len(tensor.dims) > 1)
    return {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in weights}


def _manifest(path: Path) -> Manifest | None:
    """What is stated of a file; a plan without a manifest is refused."""
    if path.suffix == ".onnx" and not manifest_path(path).exists():
        return None
    return read_manifest(path)


def _load(path: Path, backend: str) -> Any:
    try:
        return load(path)
    except EnvironmentLacks as error:
        if backend != "onnxruntime":
            error.add_note(
                "what can be timed here is the ONNX file that it was built from, in ONNX Runtime, which has no product "
                f"that skips zeros: `tnm-pipeline bench {path} --runtime onnxruntime`"
            )
        raise


def _show(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {'x'.join(map(str, spec.shape))}" for spec in specs)
