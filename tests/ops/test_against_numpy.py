"""Products against NumPy, bit for bit where the contract says so.

`SLIDEJAX_TEST_CASES` is the number of random cases, 2,000 to look closely:

    SLIDEJAX_TEST_CASES=2000 python -m pytest tests/ops/test_against_numpy.py
    SLIDEJAX_TEST_CASES=2000 python -m pytest tests/ops/test_against_numpy.py -m gpu -n 14

The cases share a few hundred programs, so that compiling them does not take most of the time.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_linear import (
    GPU_SIZES,
    SIZES,
    Program,
    check,
    expected,
    random_case,
    random_programs,
)

import slidejax as sj
from slidejax.ops import registry
from slidejax.ops.problem import Problem, device_kind

CASES = int(os.environ.get("SLIDEJAX_TEST_CASES", "8"))
WEIGHTS, PROGRAMS = 32, 8  # shapes and dtypes of weights, and programs for each
# Those that round once, without XLA, which may fuse a multiplication and an addition.
KERNELS = ("decode", "hopper", "cusparselt")
FORMS = ("dense", "hopper", "cusparselt")


@functools.partial(jax.jit, static_argnums=(1, 2))
def packed(kernel, pattern, dtype):
    return sj.pack(kernel, pattern, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("names", "prepared", "out_dtype"))
def products(x, w, bias, residual, names, prepared, out_dtype):
    for name in FORMS if prepared else ():
        if name in names:
            w = sj.prepare(w, implementation=name)
    return {
        name: sj.linear(
            x,
            w,
            bias,
            implementation=None if name == "default" else name,
            residual=residual,
            out_dtype=jnp.dtype(out_dtype),
        )
        for name in names
    }


def runs(name, program, platform):
    """Whether an implementation runs a program here."""
    problem = Problem(
        op="linear",
        platform=platform,
        device=device_kind(platform),
        rows=program.rows,
        in_features=program.columns,
        out_features=program.outputs,
        pattern=sj.Pattern.parse(program.pattern),
        x_dtype=jnp.dtype(program.x_dtype),
        dtype=jnp.dtype(program.dtype),
        out_dtype=jnp.dtype(program.out_dtype),
        has_residual=program.adds,
    )
    return name == "default" or registry.get(name).refusal(problem) is None


def check_cases(weight, names, platform, sizes, float8):
    """Runs the cases of a weight. Returns how many products each implementation computed."""
    ran = dict.fromkeys(names, 0)
    # On a GPU the default may be cuSPARSELt.
    twice = ("cusparselt", "default") if platform == "cuda" else ()
    programs = random_programs(weight, PROGRAMS, sizes)
    for seed in range(weight, CASES, WEIGHTS):
        number = seed // WEIGHTS % PROGRAMS
        program = programs[number]
        case = random_case(seed, program)
        # Weights are packed on the CPU, where XLA divides exactly. Rows of x are not.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            w = packed(case.kernel, program.pattern, program.dtype)
        w = jax.device_put(w, jax.devices()[0])
        here = tuple(name for name in names if runs(name, program, platform))
        prepared = number % 2 == 1
        found = products(case.x, w, case.bias, case.residual, here, prepared, program.out_dtype)
        for name, y in found.items():
            try:
                check(case, y, float8, exact=name in KERNELS, twice=name in twice)
            except AssertionError as wrong:
                raise AssertionError(f"case {seed}, {name}, {program}") from wrong
            ran[name] += 1
    return ran


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [("int8", "float16"), ("float8_e4m3fn", "float32")]
)
def test_a_wrong_result_is_found(dtype, out_dtype):
    case = random_case(0, Program(3, 64, 5, "6:8", dtype, out_dtype=out_dtype, adds=True))
    right, _, terms = expected(case)
    y = right.astype(out_dtype)
    check(case, y)
    change = np.zeros_like(terms)
    change[2, 4] = terms[2, 4] * (2e-6 if dtype != "int8" else 2 * np.finfo(out_dtype).eps)
    for wrong in (y + change.astype(out_dtype), np.where(change > 0, np.nan, y).astype(out_dtype)):
        with pytest.raises(AssertionError):
            check(case, wrong)
    if dtype == "int8":
        check(case, y + np.spacing(y) * (change > 0), exact=False)


@pytest.mark.parametrize("weight", range(min(CASES, WEIGHTS)))
def test_random_cases(weight):
    """On this device's default, and on the reference."""
    platform = "cuda" if jax.default_backend() == "gpu" else "default"
    ran = check_cases(weight, ("default", "reference"), platform, SIZES, float8=1e-6)
    assert min(ran.values()) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("weight", range(min(CASES, WEIGHTS)))
def test_random_cases_on_a_gpu(weight):
    """On every implementation that runs them."""
    names = ("default", "reference", "dense", *KERNELS)
    # Tensor cores of Hopper keep about 14 bits of a sum of float8 products.
    ran = check_cases(weight, names, "cuda", GPU_SIZES, float8=3e-3)
    assert ran["reference"] > 0
