"""Real models, exported once per test session: the first export takes seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tnm_pipeline.export.onnx import export_onnx
from tnm_pipeline.export.precision import retype


class ConvNet(nn.Module):
    """A stem with 3 channels, batch norms to fold, a grouped convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.block = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.grouped = nn.Conv2d(32, 32, 3, groups=4)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.block(self.norm(self.stem(images)).relu())
        scores: Tensor = self.head(self.grouped(features).mean((2, 3)))
        return scores


class Tokens(nn.Module):
    """Linear layers on a 3-D input, which become MatMul; the last has K = 10."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 24, bias=False)
        self.mix = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24))
        self.out = nn.Linear(10, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.mix(self.embed(tokens))
        scores: Tensor = self.out(hidden[..., :10])
        return scores


@dataclass(frozen=True)
class Exported:
    model: nn.Module
    sample: Tensor
    fp32: Path
    fp16: Path

    def torch_outputs(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        training = self.model.training
        with torch.no_grad():
            outputs: Tensor = self.model.eval()(torch.from_numpy(inputs))
        self.model.train(training)
        return outputs.numpy()


def run_onnx(path: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(["output"], {"input": inputs})
    assert isinstance(outputs, np.ndarray)
    return outputs


def hold_2_4(model: nn.Module, layer: str) -> None:
    """Zero two of every four weights along dim 1, the lazy way: always the same two."""
    weight = model.get_parameter(f"{layer}.weight")
    with torch.no_grad():
        weight[:, 2::4] = 0
        weight[:, 3::4] = 0


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, nn.Module, Tensor], Exported]:
    folder = tmp_path_factory.mktemp("exported")

    def run(name: str, model: nn.Module, sample: Tensor) -> Exported:
        fp32, fp16 = folder / f"{name}.fp32.onnx", folder / f"{name}.fp16.onnx"
        export_onnx(model, sample, fp32)
        retype(fp32, fp16, "fp16")
        return Exported(model, sample, fp32, fp16)

    return run


Export = Callable[[str, nn.Module, Tensor], Exported]


@pytest.fixture(scope="session")
def mlp(export: Export) -> Exported:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    hold_2_4(model, "0")
    return export("mlp", model, torch.zeros(1, 16))


@pytest.fixture(scope="session")
def conv_net(export: Export) -> Exported:
    generator = torch.Generator().manual_seed(1)
    model = ConvNet()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    for norm in (model.norm, model.block[1]):
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2.0, generator=generator)
    hold_2_4(model, "block.0")
    return export("conv_net", model, torch.zeros(2, 3, 8, 8))


@pytest.fixture(scope="session")
def tokens(export: Export) -> Exported:
    generator = torch.Generator().manual_seed(2)
    model = Tokens()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    hold_2_4(model, "mix.0")
    return export("tokens", model, torch.zeros(2, 5, 16))
