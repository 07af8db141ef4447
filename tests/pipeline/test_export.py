"""What is exported, built and verified of models and data that are no textbook case."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.pipeline.conftest import Ended
from tnm_pipeline.engines.artifact import read_manifest
from tnm_pipeline.engines.driver import Driver, Gpu
from tnm_pipeline.engines.tensors import TensorSpec
from tnm_pipeline.pipeline import twins
from tnm_pipeline.pipeline.calls import resized
from tnm_pipeline.pipeline.config import Config
from tnm_pipeline.pipeline.run import Done
from tnm_pipeline.pipeline.summary import show

Tnm = Callable[..., Ended]
NETS = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(16, 16)
    def forward(self, left, right):
        return {"sum": self.mix(left) + right, "product": self.mix(left * right)}

class Limited(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.mix = nn.Embedding(16, 8), nn.Linear(8, 8)
    def forward(self, input_ids, attention_mask):
        places = torch.arange(input_ids.shape[1])
        return self.mix(self.positions(places) + input_ids.unsqueeze(2) * attention_mask.unsqueeze(2))

def two(): return Two()
def limited(): return Limited()
"""


@pytest.fixture
def given(tnm: Tnm, tmp_path: Path) -> Tnm:
    """`export` of a checkpoint of two(), with unlabelled data for it."""
    (tmp_path / "odd_nets.py").write_text(NETS, encoding="utf-8")
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((24, 16)).astype(np.float32) for name in ("left", "right")}
    np.savez(tmp_path / "two.npz", left=arrays["left"], right=arrays["right"])
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16)
    torch.save({f"mix.{name}": tensor for name, tensor in layer.state_dict().items()}, tmp_path / "two.pt")

    def call(*arguments: str) -> Ended:
        fixed = ("--model", "odd_nets:two", "--calibration", "two.npz", "--folder", "run", "--json")
        return tnm("export", "two.pt", *fixed, *arguments)

    return call


def test_a_bf16_plan_is_built_where_nothing_can_run_it(given: Tnm, tmp_path: Path) -> None:
    precisions = "export.precisions=['fp32', 'bf16']"
    ended = given("--trt", "--set", precisions, "--set", "trt.precision=bf16")
    assert ended.code == 0, ended.err
    plan = ended.json()["stages"]["verify"]["result"]["plan"]
    assert plan["backend"] is None
    assert "Its CPU has no bf16" in plan["fallback_reason"]
    assert read_manifest(tmp_path / "run/build/engine.plan").precision == "bf16"
    assert ended.json()["stages"]["verify"]["result"]["parity"]["bf16"]["emulated"] is True


def test_a_profile_is_asked_within_its_ranges_and_a_typo_is_named(given: Tnm) -> None:
    ended = given("--trt", "--set", "trt.profiles=[{ batch = [2, 3, 4] }]", "--set", "verify.latency_batch=4")
    assert ended.code == 0, ended.err
    refused = given("--trt", "--set", "trt.profiles=[{ bacth = [1, 1, 1] }]")
    assert refused.code == 2, refused.err
    assert "trt.profiles names 'bacth'" in refused.err
    assert "did you mean batch?" in refused.err


def test_a_file_that_asks_for_plans_is_answered(given: Tnm, tmp_path: Path) -> None:
    (tmp_path / "plans.toml").write_text("[trt]\nenabled = true\n", encoding="utf-8")
    ended = given("--config", "plans.toml", "--set", "export.precisions=['fp32']")
    assert "plans.toml has trt.enabled = true, which counts for `run`: export builds plans with --trt" in ended.err
    assert not (tmp_path / "run/build").exists()


def test_data_that_the_model_does_not_take(given: Tnm, tmp_path: Path) -> None:
    wrong = np.zeros((24, 15), np.float32)
    np.savez(tmp_path / "two.npz", left=wrong, right=wrong)
    ended = given()
    assert ended.code == 3, ended.err
    assert "Two does not take the data's inputs {'left': (24, 15), 'right': (24, 15)}" in ended.err


def test_an_encoder_at_its_position_limit_keeps_a_varying_length(tnm: Tnm, tmp_path: Path) -> None:
    (tmp_path / "odd_nets.py").write_text(NETS, encoding="utf-8")
    ids = np.random.default_rng(0).integers(0, 9, (24, 16))
    np.savez(tmp_path / "tokens.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    torch.manual_seed(0)
    state = {"positions.weight": torch.randn(16, 8), "mix.weight": torch.randn(8, 8), "mix.bias": torch.zeros(8)}
    torch.save(state, tmp_path / "limited.pt")
    given = ("--model", "odd_nets:limited", "--calibration", "tokens.npz", "--folder", "run")
    ended = tnm("export", "limited.pt", *given)
    assert ended.code == 0, ended.err
    exported = json.loads((tmp_path / "run/export/result.json").read_text(encoding="utf-8"))
    assert exported["ranges"] == {"sequence": [8, 8, 16]}


def test_plans_for_another_gpu_than_this_one_are_deployed_without_timing(
    given: Tnm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a build server: this driver is made up, and what load() says of the plans is real."""
    ended = given("--trt")
    assert ended.code == 0, ended.err
    monkeypatch.setattr(twins, "probe", lambda: Driver("13.0", (Gpu("NVIDIA H100", "9.0"),), None))
    plans = {"sparse": tmp_path / "run/build/model.fp16.plan", "dense": tmp_path / "run/build/model.fp16.dense.plan"}
    deployed = twins.deploy(Config(), plans)
    assert (deployed["twin"], deployed["key"], deployed["latency"]) == ("sparse", "not-measured", None)
    assert "needs a GPU" in deployed["why"]


@pytest.mark.parametrize(
    ("patterns", "eligible", "said"),
    [
        ({"3": "2:4-T", "6": "2:4-T"}, 2, "2:4-T"),
        ({}, 2, "promises none; 2:4 in 2 of 3 layers"),
        ({}, 0, "dense: no layer holds 2:4 or promises a pattern"),
    ],
)
def test_what_is_said_of_a_given_checkpoint(
    capsys: pytest.CaptureFixture[str], patterns: dict[str, str], eligible: int, said: str
) -> None:
    """And of latency, one interval: that of the claim."""
    sparsity = {"layers": 3, "eligible": eligible, "patterns": patterns}
    claim = {"key": "no-difference", "sentence": "the interval 0.995 to 1.084 holds 1", "remedy": ""}
    row = {"name": "sparse", "median_us": 24.0, "ratio": 1.04, "ratio_low": 1.02, "ratio_high": 1.06}
    results: dict[str, dict[str, Any]] = {
        "best": {"route": "given", "metric": "accuracy", "accuracy": 0.9},
        "export": {"files": [{"file": "model.fp32.onnx", "bytes": 10, "sparsity": sparsity}]},
        "verify": {
            "parity": {"fp32": {"max_abs": 0.0}},
            "latency": {"onnxruntime": {"batch": 8, "rows": [row], "claim": claim}},
            "plan": None,
        },
    }
    show(Config(), {name: Done(result, cached=False, seconds=1.0) for name, result in results.items()})
    out = capsys.readouterr().out
    assert f"│ given checkpoint │ {said} │ 90.00%" in " ".join(out.split())
    assert "batch 8: 24 us: the interval 0.995 to 1.084 holds 1 [no-difference]" in out


def test_calls_are_cut_and_repeated_to_fit() -> None:
    inputs = {"ids": torch.arange(12).reshape(2, 6), "scale": torch.tensor(3.0)}
    specs = (TensorSpec("ids", "int64", ("batch", "sequence")), TensorSpec("scale", "float32", ()))
    cut = resized(inputs, specs, 3, {"batch": (1, 3, 3), "sequence": (1, 2, 4)})
    assert cut["ids"].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9], [0, 1, 2, 3]]
    assert cut["scale"].shape == ()
    assert resized(inputs, specs, 1, {"sequence": (8, 8, 8)})["ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
