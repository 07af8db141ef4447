import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from tests.export.conftest import Exported, run_onnx
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.onnx import export_onnx


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
        "from tnm_pipeline.export.half import to_fp16\n"
        "from tnm_pipeline.export.onnx import export_onnx\n"
        "torch.manual_seed(0)\n"
        "model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 5))\n"
        "target = Path(sys.argv[1])\n"
        "export_onnx(model, torch.zeros(1, 3, 8, 8), target)\n"
        "to_fp16(target, target.with_suffix('.half'))\n"
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
        return x.reshape(2, 4) * 2


def test_a_batch_that_forward_pins_is_refused(tmp_path: Path) -> None:
    """torch's exporter writes a graph with batch 2 and reports success."""
    with pytest.raises(ExportRejected, match=r"FixedBatch.forward\(\) works only for a batch of 2"):
        export_onnx(FixedBatch(), torch.zeros(2, 4), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[1, 2] = float("nan")
    with pytest.raises(ExportRejected, match="NaN or infinity, first weight"):
        export_onnx(model, torch.zeros(2, 4), tmp_path / "model.onnx")
