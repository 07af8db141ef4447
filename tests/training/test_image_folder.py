"""Class folders become bytes and classes; augmentation is what its definition says and depends on seed and epoch."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.training.labelled import write_images
from tnm_pipeline.training.image_folder import Augmentation, ImageSet
from tnm_pipeline.training.images import ImagePreparation, image_files, read_images
from tnm_pipeline.training.sources import SourceError, Splits, load_data
from tnm_pipeline.training.unlabelled import count_examples, load_calibration

EIGHT = {"size": 8, "resize": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", train=6, test=3)


def load(folder: Path, **arguments: Any) -> Splits:
    return load_data(str(folder), EIGHT | arguments)


def drawn_set(pad: int, flip: bool, count: int = 9, side: int = 4) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0)).byte()
    return ImageSet(pixels, torch.arange(count), ImagePreparation(side, side, 0, 1), Augmentation(flip, pad))


def batch(images: ImageSet, rows: list[int]) -> Tensor:
    return torch.stack([image for image, _ in images.__getitems__(rows)])


def test_images_are_read_as_for_a_conversion_and_classes_numbered(folder: Path) -> None:
    splits = load(folder)
    files = image_files(folder / "train")
    assert isinstance(splits.train, ImageSet)
    assert splits.train.tensors[0].dtype == torch.uint8
    images, targets = splits.train[:]
    assert torch.equal(images, read_images(files, ImagePreparation(8, 8)))
    assert targets.tolist() == [("left", "right").index(path.parent.name) for path in files]
    assert len(splits.test) == 6
    one, target = splits.test[4]
    assert torch.equal(one, splits.test[:][0][4])
    assert int(target) == 1


@pytest.mark.parametrize(("pad", "flip"), [(0, True), (2, False), (3, True)])
def test_augmentation_is_what_its_definition_says(pad: int, flip: bool) -> None:
    images = drawn_set(pad, flip)
    images.draw(seed=3, epoch=5)
    drawn = images.augmentation.draw(9, seed=3, epoch=5)
    rows = [7, 0, 4]
    found = batch(images, rows)
    for place, row in enumerate(rows):
        down, right, mirrored = drawn[row].tolist()
        for channel, y, x in itertools.product(range(3), range(4), range(4)):
            source_y, source_x = y + down - pad, (3 - x if mirrored else x) + right - pad
            inside = 0 <= source_y < 4 and 0 <= source_x < 4
            expected = int(images.tensors[0][row, channel, source_y, source_x]) if inside else 0
            assert float(found[place, channel, y, x]) == pytest.approx(expected / 255)


def test_every_shift_and_both_flips_come_up() -> None:
    drawn = Augmentation(flip=True, pad=2).draw(2000, seed=0, epoch=0)
    assert [sorted(set(column.tolist())) for column in drawn.unbind(1)] == [[0, 1, 2, 3, 4]] * 2 + [[0, 1]]
    assert 0.45 < float(drawn[:, 2].double().mean()) < 0.55
    assert Augmentation().draw(10, seed=0, epoch=0).count_nonzero() == 0


def test_what_an_image_looks_like_depends_on_seed_epoch_and_image_alone() -> None:
    images, other = drawn_set(3, True), drawn_set(3, True)
    images.draw(1, 2)
    other.draw(1, 2)
    whole = batch(images, list(range(9)))
    assert torch.equal(batch(other, [8, 3]), whole[[8, 3]])  # in another batch, as in another process
    for seed, epoch in ((1, 3), (2, 2)):
        other.draw(seed, epoch)
        assert not torch.equal(batch(other, list(range(9))), whole)


def test_a_loader_augments_and_indexing_does_not() -> None:
    images = drawn_set(3, True)
    images.draw(0, 1)
    inputs, targets = next(iter(DataLoader(images, batch_size=9)))
    assert torch.equal(inputs, batch(images, list(range(9))))
    assert targets.tolist() == list(range(9))
    assert torch.equal(images[:][0], images.preparation.normalise(images.tensors[0]))


def test_a_users_function_may_return_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    Path("users_images.py").write_text(
        "from tnm_pipeline.training.sources import load_data\n"
        "def images(): return load_data('.', {'size': 8, 'resize': 8, 'flip': True})\n"
    )
    splits, own = load_data("users_images:images", {}), load(folder)
    assert isinstance(splits.train, ImageSet)
    assert torch.equal(splits.train[:][0], own.train[:][0])
    batches = load_calibration("users_images:images", {}, samples=100, batch_size=12, seed=0)
    assert isinstance(batches[0], Tensor)
    torch.testing.assert_close(batches[0].sum(0), own.train[:][0].sum(0))


def test_only_training_images_are_augmented(folder: Path) -> None:
    splits = load(folder, flip=True, pad=2)
    assert isinstance(splits.train, ImageSet)
    assert isinstance(splits.test, ImageSet)
    assert splits.train.augmentation == Augmentation(flip=True, pad=2)
    assert splits.test.augmentation == Augmentation()


def test_a_conversion_is_calibrated_on_the_training_images(folder: Path) -> None:
    batches = load_calibration(str(folder), {**EIGHT, "flip": True, "pad": 2}, samples=100, batch_size=4, seed=0)
    assert count_examples(batches) == 12
    found = torch.cat([batch for batch in batches if isinstance(batch, Tensor)])
    own = load(folder).train[:][0]
    assert sorted(found.sum((1, 2, 3)).tolist()) == sorted(own.sum((1, 2, 3)).tolist())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"flip": 1}, "flip must be true or false, got 1"),
        ({"pad": -1}, "pad must be a number of pixels, 0 or more, got -1"),
        ({"pad": 1.5}, r"got 1\.5"),
        ({"mean": 127}, "mean must be"),
        ({"crop": 3}, r"does not take .*'crop'"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(folder: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError, match=said):
        load(folder, **arguments)


def test_folders_of_another_form_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"expected as train/<class>/\*.jpg and test/<class>/\*.jpg"):
        load(folder / "train")
    (folder / "test" / "up").mkdir()
    with pytest.raises(SourceError, match="test has classes that are not in train: up"):
        load(folder)
    (folder / "test" / "up").rmdir()
    (folder / "train" / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty holds no image"):
        load(folder)
    single = write_images(tmp_path / "single")
    for path in (single / "train" / "left").iterdir():
        path.unlink()
    (single / "train" / "left").rmdir()
    with pytest.raises(SourceError, match="has the one class right: there is nothing to learn"):
        load(single)


def test_a_broken_image_is_named(folder: Path) -> None:
    (folder / "test" / "left" / "0001.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"0001\.png cannot be read: .*take it out"):
        load(folder)
