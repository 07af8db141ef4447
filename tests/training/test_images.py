"""Images are read, resized, cropped and normalised as defined; what cannot be read is named."""

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tnm_pipeline.training.images import ImagePreparation, image_files, read_images
from tnm_pipeline.training.sources import MissingPackageError, SourceError
from tnm_pipeline.training.unlabelled import load_calibration


def written(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A lossless picture of random pixels (H, W, 3)."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize(("height", "width"), [(10, 10), (10, 17), (23, 10)])
def test_pixels_are_those_of_the_centre_normalised(tmp_path: Path, height: int, width: int) -> None:
    """Where the shorter side has its length already, every value is known from the definition."""
    pixels = written(tmp_path / "a.png", height, width)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
    tensor = read_images([tmp_path / "a.png"], ImagePreparation(8, 10, mean, std))
    assert tensor.shape == (1, 3, 8, 8)
    assert tensor.dtype == torch.float32
    top, left = round((height - 8) / 2), round((width - 8) / 2)
    for channel, y, x in itertools.product(range(3), range(8), range(8)):
        expected = (pixels[top + y, left + x, channel] / 255 - mean[channel]) / std[channel]
        assert float(tensor[0, channel, y, x]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("height", "width", "sides"), [(60, 90, (32, 48)), (50, 21, (76, 32)), (20, 20, (32, 32))])
def test_the_shorter_side_is_resized_with_antialiasing(
    tmp_path: Path, height: int, width: int, sides: tuple[int, int]
) -> None:
    pixels = torch.from_numpy(written(tmp_path / "a.png", height, width)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=sides, mode="bilinear", antialias=True, align_corners=False)
    top, left = round((sides[0] - 28) / 2), round((sides[1] - 28) / 2)
    tensor = read_images([tmp_path / "a.png"], ImagePreparation(28, mean=0, std=1))
    assert ImagePreparation(28).shorter_side == 32
    # Pillow rounds to whole grey levels after each of the two directions.
    torch.testing.assert_close(tensor * 255, resized[:, :, top : top + 28, left : left + 28], atol=1.1, rtol=0)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_picture_becomes_red_green_blue(tmp_path: Path, mode: str) -> None:
    from PIL import Image

    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    assert torch.equal(read_images([path], ImagePreparation(8, 8, 0, 1)), torch.ones(1, 3, 8, 8))


def test_the_defaults_are_those_of_imagenet() -> None:
    from PIL import Image

    preparation = ImagePreparation()
    assert (preparation.size, preparation.shorter_side) == (224, 256)
    white = preparation.apply(Image.new("RGB", (300, 280), (255, 255, 255)))
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(white, expected[:, None, None].expand(3, 224, 224))


def test_images_of_subfolders_are_found_in_order(tmp_path: Path) -> None:
    names = ["b/2.PNG", "a/1.jpg", "c.webp", "a/x/3.jpeg"]
    for name in [*names, "a/._1.jpg"]:
        written(tmp_path / name, 8, 8)
    (tmp_path / "notes.txt").write_text("no image")
    assert image_files(tmp_path) == [tmp_path / name for name in sorted(names)]


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_broken_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    written(tmp_path / "good.png", 64, 64)
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(SourceError, match=r"bad\.png cannot be read: .*take it out"):
        load_calibration(str(tmp_path), {"size": 8}, samples=2, batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"size": 2.5}, r"got 2\.5"),
        ({"size": True}, "got True"),
        ({"size": 224, "resize": 200}, "resize must be an integer of at least 224, got 200"),
        ({"mean": 127}, "mean must be .* got 127: it is on the scale of pixel / 255"),
        ({"mean": [0.5, 0.5]}, "one number or three"),
        ({"mean": "imagenet"}, "one number or three"),
        ({"mean": float("nan")}, "one number or three"),
        ({"std": 0}, "std must be"),
        ({"std": [0.2, 0.2, -0.2]}, "std must be"),
        ({"crop": 3}, r"does not take .*'crop'"),
    ],
)
def test_preparations_that_cannot_be_meant_are_refused(tmp_path: Path, arguments: dict[str, Any], cause: str) -> None:
    with pytest.raises(SourceError, match=cause):
        load_calibration(str(tmp_path), arguments, samples=2, batch_size=2, seed=0)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no image \(\.jpg, .* write hf:"):
        load_calibration(str(tmp_path), {}, samples=2, batch_size=2, seed=0)


def test_without_pillow_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "a.png", 8, 8)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)  # as if it were not installed
    with pytest.raises(MissingPackageError, match=r"pip install 'tnm-pipeline\[images\]'"):
        load_calibration(str(tmp_path), {}, samples=2, batch_size=2, seed=0)
