"""The sparse operators on the CPU, for the tests that ask for them."""

from collections.abc import Iterator

import pytest

from tests.training.kernels.emulation import Emulation


@pytest.fixture
def emulation() -> Iterator[Emulation]:
    operators = Emulation()
    yield operators
    operators.close()
