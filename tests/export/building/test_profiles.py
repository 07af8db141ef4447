"""The sizes that a plan is built for."""

import pytest

from tnm_pipeline.engines.manifest import Ranges, TensorSpec
from tnm_pipeline.export.building.profiles import profiles_of, shapes_of
from tnm_pipeline.export.errors import BuildSettingError

IDS = TensorSpec("ids", "int64", ("batch", "sequence"))
TYPES = TensorSpec("types", "int64", ("batch", "sequence"))
IMAGE = TensorSpec("image", "float32", ("batch", 3, 8, 8))
SCALE = TensorSpec("scale", "float32", (1,))


def test_shapes_of_every_input_that_varies() -> None:
    profile = {"batch": (1, 2, 4), "sequence": (5, 6, 7)}
    assert shapes_of((IDS, TYPES, IMAGE, SCALE), profile) == {
        "ids": ((1, 5), (2, 6), (4, 7)),
        "types": ((1, 5), (2, 6), (4, 7)),
        "image": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)),
    }


def test_a_profile_is_cut_to_the_graph() -> None:
    given = {"sequence": (5, 6, 7), "batch": (1, 2, 4), "width": (8, 8, 8)}
    assert profiles_of((IDS,), [given]) == ({"batch": (1, 2, 4), "sequence": (5, 6, 7)},)


def test_a_graph_of_fixed_sizes_has_no_profile() -> None:
    assert profiles_of((SCALE,), [{"batch": (1, 2, 4)}]) == ()


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ([], r"batch, sequence may vary: give at least one profile"),
        ([{"batch": (1, 2, 4)}], r"profile 0 says nothing of sequence.*ids: \('batch', 'sequence'\)"),
        (
            [{"batch": (1, 2, 4), "sequence": (1, 1, 1)}, {"batch": (1, 2, 4), "sequense": (1, 2, 4)}],
            r"profile 1 says nothing of sequence.*'sequense'",
        ),
        ([{"batch": (4, 2, 8), "sequence": (1, 1, 1)}], r"profile 0 has 'batch' = \(4, 2, 8\).*min <= opt <= max"),
        ([{"batch": (1, 2, 1), "sequence": (1, 1, 1)}], "min <= opt <= max"),
        ([{"batch": (0, 2, 8), "sequence": (1, 1, 1)}], "1 <= min"),
        ([{"batch": (1, 2, 2**31), "sequence": (1, 1, 1)}], "max <= 2147483647"),
        ([{"batch": (1, 2), "sequence": (1, 1, 1)}], r"\(1, 2\), which must be"),
    ],
)
def test_refused(profiles: list[Ranges], message: str) -> None:
    with pytest.raises(BuildSettingError, match=message):
        profiles_of((IDS,), profiles)
