"""`bisect`: the first layer for which a half precision is too little, and the command that keeps it in fp32."""

import json
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnm_pipeline.engines import TensorSpec
from tnm_pipeline.export.departure import Departure, NodeError, find_departure
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.pipeline.foreign import inputs_of, made_up, named_sizes
from tnm_pipeline.pipeline.tables import new_console, new_table

_SAMPLES = 4  # in a made-up batch


@dataclass(frozen=True)
class Bisection:
    """What was found.

    Attributes:
        reference: The fp32 file.
        candidate: The file that was compared with it.
        inputs: What both were given: the file that was read, or `"made up"`.
        departure: Where they part.
    """

    reference: Path
    candidate: Path
    inputs: str
    departure: Departure

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values; an overflow counts as the string `"inf"`."""
        found = asdict(self.departure)
        facts = {"reference": str(self.reference), "candidate": str(self.candidate), "inputs": self.inputs}
        finite: dict[str, Any] = _finite(facts | found | {"sentence": self.sentence(), "command": self.command()})
        return finite

    def sentence(self) -> str:
        """The answer."""
        found = self.departure
        parity = found.parity
        outputs = (
            f"the outputs differ by {parity.relative_to_absmax:.2g} of the absolute maximum, cosine {parity.cosine:.6f}"
        )
        if found.passes:
            return f"{outputs}: within the limits of {found.precision}, so no layer departs"
        if found.first is None:
            return (
                f"{outputs}: too much for {found.precision}, and no node adds more than {found.limit:g} by itself: "
                "small errors add up. Keep the worst nodes in fp32, again and again, or the whole model"
            )
        layer = f" of layer {found.first.layer}" if found.first.layer else ""
        return f"{outputs}: too much for {found.precision}. It starts at node {found.first.node!r}{layer}: " + _why(
            found.first, found
        )

    def command(self) -> str:
        """What keeps in fp32 what must be: a command where the run is known, else its option; empty if nothing must."""
        if not self.departure.keep:
            return ""
        option = f"--set export.keep_fp32={shlex.quote(json.dumps(list(self.departure.keep)))}"
        run = self._run()
        if run is None:
            return option
        plans = "--trt " if (run / "build").is_dir() else ""
        return f"tnm-pipeline export {plans}--folder {shlex.quote(str(run))} {option}"

    def _run(self) -> Path | None:
        """The folder of the run that exported the candidate."""
        given = self.candidate.parent
        folder = given if given.name == "export" else given.absolute()
        return folder.parent if folder.name == "export" and folder.with_name("config.toml").is_file() else None

    def show(self) -> None:
        """Print on stdout."""
        found = self.departure
        console = new_console()
        console.print(f"{self.candidate} ({found.precision}) against {self.reference}, inputs {self.inputs}")
        table = new_table("node", "operator", "layer", "adds", "from its inputs", "in all", "largest value")
        for error in found.worst:
            shares = (f"{share:.1e}" for share in (error.own, error.of_inputs, error.accumulated))
            table.add_row(error.node, error.op, error.layer, *shares, f"{error.largest:.3g}")
        console.print(table)
        console.print(self.sentence())
        if self.departure.keep:
            where = "by" if self._run() else "by adding to the command that exported it"
            console.print(f"{len(found.keep)} nodes need fp32; keep them there {where}, and bisect again:")
            console.print(f"  {self.command()}")
        if found.skipped:
            console.print(f"{found.skipped} nodes that hold graphs of their own were not looked into")


def bisect_files(reference: Path, candidate: Path, inputs: Path | None = None, sizes: Sequence[str] = ()) -> Bisection:
    """Find where a candidate departs from its fp32 reference.

    Args:
        reference: The fp32 ONNX file.
        candidate: The same graph in fp16 or bf16.
        inputs: An `.npz` file with one call's inputs by name; None makes them up.
        sizes: For made-up inputs `NAME=N` for each dimension that varies, the batch excepted.

    Raises:
        AccuracyGateFailed: The two have different outputs.
        ConfigError: A size is missing or unknown.
        ExportRejected: A file is not ONNX or does not run, or the inputs do not fit.
    """
    specs = inputs_of(reference)
    feeds = _made_up(reference, specs, sizes) if inputs is None else _read(inputs, specs)
    given = "made up" if inputs is None else str(inputs)
    return Bisection(reference, candidate, given, find_departure(reference, candidate, feeds))


def _made_up(path: Path, specs: Sequence[TensorSpec], sizes: Sequence[str]) -> Mapping[str, NDArray[Any]]:
    batch = specs[0].shape[0] if specs and specs[0].shape else 1
    dims = named_sizes(path, specs, sizes, defaults={batch: _SAMPLES} if isinstance(batch, str) else {})
    return made_up(specs, dims)


def _read(path: Path, specs: Sequence[TensorSpec]) -> Mapping[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ExportRejected(f"{path} is no .npz file of numbers: {error}. Write one with numpy.savez") from error
    if missing := [spec.name for spec in specs if spec.name not in arrays]:
        raise ExportRejected(
            f"{path} holds {', '.join(arrays) or 'nothing'} and not {', '.join(missing)}: give one array for each "
            "input of the model"
        )
    return {spec.name: arrays[spec.name].astype(spec.dtype) for spec in specs}


def _why(error: NodeError, found: Departure) -> str:
    if not np.isfinite(error.own):
        return f"its largest value, {error.largest:.4g}, or one that it is given, is beyond {found.precision}"
    if error.of_inputs > found.limit:
        return f"its inputs, rounded to {found.precision}, make {error.of_inputs:.2g} of its largest value"
    return f"it adds {error.own:.2g} of its largest value, and {found.limit:g} is allowed"


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
