import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.ops.problem import Problem, device_kind


def test_a_problem_says_what_is_multiplied():
    w = sj.prepare(sj.pack(jnp.ones((100, 24)), "6:8", dtype="int8"), "dense")
    x = jnp.ones((2, 3, 100), jnp.bfloat16)
    [(problem, _)] = sj.explain(
        lambda x: sj.linear(x, w, implementation="reference", out_dtype="float32"), x
    )
    platform = "cuda" if jax.default_backend() == "gpu" else "default"
    assert problem == Problem(
        op="linear",
        platform=platform,
        device=device_kind(platform),
        rows=6,
        in_features=100,
        out_features=24,
        pattern=sj.Pattern.parse("6:8"),
        x_dtype=np.dtype(jnp.bfloat16),
        dtype=np.dtype("int8"),
        out_dtype=np.dtype("float32"),
        prepared=("dense",),
        requested="reference",
    )


def test_the_problem_of_lifted_rows_has_the_weights_inputs():
    w = sj.pack(jnp.ones((100, 24)), "6:8", dtype="int8")
    lifted, scale = sj.lift_quantize(jnp.ones((5, 100)), "6:8")
    [(problem, _)] = sj.explain(lambda x, s: sj.sparse_matmul(x, s, w), lifted, scale)
    assert (problem.op, problem.rows, problem.in_features) == ("sparse_matmul", 5, 100)
    assert problem.x_dtype == np.int8


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a machine without a GPU assumes")
def test_programs_for_cuda_are_lowered_for_an_h100_on_a_machine_without_a_gpu():
    assert device_kind("default") == "cpu" and "H100" in device_kind("cuda")
