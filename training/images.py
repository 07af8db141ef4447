"""Image files as the input of an image classifier: resized, cropped in the centre, normalised."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnm_pipeline.training.sources import SourceError, require

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_AT_ONCE = 256  # images that a thread reads before it takes others


@dataclass(frozen=True)
class ImagePreparation:
    """From a picture to a tensor, with the usual steps and defaults of ImageNet classifiers.

    Attributes:
        size: side of the square that is cut out of the centre, in pixels.
        resize: length of the shorter side before that, bilinear with antialiasing; `None`: 8/7 of `size` (256 for 224).
        mean: subtracted from pixel / 255, so in 0..1; one number, or one each for red, green and blue.
        std: what the difference is divided by, on the same scale; likewise.

    Raises:
        SourceError: a value that cannot be meant, such as a mean of 127.
    """

    size: int = 224
    resize: int | None = None
    mean: float | Sequence[float] = (0.485, 0.456, 0.406)
    std: float | Sequence[float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name, side, least in (("size", self.size, 1), ("resize", self.shorter_side, self.size)):
            if type(side) is not int or side < least:
                raise SourceError(f"{name} must be an integer of at least {least}, got {side!r}")
        for name, smallest in (("mean", 0.0), ("std", 1e-6)):
            value = getattr(self, name)
            numbers = value if isinstance(value, list | tuple) else [value]
            if len(numbers) not in (1, 3) or not all(_is_number(x) and smallest <= x <= 1 for x in numbers):
                raise SourceError(
                    f"{name} must be one number or three (red, green, blue) from {smallest:g} to 1, got {value!r}: it "
                    "is on the scale of pixel / 255, so 127 is written 0.498"
                )

    @property
    def shorter_side(self) -> int:
        """Of the picture before it is cropped, in pixels."""
        return self.size * 8 // 7 if self.resize is None else self.resize

    def apply(self, picture: Any) -> Tensor:
        """Prepare one `PIL.Image`; returns (3, size, size) float32."""
        return self.normalise(self.cut(picture))

    def cut(self, picture: Any) -> Tensor:
        """The centre of one `PIL.Image`, resized; returns (3, size, size) uint8."""
        picture = picture.convert("RGB")
        width, height = picture.size
        shorter = min(width, height)
        if shorter != self.shorter_side:
            sides = (width * self.shorter_side // shorter, height * self.shorter_side // shorter)
            picture = picture.resize(sides, resample=2)  # bilinear
        left, top = (round((side - self.size) / 2) for side in picture.size)
        square = picture.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 to float32 of the same shape."""
        mean, std = (torch.tensor(value).reshape(-1, 1, 1) for value in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, sorted by path; hidden files are left out.

    Raises:
        SourceError: there is none.
    """
    files = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    if not files:
        raise SourceError(
            f"folder {folder} holds no image ({', '.join(SUFFIXES)}); for a data set of Hugging Face write hf:{folder}"
        )
    return sorted(files, key=Path.as_posix)


def read_images(files: Sequence[Path], preparation: ImagePreparation) -> Tensor:
    """Read and prepare images.

    Args:
        files: at least one.
        preparation: the steps.

    Returns:
        (B, 3, size, size) float32.

    Raises:
        SourceError: a file is no image, or cut off; the message names it.
        MissingPackageError: Pillow is not installed.
    """
    pillow = require("PIL.Image", "images", f"image {files[0]}")
    return preparation.normalise(torch.stack([_read(path, preparation, pillow) for path in files]))


def read_pixels(files: Sequence[Path], preparation: ImagePreparation) -> Tensor:
    """Read many images, in threads, and cut out their centres.

    Args:
        files: at least one.
        preparation: the steps, of which the normalisation is left out.

    Returns:
        (S, 3, size, size) uint8.

    Raises:
        SourceError: a file is no image, or cut off; the message names it.
        MissingPackageError: Pillow is not installed.
    """
    pillow = require("PIL.Image", "images", f"image {files[0]}")
    pixels = torch.empty((len(files), 3, preparation.size, preparation.size), dtype=torch.uint8)

    def read(start: int) -> None:
        some = files[start : start + _AT_ONCE]
        pixels[start : start + _AT_ONCE] = torch.stack([_read(path, preparation, pillow) for path in some])

    with ThreadPoolExecutor() as pool:  # decoders let other threads run
        list(pool.map(read, range(0, len(files), _AT_ONCE)))  # so that errors are raised here
    return pixels


def _read(path: Path, preparation: ImagePreparation, pillow: Any) -> Tensor:
    try:
        with pillow.open(path) as picture:
            return preparation.cut(picture)
    except MemoryError:
        raise
    except Exception as error:  # decoders of broken files raise much else than OSError
        raise SourceError(f"image {path} cannot be read: {error}; repair it or take it out of the folder") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
