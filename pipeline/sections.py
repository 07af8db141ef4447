"""The sections of a configuration: their keys, defaults, and the rules between keys of one section."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from tnm_pipeline.engines.manifest import PRECISIONS
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import RECIPES, Recipe

Route = Literal["train", "convert", "convert-unstructured"]
Start = Literal["initial", "dense", "converted"]
# Of [train]: nothing to a dense training.
SPARSE_KEYS = ("recipe", "decay", "sampled_gradient", "backend", "start", "teacher", "noise", "dense")


def _json_able(arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"only strings, finite numbers, booleans, lists and tables can be stored: {error}") from None
    return arguments


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise ValueError("name each one once")
    return values


def _ordered(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    if list(sizes) != sorted(sizes):
        raise ValueError(f"write [smallest, usual, largest]; got {list(sizes)}")
    return sizes


Arguments = Annotated[dict[str, Any], AfterValidator(_json_able)]
Capability = Annotated[str, Field(pattern=r"^\d+\.\d$")]
PatternText = Annotated[str, AfterValidator(lambda text: str(Pattern.parse(text)))]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "fp16", "bf16"]
_Size = Annotated[int, Field(ge=1)]
Sizes = Annotated[tuple[_Size, _Size, _Size], AfterValidator(_ordered)]  # of a dimension of a plan


class Section(BaseModel):
    """Unknown keys are refused, values stay as they are, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(Section):
    """Where a run lives and which ways to a sparse checkpoint it tries; the most accurate one is exported."""

    folder: Path = Path("runs/default")
    routes: Annotated[tuple[Route, ...], Field(min_length=1)] = ("train", "convert", "convert-unstructured")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # numpy's generator takes no more


class SourceSection(Section):
    """A model or data set: a built-in name, `module:function`, or what its kind can be besides."""

    source: str = ""
    args: Arguments = {}


class ModelSection(SourceSection):
    """The model, and optionally a dense checkpoint to start from instead of training one."""

    checkpoint: Path | None = None


class SparsitySection(Section):
    """The pattern and the layers that get it: rules of `tnm_pipeline.training.selection.Selection`."""

    pattern: PatternText = "2:4-T"
    include: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    exclude: tuple[str, ...] = ()
    keep_last: bool = True


class DenseSection(Section):
    """What the dense baseline does in another way than the sparse training: see `TrainSection`."""

    epochs: Annotated[int | None, Field(ge=1)] = None
    batch_size: Annotated[int | None, Field(ge=1)] = None
    lr: Annotated[float | None, Field(gt=0)] = None


class TrainSection(Section):
    """The training loop; see `tnm_pipeline.training.loop.FitConfig`.

    `decay` and `sampled_gradient` change the recipe, see `tnm_pipeline.training.recipes.Recipe`; `backend` how sparse
    products are computed, see `tnm_pipeline.training.backend.Packs`. `start` says which weights come first, where that
    is not what the recipe says: the initial ones, those of the dense baseline, or those converted. `teacher` is the
    share of the dense baseline's outputs in the loss, and `noise` that of the words which are random in what both see,
    see `tnm_pipeline.training.teacher.Teacher`. `dense` is what that baseline does differently.
    """

    recipe: Literal["dynamic", "static", "paper", "gradual", "dense-tail", "s-ste"] = "dynamic"
    decay: Annotated[float | None, Field(ge=0)] = None
    sampled_gradient: bool = False
    backend: Literal["masked", "auto", "sparse"] = "masked"
    start: Start | None = None
    teacher: Share = 0.0
    noise: Share = 0.0
    dense: DenseSection = DenseSection()
    optimizer: Literal["sgd", "adamw"] = "sgd"
    epochs: Annotated[int, Field(ge=1)] = 40
    batch_size: Annotated[int, Field(ge=1)] = 64
    accumulate: Annotated[int, Field(ge=1)] = 1
    precision: Precision = "fp32"
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    save_every: Annotated[int, Field(ge=1)] = 200

    @model_validator(mode="after")
    def _a_rate_for_adamw(self) -> Self:
        if self.optimizer == "adamw" and "lr" not in self.model_fields_set:
            raise ValueError(
                "optimizer = adamw needs a learning rate of its own, such as lr = 1e-3, or 1e-4 for pretrained "
                f"weights: the default, {self.lr:g}, is for sgd"
            )
        return self

    @model_validator(mode="after")
    def _noise_for_a_teacher_alone(self) -> Self:
        if self.noise and self.teacher < 1:
            raise ValueError(
                f"noise = {self.noise:g} changes the inputs, for which the labels would be wrong: set teacher = 1 "
                f"(now {self.teacher:g}), which learns none of them, or noise = 0"
            )
        return self

    def learning(self, *, sparse: bool) -> dict[str, Any]:
        """What `FitConfig` takes, but for the seed.

        Args:
            sparse: for the sparse training, else for the dense baseline.
        """
        keys = self.model_dump(exclude=set(SPARSE_KEYS))
        return keys if sparse else keys | self.dense.model_dump(exclude_none=True)

    @property
    def starts_from(self) -> Start:
        """Whose weights a sparse training begins with."""
        return self.start or ("dense" if RECIPES[self.recipe].from_dense else "initial")

    def full_recipe(self) -> Recipe:
        """The recipe with what is changed about it.

        Raises:
            RecipeError: it does not go with the change.
        """
        recipe = replace(RECIPES[self.recipe], sampled_gradient=self.sampled_gradient)
        return recipe if self.decay is None else replace(recipe, decay=self.decay)


class ConvertSection(Section):
    """Layerwise conversion; see `tnm_pipeline.training.convert`.

    Which of `patterns` a layer gets is decided by `choose`; `confidence`, `most_error`, `max_dense` and `work` each
    belong to one way of choosing.
    """

    method: Literal["admm", "least-squares", "sparsegpt", "adaprune", "magnitude"] = "admm"
    samples: Annotated[int, Field(ge=2)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 64
    sequential: bool = True
    retune_batch_norm: bool = True
    reorder_channels: bool = True
    keep_first: bool = True
    patterns: Annotated[tuple[PatternText, ...], AfterValidator(_distinct)] = ()
    choose: Literal["pattern", "zeros", "error", "budget"] = "pattern"
    confidence: Share | None = None
    most_error: Annotated[float | None, Field(gt=0)] = None
    max_dense: Share | None = None
    work: Share | None = None
    reference: Path | None = None
    workers: Annotated[int | None, Field(ge=1)] = None
    unstructured: Fraction = 0.5

    @model_validator(mode="after")
    def _one_way_of_choosing(self) -> Self:
        for key, way in (("confidence", "zeros"), ("most_error", "error"), ("max_dense", "budget"), ("work", "budget")):
            if getattr(self, key) is not None and self.choose != way:
                raise ValueError(f"{key} belongs to choose = {way}, and choose is {self.choose}: leave one of them out")
        if self.choose == "error" and self.most_error is None:
            raise ValueError("choose = error needs most_error, the relative error that a layer may have, such as 0.25")
        if self.choose == "budget" and (self.max_dense is None) == (self.work is None):
            raise ValueError(
                "choose = budget needs either max_dense, the share of the work that may stay dense, or work, the share "
                "that may remain"
            )
        return self


class CalibrationSection(SourceSection):
    """Unlabelled inputs for the conversion; without a source, the training inputs of [data]."""

    @model_validator(mode="after")
    def _arguments_of_a_source(self) -> Self:
        if self.args and not self.source:
            raise ValueError("args belong to a source: set calibration.source too")
        return self


class ExportSection(Section):
    """ONNX export. `checkpoint` exports a given sparse checkpoint instead of the best route's.

    `keep_fp32` names nodes of the graph that stay in fp32 in a half precision.
    """

    checkpoint: Path | None = None
    precisions: Annotated[tuple[Precision, ...], AfterValidator(_distinct)] = ("fp32", "fp16")
    keep_fp32: tuple[str, ...] = ()
    opset: Annotated[int, Field(ge=18, le=22)] = 20

    @field_validator("precisions")
    @classmethod
    def _from_fp32(cls, precisions: tuple[Precision, ...]) -> tuple[Precision, ...]:
        if "fp32" not in precisions:
            raise ValueError("the other precisions are made from fp32 and compared with it: add fp32")
        return tuple(sorted(precisions, key=PRECISIONS.index))


class TrtSection(Section):
    """TensorRT plans: `backend` auto takes TensorRT on a machine with a GPU, TensorRT for RTX otherwise.

    `batch` is [smallest, usual, largest]. Other dimensions that vary go from 1 to the data's largest; a profile of
    `profiles` says otherwise, such as { batch = [1, 1, 1], sequence = [1, 16, 64] }, and a plan has as many as are
    given. `keep` says which of the plan and its dense twin becomes engine.plan. The rest: `export.tensorrt`.
    """

    enabled: bool = True
    backend: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    precision: Precision = "fp16"
    compute_capabilities: Annotated[tuple[Capability, ...], Field(min_length=1), AfterValidator(_distinct)] = (
        "8.0",
        "8.9",
        "12.0",
    )
    batch: Sizes = (1, 8, 64)
    profiles: tuple[dict[str, Sizes], ...] = ()
    keep: Literal["faster", "sparse", "dense"] = "faster"
    workspace_mib: Annotated[int | None, Field(ge=1)] = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: Literal["ampere_plus", "same_compute_capability"] | None = None
    time_limit_s: Annotated[float | None, Field(gt=0)] = 7200.0


class VerifySection(Section):
    """Gates: hundredths of the score lost against dense; latency is measured, and gated only if asked."""

    max_drop: Annotated[float, Field(ge=0)] = 2.0
    min_speedup: Annotated[float | None, Field(gt=0)] = None
    latency_batch: Annotated[int, Field(ge=1)] = 8
    latency_rounds: Annotated[int, Field(ge=10)] = 200
