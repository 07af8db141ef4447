import re
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from tnm_pipeline.engines import FeedError, TensorSpec
from tnm_pipeline.engines.arrays import CudaArray
from tnm_pipeline.engines.feeds import Signature

SPECS = (
    TensorSpec("ids", "int64", ("batch", "tokens"), {"batch": (1, 4, 8), "tokens": (2, 4, 16)}),
    TensorSpec("image", "float32", ("batch", 3), {"batch": (1, 4, 8)}),
    TensorSpec("scale", "float32", (), {}),
)


def feeds(**changes: Any) -> dict[str, Any]:
    good = {
        "scale": np.ones((), np.float32),
        "image": np.zeros((2, 3), np.float32),
        "ids": np.zeros((2, 5), np.int64),
    }
    return {**good, **changes}


def test_good_feeds_pass_uncopied_in_the_order_of_the_manifest() -> None:
    given = feeds()
    checked = Signature(SPECS).check(given)
    assert list(checked) == ["ids", "image", "scale"]
    assert all(checked[name] is given[name] for name in given)
    assert checked["scale"].shape == ()


def test_a_view_is_made_contiguous_with_the_same_values() -> None:
    view = np.arange(6, dtype=np.float32).reshape(3, 2).T
    checked = Signature(SPECS).check(feeds(image=view))["image"]
    assert isinstance(checked, np.ndarray)
    assert checked.flags.c_contiguous
    np.testing.assert_array_equal(checked, view)


def test_missing_and_unexpected_names_come_in_one_message() -> None:
    given = feeds(img=np.zeros((2, 3), np.float32))
    del given["image"], given["ids"]
    with pytest.raises(FeedError, match=r"image: float32 \(batch, 3\)") as caught:
        Signature(SPECS).check(given)
    assert "missing inputs ['ids', 'image'], unexpected inputs ['img']" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("image", np.zeros((2, 3)), "input image is float64, the model takes float32: pass image.astype('float32')"),
        ("image", np.zeros((2, 3), ">f4"), "input image is >f4, the model takes float32"),
        ("ids", np.zeros((2, 5), np.int32), "pass ids.astype('int64')"),
        ("image", [[0.0] * 3] * 2, "input image is a list: pass numpy.asarray(image, 'float32')"),
        ("scale", np.float32(1), "input scale is a float32: pass numpy.asarray(scale, 'float32')"),
        ("image", np.zeros(3, np.float32), "has 1 dimensions (3,), the model takes 2: (batch, 3)"),
        ("image", np.zeros((2, 4), np.float32), "has size 4 on axis 1, the model takes 3"),
        ("image", np.zeros((3, 3), np.float32), "batch is 2 in input ids and 3 in input image (axis 0)"),
        ("ids", np.zeros((2, 1), np.int64), "has tokens = 1 on axis 1, and the plan was built for 2 to 16"),
        ("ids", np.zeros((9, 5), np.int64), "has batch = 9 on axis 0, and the plan was built for 1 to 8"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sides(name: str, value: object, complaint: str) -> None:
    with pytest.raises(FeedError, match=re.escape(complaint)):
        Signature(SPECS).check(feeds(**{name: value}))


def test_range_ends_are_inside() -> None:
    for batch, tokens in ((1, 2), (8, 16)):
        Signature(SPECS).check(feeds(ids=np.zeros((batch, tokens), np.int64), image=np.zeros((batch, 3), np.float32)))


def test_without_ranges_any_size_goes_but_one_name_has_one_size() -> None:
    square = (TensorSpec("x", "float32", ("n", "n"), {}),)
    Signature(square).check({"x": np.zeros((0, 0), np.float32)})
    with pytest.raises(FeedError, match="n is 2 in input x and 3 in input x"):
        Signature(square).check({"x": np.zeros((2, 3), np.float32)})


def test_arrays_of_other_libraries_are_read_where_they_are() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    checked = Signature(SPECS).check(feeds(image=tensor))["image"]
    assert isinstance(checked, np.ndarray)
    assert checked.ctypes.data == tensor.data_ptr()
    with pytest.raises(FeedError, match=r"input image is float64, the model takes float32"):
        Signature(SPECS).check(feeds(image=tensor.double()))
    with pytest.raises(FeedError, match=r"input image is a list: pass numpy\.asarray\(image, 'float32'\)"):
        Signature(SPECS).check(feeds(image=[[1.0]]))


def test_what_only_looks_like_inputs_is_refused() -> None:
    wrong: Any = [np.zeros(3)]
    with pytest.raises(FeedError, match="inputs come by name, as a dict of arrays, not as a list"):
        Signature(SPECS).check(wrong)
    masked = np.ma.MaskedArray(np.zeros((2, 3), np.float32), mask=True)
    with pytest.raises(FeedError, match=r"input image has a mask.*pass image\.filled"):
        Signature(SPECS).check(feeds(image=masked))
    assert list(Signature(SPECS).check(MappingProxyType(feeds()))) == ["ids", "image", "scale"]


def test_arrays_of_a_gpu_are_checked_by_shape_and_go_on_as_they_are() -> None:
    """Only the interface is looked at: no GPU is asked."""

    class OnGpu:
        def __init__(self, shape: tuple[int, ...]) -> None:
            data = {"data": (256, False), "typestr": "<f4", "version": 3, "strides": None, "stream": None}
            self.__cuda_array_interface__ = {"shape": shape, **data}

    checked = Signature(SPECS).check(feeds(image=OnGpu((2, 3))))["image"]
    assert isinstance(checked, CudaArray)
    assert checked.address == 256
    with pytest.raises(FeedError, match="has size 4 on axis 1, the model takes 3"):
        Signature(SPECS).check(feeds(image=OnGpu((2, 4))))
    with pytest.raises(FeedError, match="is on a GPU, where its values are not looked at"):
        Signature(SPECS, finite=True).check(feeds(image=OnGpu((2, 3))))
