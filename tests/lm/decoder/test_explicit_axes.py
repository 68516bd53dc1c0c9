"""Decoders under `jax.set_mesh` and on meshes with explicit axes, as `jax.make_mesh` makes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import slidejax as sj
from slidejax.lm import serving
from slidejax.lm.decoder import apply, init_cache
from slidejax.lm.decoder.apply import outputs
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.evaluate import evaluate
from slidejax.weights.packed import SlideWeight

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")

IDS = np.random.default_rng(0).integers(0, 64, (4, 8)).astype(np.int32)


def model_of(**changes):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_heads": 4, "num_kv_heads": 2}
    sizes |= {"num_layers": 1}
    return tiny(**sizes, **changes)


def mesh_of(kind=AxisType.Explicit):
    return jax.make_mesh((2, 2), ("d", "t"), (kind, kind), devices=jax.devices()[:4])


def placed(mesh, model):
    """Outputs of kernels, the vocabulary and the hidden axis of the embedding are cut."""

    def put(leaf):
        packed = isinstance(leaf, SlideWeight)
        specs = leaf.partition_spec(out="t") if packed else P(None, "t") if leaf.ndim == 2 else P()
        # from the host: cutting what lies on a device would be a program for each shape
        on = lambda a, spec: jax.device_put(np.asarray(a), NamedSharding(mesh, spec))  # noqa: E731
        return jax.tree.map(on, leaf, specs)

    is_weight = lambda leaf: isinstance(leaf, SlideWeight)  # noqa: E731
    return model.with_params(jax.tree.map(put, model.params, is_leaf=is_weight))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_states_and_the_cache_have_types(tied):
    """Rows lie as the ids do, and the vocabulary as its kernel does."""
    model = sj.lm.convert(model_of(tied=tied), sj.Rule("6:8", qdtype=None))
    mesh = mesh_of()
    split, rows = placed(mesh, model), NamedSharding(mesh, P("d"))
    ids, vocab = jax.device_put(IDS, rows), None if tied else "t"
    run = jax.jit(outputs, static_argnums=0)
    want, want_states = run(model.config, model.params, IDS)
    with jax.set_mesh(mesh):
        logits, states = run(model.config, split.params, ids)
        assert jax.typeof(logits).sharding.spec == P("d", None, vocab)
        assert all(jax.typeof(x).sharding.spec == P("d", None, None) for x in states)
        for got, wanted in zip((logits, *states), (want, *want_states), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
        cache = jax.device_put(init_cache(model.config, 4, 16, "float32"), rows)
        logits, written = step(model.config, split.params, ids, cache)
        assert jax.typeof(logits).sharding.spec == P("d", vocab)
        assert jax.typeof(written[0].keys).sharding.spec == P("d", None, None, None)
        np.testing.assert_allclose(logits, want[:, -1], rtol=1e-4, atol=1e-4)


@functools.partial(jax.jit, static_argnums=0)
def step(config, params, ids, cache):
    return apply(config, params, ids, None, cache, last=True)


def test_gradients():
    model = sj.lm.convert(model_of(), sj.Rule("6:8", qdtype=None))
    mesh = mesh_of()
    split = placed(mesh, model)

    @jax.jit
    def gradient(params):
        train, rest = sj.partition(params)
        return jax.grad(lambda t: model.outputs(sj.combine(t, rest), IDS)[0].var())(train)

    want = gradient(model.params)
    with jax.set_mesh(mesh):
        got = gradient(split.params)
    for one, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_calibration_and_evaluation_while_a_mesh_is_set(kind):
    """The outputs of a layer are shared among devices, over a mesh of its own."""
    model = model_of(vocab_size=512)
    rules = [("lm_head/kernel", "6:8"), (".*", None)]
    wide = sj.lm.convert(model, rules, "wanda", IDS)
    dense = evaluate(serving.ready(model), IDS.ravel(), window=8)
    with jax.set_mesh(mesh_of(kind)):
        for given in (model, placed(mesh_of(kind), model)):
            again = sj.lm.convert(given, rules, "wanda", IDS)
            head = again.params["lm_head"]["kernel"].values
            assert (np.asarray(head) == wide.params["lm_head"]["kernel"].values).mean() > 0.99
        found = evaluate(serving.ready(given), IDS.ravel(), window=8)
        assert found.perplexity == pytest.approx(dense.perplexity, rel=1e-4)


def test_forms_are_made_while_another_mesh_is_set():
    w = sj.pack(jnp.ones((256, 64)), "6:8", dtype="int8")
    mesh = mesh_of(AxisType.Auto)
    cut = jax.tree.map(
        lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), w, w.partition_spec(out="t")
    )
    with jax.set_mesh(mesh_of()):
        assert sj.prepare(cut, "dense").prepared["dense"].sharding.spec == P("t")
