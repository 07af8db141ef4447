import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from tests.export.conftest import Exported, run_onnx
from tnm_pipeline.engines import ArtifactRejected, load, write_manifest
from tnm_pipeline.export.artifacts import onnx_manifest
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.onnx import export_onnx
from tnm_pipeline.export.sparsity import inspect_onnx


@pytest.mark.parametrize("name", ["mlp", "conv_net", "tokens"])
@pytest.mark.parametrize("batch", [1, 7])
def test_onnx_runtime_computes_what_torch_computes(name: str, batch: int, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    inputs = np.random.default_rng(3).standard_normal((batch, *exported.sample.shape[1:]), np.float32)
    outputs = run_onnx(exported.fp32, inputs)
    np.testing.assert_allclose(outputs, exported.torch_outputs(inputs), rtol=1e-5, atol=1e-5)


def test_initializers_carry_parameter_names(tokens: Exported, conv_net: Exported) -> None:
    initializers = {t.name: numpy_helper.to_array(t) for t in onnx.load(tokens.fp32).graph.initializer}
    state = tokens.model.state_dict()
    for name in ("embed.weight", "mix.0.weight", "mix.2.weight", "out.weight"):
        np.testing.assert_array_equal(initializers[name], state[name].numpy().T)  # MatMul reads (I, O)
    names = {t.name for t in onnx.load(conv_net.fp32).graph.initializer}
    assert {"stem.weight", "block.0.weight", "grouped.weight", "head.weight"} <= names


def test_batch_norm_is_folded(conv_net: Exported) -> None:
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(conv_net.fp32).graph.node}


def test_file_names_no_machine_path(conv_net: Exported) -> None:
    content = conv_net.fp32.read_bytes()
    assert str(Path(torch.__file__).parents[1]).encode() not in content
    assert str(Path(__file__).parent).encode() not in content
    assert b"name_scopes" in content


def test_second_export_has_the_same_bytes(mlp: Exported, tmp_path: Path) -> None:
    export_onnx(mlp.model, mlp.sample, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == mlp.fp32.read_bytes()


@pytest.mark.slow
def test_hash_seed_does_not_change_the_bytes(tmp_path: Path) -> None:
    script = tmp_path / "export_once.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from torch import nn\n"
        "from tnm_pipeline.export.onnx import export_onnx\n"
        "from tnm_pipeline.export.precision import retype\n"
        "torch.manual_seed(0)\n"
        "model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 5))\n"
        "target = Path(sys.argv[1])\n"
        "export_onnx(model, torch.zeros(1, 3, 8, 8), target)\n"
        "retype(target, target.with_suffix('.half'), 'fp16')\n"
    )
    digests = set()
    for seed in ("1", "2"):
        target = tmp_path / f"{seed}.onnx"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, script, target], env=environment, check=True)
        digests.add(tuple(hashlib.sha256(p.read_bytes()).hexdigest() for p in (target, target.with_suffix(".half"))))
    assert len(digests) == 1


def test_exporter_is_quiet_and_flags_are_restored(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    model[1].eval()
    with caplog.at_level(logging.WARNING):
        export_onnx(model, torch.zeros(1, 4), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert [module.training for module in model.modules()] == [True, True, False]


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 4) * 2  # pinned here


class FixedLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.ones(6, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.positions  # pinned here


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(1).expand(len(x), -1) + x  # counted here


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # decided here
            return x
        return -x


def _line(marker: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, start=1) if line.endswith(marker))


def test_a_batch_that_forward_pins_is_refused(tmp_path: Path) -> None:
    """torch's exporter writes a graph with batch 2 and reports success."""
    where = rf"test_onnx\.py:{_line('* 2  # pinned here')}, in forward"
    with pytest.raises(ExportRejected, match=rf"(?s)FixedBatch\.forward\(\) works only for batch = 2.*{where}"):
        export_onnx(FixedBatch(), torch.zeros(2, 4), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_length_that_forward_pins_is_refused(tmp_path: Path) -> None:
    samples = [torch.zeros(2, 6, 4), torch.zeros(2, 1, 4)]
    where = rf"test_onnx\.py:{_line('positions  # pinned here')}, in forward"
    with pytest.raises(ExportRejected, match=rf"(?s)FixedLength.*one more of sequence at .*{where}"):
        export_onnx(FixedLength(), samples, tmp_path / "model.onnx")


def test_a_batch_that_is_counted_is_refused_with_its_line(tmp_path: Path) -> None:
    """len(x) works for any batch in torch, and is a constant to its exporter."""
    where = rf"It calls len\(\) at .*test_onnx\.py:{_line('# counted here')}, in forward: write x\.shape\[0\]"
    with pytest.raises(ExportRejected, match=rf"works only for batch = 2.*{where}"):
        export_onnx(Counting(), torch.zeros(2, 4), tmp_path / "model.onnx")


def test_control_flow_that_depends_on_values_is_refused_with_its_line(tmp_path: Path) -> None:
    where = rf"test_onnx\.py:{_line('# decided here')}, in forward"
    with pytest.raises(ExportRejected, match=rf"(?s)torch cannot export Deciding.*{where}.*depends on values"):
        export_onnx(Deciding(), torch.zeros(2, 4), tmp_path / "model.onnx")


def test_a_model_that_fails_on_its_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportRejected, match=r"Linear\.forward\(\) fails on the sample \{'input': \(2, 5\)\}"):
        export_onnx(nn.Linear(4, 4), torch.zeros(2, 5), tmp_path / "model.onnx")


class Encoder(nn.Module):
    """Two inputs of one varying length, two outputs, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.mix(self.embed(ids)).relu() * mask.unsqueeze(-1)
        return {"hidden": hidden, "logits": self.head(hidden.sum(1))}


def test_several_inputs_outputs_and_varying_dimensions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    samples = [{"ids": torch.randint(32, (3, n)), "mask": torch.rand(3, n)} for n in (4, 9)]
    signature = export_onnx(model, samples, tmp_path / "model.onnx")
    assert signature.ranges == {"sequence": (4, 4, 9)}
    graph = onnx.load(tmp_path / "model.onnx").graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "ids": ["batch", "sequence"],
        "mask": ["batch", "sequence"],
        "hidden": ["batch", "sequence", 16],
        "logits": ["batch", 32],
    }
    other = {"ids": torch.randint(32, (5, 13)), "mask": torch.rand(5, 13)}  # sizes that were in no sample
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    answers = session.run(["hidden", "logits"], {name: tensor.numpy() for name, tensor in other.items()})
    with torch.no_grad():
        expected = model(**other)
    for answer, name in zip(answers, ("hidden", "logits"), strict=True):
        np.testing.assert_allclose(np.asarray(answer), expected[name].numpy(), atol=1e-5)


def test_weights_beside_the_file(mlp: Exported, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(mlp.model, mlp.sample, path, external_above=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx.data").stat().st_size >= 4 * 16 * 32
    inputs = np.random.default_rng(5).standard_normal((4, 16), np.float32)
    np.testing.assert_array_equal(run_onnx(path, inputs), run_onnx(mlp.fp32, inputs))
    assert inspect_onnx(path).summary() == inspect_onnx(mlp.fp32).summary()
    write_manifest(path, onnx_manifest(path, precision="fp32", sparsity={}))
    with load(path) as session:
        np.testing.assert_array_equal(session.run({"input": inputs})["output"], run_onnx(mlp.fp32, inputs))
    (tmp_path / "model.onnx.data").write_bytes(bytes((tmp_path / "model.onnx.data").stat().st_size))
    with pytest.raises(ArtifactRejected, match=r"model\.onnx\.data has sha256"):
        load(path)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ArtifactRejected, match=r"model\.onnx\.data is missing, and model\.onnx keeps weights in it"):
        load(path)
    export_onnx(mlp.model, mlp.sample, path)  # which fits inside again
    assert not (tmp_path / "model.onnx.data").exists()


@pytest.mark.slow
def test_a_model_beyond_protobufs_limit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 2**15, bias=False), nn.Linear(2**15, 17 * 2**10, bias=False))
    assert sum(parameter.nbytes for parameter in model.parameters()) > 2**31
    path = tmp_path / "model.onnx"
    export_onnx(model, torch.zeros(2, 16), path)
    inputs = np.random.default_rng(6).standard_normal((2, 16), np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(run_onnx(path, inputs), model(torch.from_numpy(inputs)).numpy(), atol=1e-5)
    assert [layer.gemm_shape for layer in inspect_onnx(path).layers] == [(2**15, 16), (17 * 2**10, 2**15)]


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


class Difference(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left - right


class OpenDifference(nn.Module):
    def forward(self, left: Tensor, **others: Tensor) -> Tensor:
        return left - others["right"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 4)).half(), r"tensor '1\.weight' is torch\.float16"),
        (
            nn.Linear(4, 4).bfloat16(),
            r"tensor 'weight' is torch\.bfloat16, and .* float32: call model\.float\(\) first",
        ),
        (Halved(), r"output 'output' is torch\.bfloat16"),
    ],
)
def test_half_precision_is_made_by_the_export_alone(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportRejected, match=message):
        export_onnx(model, torch.zeros(2, 4), tmp_path / "model.fp32.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [Difference(), OpenDifference()])
def test_names_decide_what_is_which_input(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    sample = {"right": torch.ones(2, 4), "left": torch.full((2, 4), 3.0)}
    export_onnx(model, [sample], path)
    assert "forward" not in vars(model)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {name: tensor.numpy() for name, tensor in sample.items()})
    np.testing.assert_array_equal(np.asarray(answer), np.full((2, 4), 2, np.float32))


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[1, 2] = float("nan")
    with pytest.raises(ExportRejected, match="NaN or infinity, first weight"):
        export_onnx(model, torch.zeros(2, 4), tmp_path / "model.onnx")
