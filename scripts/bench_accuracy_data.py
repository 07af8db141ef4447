"""What `bench_accuracy.py` trains on: handwritten digits, and CIFAR-10 with its augmentation and networks.

Shape legend: B = images in a batch, S = images of a split.
"""

import io
import os
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tnm_pipeline.training.loop import FitConfig
from tnm_pipeline.training.sources import digits, digits_cnn, digits_mlp

ARCHIVE = "cifar10.tar.xz"
PADDING = 4  # pixels on each side, from which augmentation cuts the picture out again
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training pixels / 255


@dataclass(frozen=True)
class Parts:
    """Inputs and targets of a task.

    Attributes:
        train: (inputs (S, ...) float32, targets (S,) int64).
        validation: likewise, held out of the training data: learning rates are chosen on it.
        test: likewise; scored once, after the last step.
    """

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset


def digits_parts() -> Parts:
    """The built-in digits; the last fifth of the training data, other writers again, is the validation split."""
    splits = digits()
    inputs, targets = splits.train.tensors
    cut = len(inputs) * 4 // 5
    train = TensorDataset(inputs[:cut], targets[:cut])
    return Parts(train, TensorDataset(inputs[cut:], targets[cut:]), splits.test)


def cifar10_parts(folder: Path, cache: Path, train: int, validation: int) -> Parts:
    """A fixed random choice of CIFAR-10's training images, and all test images.

    Args:
        folder: holds the archive.
        cache: folder where the decoded images are kept for the next time.
        train: images to train on.
        validation: other images of the training data, to choose learning rates.

    Raises:
        FileNotFoundError: the archive is not there.
    """
    arrays = _decoded(folder / ARCHIVE, cache / "cifar10.npz")
    order = np.random.default_rng(0).permutation(len(arrays["train_images"]))
    chosen = np.split(order[: train + validation], [train])
    first, second = (_dataset(arrays["train_images"][part], arrays["train_labels"][part]) for part in chosen)
    return Parts(first, second, _dataset(arrays["test_images"], arrays["test_labels"]))


def _dataset(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return TensorDataset(pixels.sub_(mean).div_(std), torch.from_numpy(labels))


def _decoded(archive: Path, cached: Path) -> dict[str, np.ndarray]:
    """Images (S, 32, 32, 3) uint8 and labels (S,) int64 of both splits, in the order of their names."""
    if not cached.is_file():
        arrays = _decode(archive)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".npz", delete=False) as file:
            np.savez(file, allow_pickle=False, **arrays)
        Path(file.name).replace(cached)  # whole or not at all
    with np.load(cached) as arrays_on_disk:
        return dict(arrays_on_disk)


def _decode(archive: Path) -> dict[str, np.ndarray]:
    from PIL import Image

    if not archive.is_file():
        raise FileNotFoundError(f"{archive} is not there: name the folder that holds it with --data, or in TNM_DATA")
    pictures: dict[str, np.ndarray] = {}
    with tarfile.open(archive) as members:
        for member in members:
            file = members.extractfile(member)
            if file is not None and member.name.endswith(".jpg"):
                pictures[member.name.removeprefix("./")] = np.asarray(Image.open(io.BytesIO(file.read())))
    classes = sorted({name.split("/")[1] for name in pictures})
    arrays = {}
    for split in ("train", "test"):
        names = sorted(name for name in pictures if name.startswith(f"{split}/"))
        arrays[f"{split}_images"] = np.stack([pictures[name] for name in names])
        arrays[f"{split}_labels"] = np.array([classes.index(name.split("/")[1]) for name in names])
    return arrays


class FlipAndCrop(nn.Module):
    """In training mode mirrors half of the images and moves each by up to four pixels; draws from torch's generator.

    A module, so that augmentation belongs to the network that is trained and `fit` needs to know nothing of it.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> same shape, channels last in memory, which the CPU's convolutions prefer."""
        if not self.training:
            return images.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = images.shape
        down, right = torch.randint(0, 2 * PADDING + 1, (2, batch, 1)).to(images.device)
        columns = torch.arange(width, device=images.device).expand(batch, width)
        flipped = (torch.rand(batch, 1) < 0.5).to(images.device)
        columns = right + torch.where(flipped, width - 1 - columns, columns)
        rows = down + torch.arange(height, device=images.device)
        padded = F.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)
        image = torch.arange(batch, device=images.device)
        return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Residual(nn.Module):
    """Two 3x3 convolutions beside an identity, or a 1x1 convolution where the shape changes (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, 3, stride)
        self.second = convolution(outputs, outputs, 3)
        self.shortcut = nn.Identity() if inputs == outputs else convolution(inputs, outputs, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return F.relu(self.second(F.relu(self.first(images))) + self.shortcut(images))


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution and its batch norm."""
    layer = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def resnet(widths: tuple[int, ...], blocks: int, stem_stride: int) -> nn.Module:
    """A residual network for 32 x 32 images with augmentation in front; (B, 3, 32, 32) -> (B, 10).

    Args:
        widths: channels of the stages; each but the first halves the side.
        blocks: in each stage.
        stem_stride: of the first convolution.
    """
    layers: list[nn.Module] = [FlipAndCrop(), convolution(3, widths[0], 3, stem_stride), nn.ReLU()]
    inputs = widths[0]
    for stage, outputs in enumerate(widths):
        for block in range(blocks):
            layers.append(Residual(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def resnet8_thin() -> nn.Module:
    """ResNet-8 with 16, 32 and 64 channels, 78,042 parameters; its stem halves the side, to suit one CPU core."""
    return resnet((16, 32, 64), blocks=1, stem_stride=2)


def resnet18() -> nn.Module:
    """ResNet-18 as usual for CIFAR-10: 3x3 stem, no pooling; 11.2M parameters."""
    return resnet((64, 128, 256, 512), blocks=2, stem_stride=1)


@dataclass(frozen=True)
class Task:
    """Data, a network and how it is trained.

    Attributes:
        build: an untrained network; initial weights from torch's generator.
        config: seed and learning rate aside.
        rates: learning rates that a search chose for dense, for the dynamic recipe and for the paper's setting.
        images: of CIFAR-10, to train on and for validation; None: the digits.
        search_seeds: trainings for each learning rate of a search.
    """

    build: Callable[[], nn.Module]
    config: FitConfig
    rates: tuple[float, float, float]
    images: tuple[int, int] | None = None
    search_seeds: int = 2

    def parts(self, folder: Path, cache: Path, *, quick: bool) -> Parts:
        """Load the data; `folder` and `cache` as in `cifar10_parts`; `quick`: few images."""
        if self.images is None:
            return digits_parts()
        return cifar10_parts(folder, cache, *((128, 64) if quick else self.images))


TASKS = {
    "digits": Task(lambda: digits_mlp(hidden=20), FitConfig(), (0.4, 0.2, 0.8), search_seeds=10),  # narrow: masks hurt
    "digits-cnn": Task(lambda: digits_cnn(channels=8), FitConfig(), (0.1, 0.1, 0.1), search_seeds=10),
    "cifar10": Task(resnet8_thin, FitConfig(epochs=10, batch_size=128), (0.2, 0.2, 0.8), (10_000, 5_000)),  # 780 steps
}
FULL = Task(resnet18, FitConfig(epochs=60, batch_size=128), (0.1, 0.1, 0.1), (45_000, 5_000))


def default_folder() -> Path:
    """Where the archive lies unless `--data` says otherwise."""
    return Path(os.environ.get("TNM_DATA", "../shared/data"))
