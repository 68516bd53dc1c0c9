import jax
import pytest
from hopper_emulator import Emulated, build

from slidejax.ops.implementations.hopper import HOPPER


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The Hopper kernel compiled for the emulator, once for all workers of pytest."""
    return Emulated(build(tmp_path_factory))


@pytest.fixture
def on_hopper():
    if reason := HOPPER.available():
        pytest.skip(reason)
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("needs a Hopper GPU")
