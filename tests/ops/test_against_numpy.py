"""Products against NumPy, bit for bit where the contract says so.

`SLIDEJAX_TEST_CASES` is the number of random cases, 2,000 to look closely:

    SLIDEJAX_TEST_CASES=2000 python -m pytest tests/ops/test_against_numpy.py
"""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
from numpy_linear import check, random_case

import slidejax as sj
from slidejax.ops import registry

CASES = int(os.environ.get("SLIDEJAX_TEST_CASES", "8"))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def product(x, kernel, pattern, dtype, implementation):
    w = sj.pack(kernel, pattern, dtype=dtype)
    return sj.linear(x, w, implementation=implementation, out_dtype=jnp.float32)


@pytest.mark.parametrize("first", range(0, CASES, 50))
def test_random_cases(first):
    """On this device's default, and on the reference."""
    for seed in range(first, min(first + 50, CASES)):
        case = random_case(seed)
        for implementation in (None, "reference")[: 1 + (seed % 4 == 0)]:
            y = product(case.x, case.kernel, case.pattern, case.dtype, implementation)
            check(case, y)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "cusparselt", "hopper", "decode"])
def test_random_cases_on_a_gpu(name):
    """The weights are packed on the CPU: XLA divides exactly there. Rows of x are not."""
    ran = 0
    for seed in range(CASES):
        case = random_case(seed)
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            w = sj.pack(case.kernel, case.pattern, dtype=case.dtype)
        w = jax.device_put(w, jax.devices()[0])
        if registry.get(name).form is not None:
            w = sj.prepare(w, implementation=name, tune=False)
        try:
            y = sj.linear(case.x, w, implementation=name, out_dtype=jnp.float32)
        except NotImplementedError:
            continue
        check(case, y, float8=3e-3)  # tensor cores of Hopper keep about 14 bits of such a sum
        ran += 1
    assert ran > 0
