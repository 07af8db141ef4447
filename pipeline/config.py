"""The configuration of a run: one TOML file, unknown keys refused, every default written down.

(TOML, because YAML reads an unquoted 2:4 as the number 124.)
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tnm_pipeline.pipeline.errors import ConfigError
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import RECIPES, Recipe

_PAIRS = (".tsv", ".csv")  # tables of sentence pairs, as in `training.sources`
Route = Literal["train", "convert", "convert-unstructured"]
SPARSE_KEYS = ("recipe", "decay", "sampled_gradient", "backend")  # of [train]: nothing to a dense training


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


Arguments = Annotated[dict[str, Any], AfterValidator(_json_able)]
Capability = Annotated[str, Field(pattern=r"^\d+\.\d$")]
PatternText = Annotated[str, AfterValidator(lambda text: str(Pattern.parse(text)))]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(_Section):
    """Where a run lives and which ways to a sparse checkpoint it tries; the most accurate one is exported."""

    folder: Path = Path("runs/default")
    routes: Annotated[tuple[Route, ...], Field(min_length=1)] = ("train", "convert", "convert-unstructured")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # numpy's generator takes no more


class SourceSection(_Section):
    """A model or data set: a built-in name, `module:function`, or what its kind can be besides."""

    source: str = ""
    args: Arguments = {}


class ModelSection(SourceSection):
    """The model, and optionally a dense checkpoint to start from instead of training one."""

    checkpoint: Path | None = None


class SparsitySection(_Section):
    """The pattern and the layers that get it: rules of `tnm_pipeline.training.selection.Selection`."""

    pattern: PatternText = "2:4-T"
    include: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    exclude: tuple[str, ...] = ()
    keep_last: bool = True


class TrainSection(_Section):
    """The training loop; see `tnm_pipeline.training.loop.FitConfig`.

    `decay` and `sampled_gradient` change the recipe, see `tnm_pipeline.training.recipes.Recipe`; `backend` how sparse
    products are computed, see `tnm_pipeline.training.backend.Packs`.
    """

    recipe: Literal["dynamic", "static", "paper", "gradual", "dense-tail", "s-ste"] = "dynamic"
    decay: Annotated[float | None, Field(ge=0)] = None
    sampled_gradient: bool = False
    backend: Literal["masked", "auto", "sparse"] = "masked"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    epochs: Annotated[int, Field(ge=1)] = 40
    batch_size: Annotated[int, Field(ge=1)] = 64
    accumulate: Annotated[int, Field(ge=1)] = 1
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

    def full_recipe(self) -> Recipe:
        """The recipe with what is changed about it.

        Raises:
            RecipeError: it does not go with the change.
        """
        recipe = replace(RECIPES[self.recipe], sampled_gradient=self.sampled_gradient)
        return recipe if self.decay is None else replace(recipe, decay=self.decay)


class ConvertSection(_Section):
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


class ExportSection(_Section):
    """ONNX export. `checkpoint` exports a given sparse checkpoint instead of the best route's."""

    checkpoint: Path | None = None
    fp16: bool = True
    opset: Annotated[int, Field(ge=18, le=22)] = 20


class TrtSection(_Section):
    """TensorRT plans: `backend` auto takes TensorRT on a machine with a GPU, TensorRT for RTX otherwise."""

    enabled: bool = True
    backend: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    precision: Literal["fp32", "fp16"] = "fp16"
    compute_capabilities: Annotated[tuple[Capability, ...], Field(min_length=1), AfterValidator(_distinct)] = (
        "8.0",
        "8.9",
        "12.0",
    )
    batch: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 8, 64)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if list(self.batch) != sorted(self.batch):
            raise ValueError(f"batch is [smallest, usual, largest]; got {list(self.batch)}")
        return self


class VerifySection(_Section):
    """Gates: accuracy lost against dense, in points; latency is measured, and gated only if asked."""

    max_drop: Annotated[float, Field(ge=0)] = 2.0
    min_speedup: Annotated[float | None, Field(gt=0)] = None
    latency_batch: Annotated[int, Field(ge=1)] = 8
    latency_rounds: Annotated[int, Field(ge=10)] = 200


class Config(_Section):
    """Everything a run depends on."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: SourceSection = SourceSection()
    sparsity: SparsitySection = SparsitySection()
    train: TrainSection = TrainSection()
    convert: ConvertSection = ConvertSection()
    calibration: CalibrationSection = CalibrationSection()
    export: ExportSection = ExportSection()
    trt: TrtSection = TrtSection()
    verify: VerifySection = VerifySection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.trt.enabled and self.trt.precision == "fp16" and not self.export.fp16:
            raise ValueError("trt.precision = fp16 needs export.fp16 = true; or set trt.precision = fp32")
        smallest, _, largest = self.trt.batch
        if self.trt.enabled and not smallest <= self.verify.latency_batch <= largest:
            raise ValueError(
                f"verify.latency_batch = {self.verify.latency_batch} is outside trt.batch {self.trt.batch}"
            )
        if "train" in self.run.routes and not self.export.checkpoint:
            self._check_recipe()
        return self

    def _check_recipe(self) -> None:
        recipe = self.train.full_recipe()
        if recipe.ends_dense:
            sparse = ", ".join(name for name, other in RECIPES.items() if not other.ends_dense)
            raise ValueError(
                f"train.recipe = {recipe.name} ends dense, and a run delivers sparse weights: choose one of {sparse}; "
                "in Python, fit() and Sparsifier take it"
            )
        recipe.check_pattern(Pattern.parse(self.sparsity.pattern))

    @property
    def labelled(self) -> bool:
        """Whether there is data to score a checkpoint on; a conversion alone does without."""
        return bool(self.data.source)

    @property
    def in_pairs(self) -> bool:
        """Whether the data are sentence pairs, which training and conversion can score and what follows cannot."""
        return self.data.source.endswith(_PAIRS)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The patterns that a conversion chooses from."""
        return self.convert.patterns or (self.sparsity.pattern,)

    def to_toml(self) -> str:
        """The resolved configuration, readable by `load_config`."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def load_config(path: Path | None, overrides: Sequence[str] = (), extra: Mapping[str, Any] | None = None) -> Config:
    """Read, override and validate.

    Args:
        path: TOML file; None for the defaults alone.
        overrides: `section.key=value`, the value in TOML syntax or a bare string; later ones win.
        extra: dotted key -> value, from command line options; wins over everything.

    Raises:
        ConfigError: missing or malformed file, unknown key, wrong type or value, with its place.
    """
    tree = _read(path) if path else {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override}: write section.key=value, for example --set convert.method=adaprune")
        _assign(tree, key.strip(), _value(text.strip()), f"--set {override}")
    for key, value in (extra or {}).items():
        if value is not None:
            _assign(tree, key, value, key)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        place = str(path) if path else "the configuration"
        raise ConfigError(f"{place}: " + "; ".join(_explain(dict(item)) for item in error.errors())) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config {path} is not valid TOML: {error}") from error


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare string: nobody wants to quote twice in a shell


def _assign(tree: dict[str, Any], dotted: str, value: Any, origin: str) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{origin}: {section} is a value, not a section")
    tree[key] = value


def _explain(item: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {place}{_closest(item['loc'])}"
    message = str(item["msg"]).removeprefix("Value error, ").replace("tuple", "list").replace("dictionary", "table")
    if isinstance(item["input"], dict):  # a rule between keys, whose message names them; the whole section is no help
        return f"{place}: {message}" if place else message
    return f"{place} = {item['input']!r}: {message}"


def _closest(location: tuple[str, ...]) -> str:
    """The known keys of the section that the unknown key stands in, and the likeliest one first."""
    from difflib import get_close_matches

    section: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type)
        section = annotation
    known = list(section.model_fields)
    close = get_close_matches(location[-1], known, n=1)
    return f": did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"
