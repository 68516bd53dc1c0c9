import pytest
from hopper_emulator import Emulated, build


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The Hopper kernel compiled for the emulator, once for all workers of pytest."""
    return Emulated(build(tmp_path_factory))
