"""Configurations: everything that is valid survives being written down; everything else is named by its place."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tnm_pipeline.pipeline.config import Config, load_config
from tnm_pipeline.pipeline.errors import ConfigError
from tnm_pipeline.pipeline.sections import ConvertSection, TrainSection
from tnm_pipeline.training.fitting import FitConfig
from tnm_pipeline.training.pattern import PatternError
from tnm_pipeline.training.recipes import RECIPES

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
POSITIVE = st.integers(1, 10**6)
TREES = st.fixed_dictionaries(
    {},
    optional={
        "run": st.fixed_dictionaries(
            {},
            optional={
                "folder": TEXT.filter(lambda text: "\0" not in text),
                "routes": st.lists(
                    st.sampled_from(["train", "convert", "convert-unstructured"]), min_size=1, max_size=3
                ),
                "seed": st.integers(0, 2**32 - 1),
            },
        ),
        "model": st.fixed_dictionaries(
            {}, optional={"source": TEXT, "args": st.dictionaries(TEXT, VALUES, max_size=3)}
        ),
        "sparsity": st.fixed_dictionaries(
            {}, optional={"pattern": st.sampled_from(["2:4", "2:4-T", " 4:8 "]), "exclude": st.lists(TEXT, max_size=3)}
        ),
        "train": st.fixed_dictionaries(
            {}, optional={"epochs": POSITIVE, "lr": st.floats(0, 10, exclude_min=True), "warmup": st.floats(0, 0.99)}
        ),
        "convert": st.sampled_from(
            [
                {},
                {"choose": "zeros", "confidence": 0.9, "patterns": ["2:4-T", "4:8"]},
                {"choose": "budget", "max_dense": 0.13, "workers": 2},
                {"reference": "dense.pt", "keep_first": False},
            ]
        ),
        "calibration": st.fixed_dictionaries({"source": st.just("text.txt")}, optional={"args": st.just({"a": 1})}),
        "trt": st.fixed_dictionaries({}, optional={"batch": st.tuples(*[POSITIVE] * 3).map(sorted)}),
        "verify": st.fixed_dictionaries({}, optional={"min_speedup": st.floats(0.1, 10)}),
    },
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES)
def test_what_is_valid_survives_being_written_down(tmp_path: Path, tree: dict[str, Any]) -> None:
    smallest, _, largest = tree.get("trt", {}).get("batch", (1, 8, 64))
    tree.setdefault("verify", {})["latency_batch"] = min(max(8, smallest), largest)
    config = Config.model_validate(tree)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8", newline="")
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epoch=3", "unknown key train.epoch: did you mean epochs?"),
        ("nonsense=3", "unknown key nonsense; known here: run, model"),
        ("train=3", "train = 3"),
        ("=3", "unknown key"),
        ("train.lr.deep=1", "train.lr"),
        ("train.lr=nan", "train.lr = nan: .*finite"),
        ("train.lr=-inf", "train.lr = -inf"),
        ("train.lr=fast", "train.lr = 'fast'"),
        ("run.seed=99999999999999999999", "run.seed"),
        ("run.seed=-1", "run.seed = -1"),
        ("run.routes=convert", "run.routes = 'convert': .*list"),
        ("run.routes=[]", "run.routes = "),
        ("model.args=3", "model.args = 3: .*table"),
        ("model.args.x=nan", "model.args: only strings, finite numbers"),
        ("model.args.when=2020-01-01", "model.args: only strings.*date"),
        ("sparsity.include=[]", "sparsity.include"),
        ("trt.batch=[4, 2, 8]", r"^the configuration: trt\.batch = \[4, 2, 8\]: write \[smallest"),
        ("trt.batch=[1, 2]", "trt.batch"),
        ("trt.compute_capabilities=['banana']", "trt.compute_capabilities.0 = 'banana'"),
        ("trt.compute_capabilities=['8.0', '8.0']", "name each one once"),
        ("verify.latency_batch=65", "^the configuration: verify.latency_batch = 65 is outside"),
        ("export.opset=23", "export.opset = 23"),
        ("convert.confidence=0.9", "convert: confidence belongs to choose = zeros, and choose is pattern"),
        ("convert={choose = 'zeros', work = 0.5}", "work belongs to choose = budget, and choose is zeros"),
        ("convert.choose=error", "choose = error needs most_error"),
        ("convert.choose=budget", "choose = budget needs either max_dense"),
        ("convert={choose = 'budget', work = 0.5, max_dense = 0.1}", "choose = budget needs either max_dense"),
        ("convert.workers=0", "convert.workers = 0"),
        ("convert.patterns=['2:4', ' 2:4']", "name each one once"),
        ("calibration.args={size = 64}", "args belong to a source: set calibration.source too"),
        ("train.teacher=2", "train.teacher = 2: .*less than or equal to 1"),
        ("train.noise=0.1", r"noise = 0.1 changes the inputs, .*: set teacher = 1 \(now 0\)"),
        ("train.start=scratch", "train.start = 'scratch': .*'converted'"),
        ("train.dense.epoch=3", "unknown key train.dense.epoch: did you mean epochs?"),
        ("train.dense.lr=0", "train.dense.lr = 0"),
        ("train.recipe=magic", "train.recipe = 'magic'"),
        ("train.recipe=dense-tail", "dense-tail ends dense, .*: choose one of static, dynamic, paper, gradual, s-ste;"),
        ("train.recipe=s-ste", "s-ste is forward only.* 2:4-T asks for both directions; take the recipe dynamic, or"),
    ],
)
def test_what_is_not_valid_is_named_by_its_place(override: str, said: str) -> None:
    with pytest.raises((ConfigError, PatternError), match=said) as caught:
        load_config(None, [override])
    assert len(str(caught.value)) < 250


def test_the_dense_baseline_learns_as_the_sparse_training_but_for_what_is_said_of_it() -> None:
    given = ["train.epochs=7", "train.lr=0.5", "train.momentum=0.3", "train.dense={ epochs = 2, batch_size = 5 }"]
    train = load_config(None, given).train
    sparse, dense = train.learning(sparse=True), train.learning(sparse=False)
    assert (sparse["epochs"], sparse["batch_size"], sparse["lr"], sparse["momentum"]) == (7, 64, 0.5, 0.3)
    assert dense == sparse | {"epochs": 2, "batch_size": 5}
    assert dense.keys() == {field.name for field in fields(FitConfig)} - {"seed"}


def test_later_overrides_win_and_options_win_over_all(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nepochs = 1\nlr = 0.5\n", encoding="utf-8")
    config = load_config(path, ["train.epochs=2", "train.epochs=3", "run.seed=4"], {"run.seed": 5, "data.source": None})
    assert (config.train.epochs, config.train.lr, config.run.seed, config.data.source) == (3, 0.5, 5, "")


def test_a_value_needs_no_quotes_in_a_shell() -> None:
    assert load_config(None, ["convert.method=adaprune"]).convert.method == "adaprune"
    assert load_config(None, ["model.args.name=a=b"]).model.args == {"name": "a=b"}


def test_the_choices_are_those_of_the_conversion() -> None:
    from tnm_pipeline.training.convert import METHODS
    from tnm_pipeline.training.convert.planning import Choose

    methods, ways = (ConvertSection.model_fields[name].annotation for name in ("method", "choose"))
    assert get_args(methods) == tuple(METHODS)
    assert get_args(ways) == get_args(Choose)


def test_the_choices_are_the_recipes() -> None:
    assert set(get_args(TrainSection.model_fields["recipe"].annotation)) == set(RECIPES)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.recipe=s-ste", "sparsity.pattern=2:4"],
        ["train.recipe=s-ste", "run.routes=['convert']"],
        ["train.recipe=dense-tail", "export.checkpoint=given.safetensors"],
        ["train.recipe=gradual"],
    ],
)
def test_a_recipe_is_only_refused_where_it_would_be_used(overrides: list[str]) -> None:
    assert load_config(None, overrides).train.recipe in overrides[0]


def test_a_conversion_chooses_from_its_own_patterns_if_it_has_any() -> None:
    assert load_config(None, ["sparsity.pattern=4:8"]).candidates == ("4:8",)
    assert load_config(None, ["convert.patterns=['2:4-T', '2:4']"]).candidates == ("2:4-T", "2:4")


def test_a_recipe_is_changed_by_keys_of_its_own() -> None:
    assert Config().train.full_recipe() == RECIPES["dynamic"]
    train = TrainSection(recipe="gradual", decay=5e-4, sampled_gradient=True)
    assert train.full_recipe() == replace(RECIPES["gradual"], decay=5e-4, sampled_gradient=True)


def test_adamw_wants_a_rate_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"optimizer = adamw needs a learning rate of its own"):
        load_config(None, ["train.optimizer=adamw"])
    assert load_config(None, ["train.optimizer=adamw", "train.lr=1e-3"]).train.lr == 1e-3


def test_a_change_that_a_recipe_does_not_take_is_named() -> None:
    with pytest.raises(ConfigError, match="recipe s-ste: a soft threshold shrinks weights by itself: leave decay"):
        load_config(None, ["train.recipe=s-ste", "train.decay=0.001", "sparsity.pattern=2:4"])
