"""What a conversion reports."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from tnm_pipeline.training.convert.plan import Plan
from tnm_pipeline.training.convert.reorder import Reordering
from tnm_pipeline.training.convert.rotation import Rotation


@dataclass(frozen=True)
class ConvertedLayer:
    """What happened to one layer. Errors are ||Y' - Y|| / ||Y - dense bias|| on the calibration data.

    Attributes:
        name: in the model.
        type: `Linear` or `Conv2d`.
        pattern: that its weight now holds.
        shape: of the weight.
        gemm_shape: (O, K) of its GEMM matrix.
        samples: rows of the GEMM that were seen.
        live_inputs: columns that were not zero throughout. Fewer samples or live inputs than K: rank-deficient.
        kept_magnitude: of the old weight by the mask, in [0, 1].
        error_masked: of the old weight masked by magnitude, bias included, inside the converted model.
        error_own: of the new weight and bias on the dense model's inputs.
        error: of the new weight and bias inside the converted model, errors of the layers before it included.
        damping: used, relative to the mean diagonal of the gram matrix; 0: none; `None`: no damping made the layer
            solvable, and its masked weights are as they were.
        iterations: of the method.
        seconds: of one worker, for the mask, the weight and the bias; calibration excluded.
        violations: of the pattern in the new weight; always 0.
        tied: other layers with the same weight, converted with it.
    """

    name: str
    type: str
    pattern: str
    shape: tuple[int, ...]
    gemm_shape: tuple[int, int]
    samples: int
    live_inputs: int
    kept_magnitude: float
    error_masked: float
    error_own: float
    error: float
    damping: float | None
    iterations: int
    seconds: float
    violations: int
    tied: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "ConvertedLayer":
        """Undo `to_dict`, also after JSON made lists of the tuples."""
        lists = {name: tuple(value) for name, value in record.items() if isinstance(value, list)}
        return cls(**{**record, **lists})


@dataclass(frozen=True, eq=False)
class Conversion:
    """What `convert` did to a model.

    Attributes:
        layers: in the order of execution, which is the order of conversion.
        masks: layer name -> bool, shape of the weight, `True` = kept; also under the names of tied layers.
        plan: what was to be done: the layers chosen, and why the others were not.
        batch_norms: how many were re-tuned.
        reorderings: of channels and bases of heads, done before; `reorder(dense model, reorderings)` makes the two
            comparable layer by layer.
    """

    layers: list[ConvertedLayer]
    masks: dict[str, Tensor]
    plan: Plan
    batch_norms: int
    reorderings: tuple[Reordering | Rotation, ...] = ()

    @property
    def mean_error(self) -> float:
        """Mean over layers of the error inside the converted model, on the calibration data."""
        return sum(layer.error for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, object]:
        """For JSON; masks are left out: they are the non-zeros of the weights."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": {layer.name: layer.reason for layer in self.plan.skipped},
            "mean_error": self.mean_error,
            "batch_norms": self.batch_norms,
            "reorderings": [one.to_dict() for one in self.reorderings],
        }
