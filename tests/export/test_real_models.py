"""Networks of every build, with real weights where they have some, exported and run in every precision."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.training import zoo
from tnm_pipeline.engines import EnvironmentLacks, load, write_manifest
from tnm_pipeline.export.artifacts import onnx_manifest
from tnm_pipeline.export.onnx import export_onnx
from tnm_pipeline.export.precision import OPSET_OF, emulated, retype
from tnm_pipeline.export.signature import call, named, named_outputs
from tnm_pipeline.export.sparsity import inspect_onnx
from tnm_pipeline.export.tensorrt import build_plan
from tnm_pipeline.export.verify import Parity, Tally, check
from tnm_pipeline.training.convert.batch import attended
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx has no wheel for this platform"
)
PATTERN = Pattern.parse("2:4-T")
LAYERS = (nn.Linear, nn.Conv2d)
MODELS = ("mlp", "small_vit", "small_resnet", "minilm", "efficientnet_lite0")
PROFILE = {"batch": (1, 2, 8), "sequence": (1, 14, 64)}


class Case:
    """A model, pruned to 2:4-T, and its files: each is made once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.model, self.calls = _model(name)
        kinds = [(name, module) for name, module in self.model.named_modules() if isinstance(module, LAYERS)]
        self.layers = [name for name, module in kinds[1:-1] if module.weight.shape[1] % 4 == 0]
        with torch.no_grad():
            for layer in self.layers:
                weight = self.model.get_parameter(f"{layer}.weight")
                weight.mul_(solve(weight, PATTERN))

    def file(self, precision: str) -> Path:
        path = self.folder / f"{self.name}.{precision}.onnx"
        if path.exists():
            return path
        if precision == "fp32":
            export_onnx(self.model, self.calls, path)
        elif precision == "fp16":
            retype(self.file("fp32"), path, "fp16")
        else:
            draft = self.folder / f"{self.name}.draft.onnx"
            export_onnx(self.model, self.calls, draft, opset=OPSET_OF["bf16"])
            retype(draft, path, "bf16")
        return path

    def parity(self, precision: str) -> Parity:
        path = self.file(precision)
        content = path.read_bytes() if precision == "fp32" else emulated(path).SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        tally = Tally()
        for inputs in self.calls:
            reference = {name: tensor.numpy() for name, tensor in named_outputs(call(self.model, inputs)).items()}
            answers: Any = session.run(list(reference), {name: tensor.numpy() for name, tensor in inputs.items()})
            mask = attended(inputs)
            tally.add(reference, dict(zip(reference, answers, strict=True)), None if mask is None else mask.numpy())
        return tally.parity()


def _model(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    if name == "mlp":
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )
        return model.eval(), [named(model, torch.randn(8, 64))]
    if name == "minilm":
        model, inputs = zoo.minilm()[0], zoo.minilm_inputs(8)
        return model.eval(), [inputs, {key: tensor[:3, :9] for key, tensor in inputs.items()}]
    model = getattr(zoo, name)()
    return model, [named(model, getattr(zoo, f"{name}_inputs")(4))]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Case]:
    folder = tmp_path_factory.mktemp("models")

    class Cases(dict[str, Case]):
        def __missing__(self, name: str) -> Case:
            self[name] = Case(name, folder)
            return self[name]

    return Cases()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_precision_computes_what_torch_computes(name: str, precision: str, cases: Mapping[str, Case]) -> None:
    parity = cases[name].parity(precision)
    check(parity, precision, name)
    if precision == "fp32":
        assert parity.max_abs <= 1e-5
    # Rounding its weights to fp16 moves EfficientNet-lite0 by 2.3e-3 already, whatever computes it.
    if precision == "fp16" and name != "efficientnet_lite0":
        assert parity.relative_to_absmax <= 1.5e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_pattern_survives_every_precision(name: str, precision: str, cases: Mapping[str, Case]) -> None:
    case = cases[name]
    assert len(case.layers) >= 1
    report = inspect_onnx(case.file(precision), dict.fromkeys(case.layers, PATTERN))
    assert report.missing == ()
    assert (report.violations, report.violations_transposed) == (0, 0)
    held = [layer for layer in report.layers if layer.pattern is not None]
    assert {layer.name for layer in held} == set(case.layers)
    assert all(0 < layer.density <= 0.5 for layer in held)


@needs_rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_half_precisions_are_built(name: str, precision: str, cases: Mapping[str, Case], tmp_path: Path) -> None:
    path = cases[name].file(precision)
    report = build_plan(
        path,
        tmp_path / "model.plan",
        sparse=True,
        precision=precision,  # type: ignore[arg-type]  # parametrised over the literals
        sparsity=inspect_onnx(path).summary(),
        backend="tensorrt_rtx",
        profiles=[PROFILE],
        compute_capabilities=("8.9",),
    )
    assert report.manifest.precision == precision
    assert report.manifest.sparse_weights_flag is True


def test_a_bf16_file_says_that_it_is_not_for_this_cpu(cases: Mapping[str, Case]) -> None:
    path = cases["mlp"].file("bf16")
    write_manifest(path, onnx_manifest(path, precision="bf16", sparsity={}))
    with pytest.raises(EnvironmentLacks, match="Its CPU has no bf16: load the fp32 or fp16 file here"):
        load(path, device="cpu")
