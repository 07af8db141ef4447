"""Labelled images in class folders: kept in memory as bytes, augmented and normalised batch by batch.

DIR/train/<class>/*.jpg
DIR/test/<class>/*.jpg
"""

# B = images in a batch, S = images in a set, H, W = height and width in pixels

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tnm_pipeline.training.images import ImagePreparation, image_files, read_pixels
from tnm_pipeline.training.sources import SourceError, Splits, check_arguments


@dataclass(frozen=True)
class Augmentation:
    """How training images vary from epoch to epoch.

    Attributes:
        flip: left and right change places in half of them.
        pad: black pixels around an image, out of which a square of the old size is cut at random.

    Raises:
        SourceError: a value that cannot be meant.
    """

    flip: bool = False
    pad: int = 0

    def __post_init__(self) -> None:
        if type(self.flip) is not bool:
            raise SourceError(f"flip must be true or false, got {self.flip!r}")
        if type(self.pad) is not int or self.pad < 0:
            raise SourceError(f"pad must be a number of pixels, 0 or more, got {self.pad!r}")

    def draw(self, count: int, seed: int, epoch: int) -> Tensor:
        """What happens to each image in an epoch, which depends on nothing but these numbers.

        Args:
            count: S.
            seed: of the training.
            epoch: from 0.

        Returns:
            (S, 3) int64: how far down and to the right the square is cut, and whether it is flipped.
        """
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 2 + 1)
        shifts = torch.randint(2 * self.pad + 1, (count, 2), generator=generator)
        flips = torch.randint(1 + self.flip, (count, 1), generator=generator)
        return torch.cat([shifts, flips], dim=1)

    def apply(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        """Cut and flip a batch.

        Args:
            pixels: (B, 3, H, W), any dtype.
            drawn: (B, 3), the batch's rows of `draw`.

        Returns:
            (B, 3, H, W).
        """
        height, width = pixels.shape[2:]
        padded = torch.nn.functional.pad(pixels, [self.pad] * 4)
        down, right, flip = drawn.unbind(1)
        rows = down[:, None] + torch.arange(height)
        columns = torch.arange(width).expand(len(pixels), width)
        columns = right[:, None] + torch.where(flip[:, None] == 1, columns.flip(1), columns)
        images = torch.arange(len(pixels))
        picked = padded[images[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
        return picked.permute(0, 3, 1, 2).contiguous()


class ImageSet(TensorDataset):
    """Images as bytes and their classes. What is taken out is normalised; batches of a loader are augmented too.

    Args:
        pixels: (S, 3, H, W) uint8.
        targets: (S,) int64 class indices.
        preparation: how to normalise.
        augmentation: of batches; `draw` must be called before each epoch.
    """

    def __init__(
        self, pixels: Tensor, targets: Tensor, preparation: ImagePreparation, augmentation: Augmentation
    ) -> None:
        super().__init__(pixels, targets)
        self.preparation, self.augmentation = preparation, augmentation
        self.draw(seed=0, epoch=0)

    def draw(self, seed: int, epoch: int) -> None:
        """Decide how each image looks in an epoch, whichever batch and process it comes to."""
        self._drawn = self.augmentation.draw(len(self), seed, epoch)

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        """As they are, without augmentation."""
        pixels, targets = (tensor[index] for tensor in self.tensors)
        return self.preparation.normalise(pixels), targets

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """What a loader asks for to make a batch."""
        rows = torch.tensor(indices)
        pixels, targets = (tensor[rows] for tensor in self.tensors)
        images = self.preparation.normalise(self.augmentation.apply(pixels, self._drawn[rows]))
        return list(zip(images.unbind(), targets.unbind(), strict=True))


def load_image_folder(folder: Path, arguments: Mapping[str, Any]) -> Splits:
    """Read a data set for classification.

    Args:
        folder: with `train` and `test`, in each of them a folder per class.
        arguments: `size`, `resize`, `mean`, `std` of `ImagePreparation`; `flip`, `pad` of `Augmentation`.

    Returns:
        Both sets as an `ImageSet`; classes are numbered in alphabetical order.

    Raises:
        SourceError: folders or images are missing, an image cannot be read, or arguments do not fit.
        MissingPackageError: Pillow is not installed.
    """
    varying = {field.name for field in fields(Augmentation)}
    steps = {name: value for name, value in arguments.items() if name not in varying}
    check_arguments(ImagePreparation, str(folder), steps, "data")
    preparation = ImagePreparation(**steps)
    augmentation = Augmentation(**{name: value for name, value in arguments.items() if name in varying})
    classes = _classes(folder / "train")
    if len(classes) < 2:
        raise SourceError(f"{folder / 'train'} has the one class {classes[0]}: there is nothing to learn")
    if unknown := set(_classes(folder / "test")) - set(classes):
        raise SourceError(f"{folder / 'test'} has classes that are not in train: {', '.join(sorted(unknown))}")
    train = _read(folder / "train", classes, preparation, augmentation)
    return Splits(train, _read(folder / "test", classes, preparation, Augmentation()))


def _classes(folder: Path) -> list[str]:
    found = [path.name for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")]
    if not found:
        raise SourceError(
            f"{folder} holds no class folders: labelled images are expected as train/<class>/*.jpg and "
            "test/<class>/*.jpg"
        )
    return sorted(found)


def _read(folder: Path, classes: Sequence[str], preparation: ImagePreparation, augmentation: Augmentation) -> ImageSet:
    files = {name: image_files(folder / name) for name in classes if (folder / name).is_dir()}
    targets = [classes.index(name) for name, paths in files.items() for _ in paths]
    pixels = read_pixels([path for paths in files.values() for path in paths], preparation)
    return ImageSet(pixels, torch.tensor(targets), preparation, augmentation)
