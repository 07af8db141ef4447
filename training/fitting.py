"""What goes into `fit` and what comes out."""

from dataclasses import dataclass, field

from torch import Tensor

from tnm_pipeline.training.backend import Backend, Choice
from tnm_pipeline.training.finalize import LayerReport
from tnm_pipeline.training.optimizers import OptimizerName
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.processes import Precision
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.tasks import Classification


class FitConfigError(ValueError):
    """A training that cannot be meant: a count below 1."""


@dataclass(frozen=True)
class FitConfig:
    """How to train.

    Attributes:
        epochs: passes over the training set, each without the samples that do not fill a last batch.
        batch_size: samples in an optimizer step, over all processes.
        accumulate: equal parts that the batch of a step is computed in, one after the other, which takes less memory
            and changes no mask; batch norm sees the parts.
        precision: of the products; weights and their updates stay as they are. fp16 needs a GPU.
        optimizer: `sgd` (Nesterov) or `adamw`.
        lr: peak learning rate of dense training; a recipe scales it.
        momentum: of SGD; of AdamW, the decay rate of the gradients' mean.
        weight_decay: on weights with two or more dimensions: L2 for SGD, decoupled for AdamW.
        warmup: fraction of the steps in which the rate rises linearly; then it falls as a cosine to zero.
        clip_norm: largest gradient norm.
        seed: of sample order, augmentation and dropout; initial weights are the model's own.
        save_every: optimizer steps between state files.

    Raises:
        FitConfigError: `epochs`, `batch_size`, `accumulate` or `save_every` is less than 1.
    """

    epochs: int = 40
    batch_size: int = 64
    accumulate: int = 1
    precision: Precision = "fp32"
    optimizer: OptimizerName = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise FitConfigError(f"{name} is {getattr(self, name)}: it is a count, so give 1 or more")


@dataclass(frozen=True)
class SparseTraining:
    """How a training becomes sparse: the arguments of a `Sparsifier`."""

    pattern: Pattern
    recipe: Recipe
    selection: Selection = field(default_factory=Selection)
    backend: Backend = "masked"


@dataclass
class History:
    """Curves of one training, JSON-able.

    Attributes:
        loss: (optimizer step, mean training loss of the epoch).
        score: (optimizer step, the task's metric on the test set) after every epoch.
        flip_rate: (optimizer step, fraction of mask entries that changed).
    """

    loss: list[tuple[int, float]] = field(default_factory=list)
    score: list[tuple[int, float]] = field(default_factory=list)
    flip_rate: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class FitResult:
    """What a training leaves; the model itself was trained in place and is plain.

    Attributes:
        metric: what the score is, as the task names it: `accuracy`, `spearman`.
        score: on the test set, zeros written.
        history: curves.
        layers: a row per prunable layer; empty when dense.
        masks: layer name -> bool mask; empty when dense.
        packs: how each sparse layer multiplied in the end, and why; empty where the backend is `masked`.
    """

    metric: str
    score: float
    history: History
    layers: list[LayerReport]
    masks: dict[str, Tensor]
    packs: list[Choice] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """The score of a classification: top-1 accuracy in [0, 1]."""
        assert self.metric == Classification.metric, f"the score is a {self.metric}"
        return self.score
