import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slidejax.ops import primitive


def test_a_primitive_lowers_differently_for_each_platform():
    def shapes(x, *, columns):
        return [((x.shape[0], columns), jnp.float32)]

    def lowering(x, *, platform, columns):
        return [jnp.full((x.shape[0], columns), 2.0 if platform == "cuda" else 3.0)]

    p = primitive.make_primitive("slidejax_test", shapes, lowering)

    def run(x):
        (y,) = p.bind(x, columns=4)
        return y

    x = jnp.ones((2, 5))
    expected = 2.0 if jax.default_backend() == "gpu" else 3.0
    for y in (run(x), jax.jit(run)(x)):
        np.testing.assert_array_equal(y, np.full((2, 4), expected))
    trace = jax.jit(run).trace(x)
    assert "dense<2.0" in trace.lower(lowering_platforms=("cuda",)).as_text()
    assert "dense<3.0" in trace.lower(lowering_platforms=("cpu",)).as_text()


def test_a_map_of_rows_is_one_more_axis_and_other_maps_run_in_turn():
    seen = []

    def product(x, w):
        seen.append(x.shape)
        return x @ w

    def vmap_rule(op, axis_size, in_batched, *operands):
        return primitive.map_batched(op, axis_size, in_batched, [0], operands)

    op = primitive.with_rules(product, vmap_rule, lambda operands, dy: (dy @ operands[1].T, None))
    x, ws = jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(40.0).reshape(2, 4, 5)
    np.testing.assert_array_equal(jax.vmap(op, (0, None))(x, ws[0]), x @ ws[0])
    assert seen[-1] == (2, 3, 4)
    np.testing.assert_array_equal(jax.vmap(op)(x, ws), x @ ws)
    assert (3, 4) in seen
    gradient = jax.grad(lambda x: op(x, ws[0]).sum())(x[0])
    np.testing.assert_array_equal(gradient, jnp.ones((3, 5)) @ ws[0].T)


@pytest.mark.parametrize(
    ("x", "message"),
    [(jnp.float32(1), "got a scalar"), (jnp.ones((2, 3), jnp.int8), "must be bfloat16, float16")],
)
def test_what_is_no_input(x, message):
    with pytest.raises(ValueError, match=f"x .*{message}"):
        primitive.check_input(x)
    assert primitive.check_input(np.ones((2, 3), np.float32)).dtype == jnp.float32
