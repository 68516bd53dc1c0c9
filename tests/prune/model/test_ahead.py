import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slidejax.prune.model.ahead import CompileAhead


@pytest.fixture(scope="module")
def compiled():
    """The names of all events of compiling so far."""
    names: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: names.append(name) if "backend_compile" in name else None
    )
    return names


def test_a_call_compiles_nothing_again(compiled):
    fn, x = jax.jit(lambda x, pair: jnp.sin(x) @ x.T + pair[0]), np.ones((5, 7), np.float32)
    with CompileAhead() as ahead:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        before = len(compiled)
        for _ in range(2):  # begun once
            ahead.begin(fn, shape, (jax.ShapeDtypeStruct((), np.float32), None))
        result = ahead.call(fn, x, (np.float32(2), None))
        assert len(compiled) == before + 1
        np.testing.assert_allclose(result, np.sin(x) @ x.T + 2, rtol=1e-5)
        other = jnp.ones((2, 7))
        before = len(compiled)
        ahead.call(fn, other, (np.float32(0), None))  # never begun
        assert len(compiled) == before + 1


@pytest.mark.parametrize(
    "settings",
    [
        lambda: jax.default_matmul_precision("highest"),
        lambda: jax.enable_x64(True),
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.debug_nans(True),
        lambda: jax.default_prng_impl("rbg"),
        lambda: jax.default_device(jax.devices()[0]),
        lambda: jax.set_mesh(jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,))),
    ],
    ids=["precision", "x64", "promotion", "nans", "prng", "device", "mesh"],
)
def test_the_settings_of_the_caller_hold(compiled, settings):
    """JAX's context managers set them in one thread alone."""

    def fn(x):
        return jnp.asarray(np.ones((7, 7))).astype(x.dtype) @ x + jax.random.normal(
            jax.random.key(1)
        )

    with settings(), CompileAhead() as ahead:
        fn, x, before = jax.jit(fn), np.ones((7, 7), np.float32), len(compiled)
        ahead.begin(fn, x)
        ahead.call(fn, x)
        assert len(compiled) == before + 1


def test_a_call_waits_for_its_program():
    class Program:
        go, there = threading.Event(), False

        def lower(self, *args):
            return self

        def compile(self):
            self.go.wait(10)
            self.there = True

        def __call__(self, x):
            return self.there

    program, x = Program(), np.ones(3)
    with CompileAhead() as ahead:
        ahead.begin(program, x)
        threading.Timer(0.1, program.go.set).start()
        assert ahead.call(program, x)


def test_the_call_says_what_is_wrong():
    fn, x = jax.jit(lambda x: x @ jnp.ones((4, 4))), np.ones((2, 3), np.float32)
    with CompileAhead() as ahead:
        ahead.begin(fn, x)
        with pytest.raises(TypeError, match="dot_general"):
            ahead.call(fn, x)
