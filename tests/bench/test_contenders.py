import jax.numpy as jnp
import numpy as np

from slidejax.bench import contenders, run


def test_the_bounds_of_a_dense_layer_are_the_layer_without_scales():
    kernel = contenders.kernel_of(16, 64)
    x = run.inputs_of(8, 64, 1)[0]
    exact = np.asarray(x, np.float32) @ np.asarray(kernel, np.float32)
    by_name = {c.name: c for c in contenders.baselines(kernel)}
    assert {*by_name, contenders.BEST_DENSE} == set(contenders.BASELINES)
    for name, dtype in (("dense int8 unscaled", jnp.int32), ("dense fp8 unscaled", jnp.bfloat16)):
        c = by_name[name]
        acc, scale = c.apply(x, c.weights)
        assert acc.dtype == dtype and scale.shape == (8, 1)
        _, scale_w = contenders._quantise(
            kernel.T, 127 if dtype == jnp.int32 else 448, c.weights.dtype, 1
        )
        y = np.asarray(acc, np.float32) * np.asarray(scale) * np.asarray(scale_w)[:, 0]
        assert np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.05
