"""The layers of Linen that can hold a packed weight, and how they are found."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import slidejax as sj
from slidejax.contraction import Contraction
from slidejax.linen.known import bias_of, layer_of, own_kernel, split_input
from slidejax.rules import Skipped


def seen(module, *args):
    """`(class name, layer, module)` of each `__call__` while a module is initialised."""
    found = []

    def watch(next_fun, args, kwargs, context):
        if context.method_name == "__call__":
            found.append((type(context.module).__name__, layer_of(context), context.module))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        module.init(jax.random.key(0), *args)
    return found


class Louder(nn.Dense):
    """A subclass that calls the inherited function."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Own(nn.Dense):
    """A subclass with a function of its own."""

    def __call__(self, inputs):
        return inputs


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (nn.Dense(3), [True]),
        (nn.DenseGeneral((2, 3), axis=(-2, -1)), [True]),
        (nn.Einsum((4, 3), "...d,dh->...h"), [True]),
        (nn.LayerNorm(), [False]),
        (nn.Conv(3, (1,)), [False]),
        (Louder(3), [False, True]),
        (Own(3), [False]),
    ],
)
def test_a_layer_is_known_by_the_function_that_runs(module, known):
    assert [layer is not None for _, layer, _ in seen(module, jnp.ones((2, 5, 4)))] == known


def test_the_contraction_is_that_of_the_layer():
    x = jnp.ones((2, 5, 4))
    for module, want in (
        (nn.Dense(3), (Contraction.dense(3), (3,))),
        (nn.DenseGeneral((2, 3), axis=(1, 2)), (Contraction.general(3, (1, 2), (), 2), (2, 3))),
        (nn.Einsum((4, 3), "btd,dh->bth"), (Contraction.einsum("btd,dh->bth", 3), (3,))),
    ):
        [(_, layer, bound)] = seen(module, x)
        assert layer(bound, x) == want


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Dense(3, dot_general=lambda *a, **k: lax.dot_general(*a, **k)), "a product of its own"),
        (nn.Einsum((5, 4), "btd,td->btd"), "not a product of matrices"),
    ],
)
def test_a_layer_says_why_it_cannot_be_packed(module, reason):
    x = jnp.ones((2, 5, 4))
    [(_, layer, bound)] = seen(module, x)
    with pytest.raises(Skipped, match=reason):
        layer(bound, x)


def test_the_input_is_the_first_argument_or_has_its_name():
    assert split_input((1, 2), {"a": 3}) == (1, (2,), {"a": 3})
    assert split_input((), {"inputs": 1, "a": 3}) == (1, (), {"a": 3})


def test_kernel_and_bias_are_the_modules_own():
    x = jnp.ones((2, 8))
    for use_bias in (True, False):
        module = nn.Dense(4, use_bias=use_bias, bias_init=nn.initializers.ones)
        variables = module.init(jax.random.key(0), x)
        bound = module.bind(variables)
        np.testing.assert_array_equal(own_kernel(bound), variables["params"]["kernel"])
        bias = bias_of(bound)
        assert (bias == 1).all() if use_bias else bias is None
    assert own_kernel(nn.Dense(4)) is None and own_kernel(nn.LayerNorm().bind({})) is None
    lost = nn.Dense(4).bind({"params": {"kernel": sj.pack(jnp.ones((8, 4)), "6:8"), "bias": None}})
    with pytest.raises(ValueError, match="no parameter 'bias'"):
        bias_of(lost)
