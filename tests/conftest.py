"""Eight fake CPU devices for the sharding tests, and GPU tests that skip with a reason where there is no GPU."""

import os

# before jax starts; it changes nothing on a GPU machine but the number of its CPU devices
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("slidejax", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("slidejax")


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: jax sees only " + jax.default_backend())
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
