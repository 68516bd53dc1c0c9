"""Functions over variables (`nn.map_variables`) around layers with packed kernels."""

import functools
import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import lift
from linen_models import FLOAT, KEY, data, densified

import slidejax as sj
from slidejax.linen import mapped

X = data(2, 16)


def doubled(tree):
    return jax.tree.map(lambda leaf: leaf * 2, tree)


def same(tree):
    return tree


def moved(tree):
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices()[0]), tree)


def called(layer, x):
    return layer(x)


class Around(nn.Module):
    """A layer inside a function over variables.

    Attributes:
      function: the function.
      lift: lifts `called`, inside the function.
      packed: whether the layer is a `SlideDense`.
      collection: what the function gets.
    """

    function: Callable
    lift: Callable = lambda called: called
    packed: bool = False
    collection: str = "params"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="free")(x)
        cls = sj.linen.SlideDense if self.packed else nn.Dense
        function = same if self.is_initializing() else self.function
        mapped = nn.map_variables(
            self.lift(called), self.collection, function, init=self.is_initializing()
        )
        return mapped(cls(8, name="layer"), x)


class OfAClass(nn.Module):
    function: Callable

    @nn.compact
    def __call__(self, x):
        function = same if self.is_initializing() else self.function
        cls = nn.map_variables(nn.Dense, "params", function, init=self.is_initializing())
        stack = nn.scan(
            nn.remat(lambda layer, x, _: (layer(x), None)),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return stack(cls(16, name="layer"), x, None)[0]


@pytest.mark.parametrize("rule", [FLOAT, "6:8"])
@pytest.mark.parametrize(
    "model",
    [
        Around(doubled),
        Around(doubled, nn.remat),
        Around(doubled, nn.jit),
        Around(lambda tree: jax.tree.map(jnp.negative, tree)),
        Around(lambda tree: {"params": jax.tree.map(jnp.flipud, tree["params"])}),
        OfAClass(doubled),
        Around(lambda tree: moved(jax.jit(doubled)(tree))),
    ],
    ids=["alone", "remat", "jit", "negative", "flipped", "scan", "moved"],
)
def test_a_function_that_changes_a_packed_kernel_is_refused(model, rule):
    variables, message = model.init(KEY, X), "layer/kernel is packed, and a function over"
    with pytest.raises(ValueError, match=message):
        sj.linen.convert(variables, rule, model, X)
    converted = sj.linen.convert(variables, rule, model.clone(function=same), X)
    with pytest.raises(ValueError, match=message):
        sj.linen.apply(model, converted, X)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda variables: sj.linen.apply(model, variables, X))(converted)


def test_a_slide_dense_in_it_is_refused_outside_of_apply():
    model = Around(doubled, packed=True)
    with pytest.raises(ValueError, match="layer/kernel is packed, and a function over"):
        model.apply(model.init(KEY, X), X)


@pytest.mark.parametrize(
    "model",
    [
        Around(same),
        Around(jax.lax.stop_gradient),
        Around(jax.lax.stop_gradient, nn.remat),
        Around(doubled, collection="batch_stats"),
        OfAClass(jax.lax.stop_gradient),
        Around(moved),  # as models do whose parameters lie in the host's memory
        Around(jax.jit(moved)),
        OfAClass(jax.lax.optimization_barrier),
    ],
    ids=[
        "same",
        "stop",
        "stop, remat",
        "other collection",
        "stop, scan",
        "moved",
        "jit",
        "barrier",
    ],
)
def test_a_function_that_changes_no_packed_kernel_runs(model):
    variables = model.init(KEY, X)
    converted = sj.linen.convert(variables, FLOAT, model, X)
    dense = densified(converted, variables)
    np.testing.assert_allclose(
        jax.jit(lambda v: sj.linen.apply(model, v, X))(converted), model.apply(dense, X), atol=1e-5
    )
    sj.linen.apply(model, converted, X)


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, nn.SpectralNorm])
def test_wrappers_of_flax_that_compute_a_packed_kernel_are_refused(wrapper):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            more = {"update_stats": False} if wrapper is nn.SpectralNorm else {}
            return wrapper(nn.Dense(8, name="layer"))(x, **more)

    variables = Model().init(KEY, X)
    packed = sj.linen.convert(variables, [("layer/kernel", FLOAT)])
    with pytest.raises(ValueError, match="layer/kernel is packed, and a function over"):
        sj.linen.apply(Model(), packed, X)


def _renamed(source):
    """A `map_variables` whose frames have other variables."""
    for name in ("variable_groups", "target"):
        source = source.replace(name, f"{name}_of_a_new_flax")
    return source


def _elsewhere(source):
    """A `map_variables` whose closure calls another one that runs the function."""
    begin, end = "  def wrapper(", "  in_vars = ("
    before, rest = source.split(begin)
    body, after = rest.split(end)
    inner = (
        f"  def inner({body}  def wrapper(*args, **kwargs):\n    return inner(*args, **kwargs)\n"
    )
    return f"{before}{inner}{end}{after}"


@pytest.mark.parametrize(
    ("change", "error"), [(_renamed, NotImplementedError), (_elsewhere, ValueError)]
)
def test_a_flax_that_maps_variables_in_another_way_is_never_silent(change, error, monkeypatch):
    names = dict(vars(lift))
    exec(change(inspect.getsource(lift.map_variables)), names)
    model, plain = Around(doubled), nn.Dense(8)

    def converted(model):
        return sj.linen.convert(model.init(KEY, X), FLOAT, model, X)

    packed, dense = converted(model.clone(function=same)), converted(plain)
    monkeypatch.setattr(lift, "map_variables", names["map_variables"])
    monkeypatch.setattr(
        mapped, "_mapping_codes", functools.cache(mapped._mapping_codes.__wrapped__)
    )
    with pytest.raises(error, match=r"flax \d|layer/kernel is packed"):
        sj.linen.apply(model, packed, X)
    sj.linen.apply(plain, dense, X)  # nothing maps its variables


def test_a_flax_without_a_frame_of_its_own_for_them_is_refused(monkeypatch):
    monkeypatch.setattr(nn, "map_variables", lambda function, *_: nn.remat(function))
    with pytest.raises(NotImplementedError, match=r"flax \d.*install flax 0\.12\.8"):
        mapped._mapping_codes.__wrapped__()
