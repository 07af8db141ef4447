"""The configuration of a run: one TOML file, unknown keys refused, every default written down.

(TOML, because YAML reads an unquoted 2:4 as the number 124.)
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import BaseModel, ValidationError, model_validator

from tnm_pipeline.pipeline.errors import ConfigError
from tnm_pipeline.pipeline.sections import (
    CalibrationSection,
    ConvertSection,
    ExportSection,
    ModelSection,
    RunSection,
    Section,
    SourceSection,
    SparsitySection,
    TrainSection,
    TrtSection,
    VerifySection,
)
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import RECIPES


class Config(Section):
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
        if self.trt.enabled and self.trt.precision not in self.export.precisions:
            raise ValueError(
                f"trt.precision = {self.trt.precision} is not among export.precisions = "
                f"{list(self.export.precisions)}: add it, or set another trt.precision"
            )
        batches = [profile.get("batch", self.trt.batch) for profile in self.trt.profiles or ({},)]
        if self.trt.enabled and not any(low <= self.verify.latency_batch <= high for low, _, high in batches):
            ranges = ", ".join(str(list(batch)) for batch in batches)
            raise ValueError(f"verify.latency_batch = {self.verify.latency_batch} is outside trt.batch {ranges}")
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
    _override(tree, overrides)
    for key, value in (extra or {}).items():
        if value is not None:
            _assign(tree, key, value, key)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        place = str(path) if path else "the configuration"
        raise ConfigError(f"{place}: " + "; ".join(_explain(dict(item)) for item in error.errors())) from None


def stated(dotted: str, *, path: Path | None = None, overrides: Sequence[str] = ()) -> Any:
    """What a file and `--set` say of one key; None where they say nothing, or where there is no section for it.

    Raises:
        ConfigError: missing or malformed file, or an override that is no `section.key=value`.
    """
    found: Any = _read(path) if path else {}
    _override(found, overrides)
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _override(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override}: write section.key=value, for example --set convert.method=adaprune")
        _assign(tree, key.strip(), _value(text.strip()), f"--set {override}")


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
