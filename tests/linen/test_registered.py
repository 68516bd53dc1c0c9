"""Linear layers of Linen that are not Flax's: registered ones convert, and calibrate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj


class Projection(nn.Module):
    """A layer of another library: its einsum comes before its input, its kernel is [out, in]."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x, *, scale=1.0):
        w = self.param("weight", nn.initializers.lecun_normal(in_axis=-1, out_axis=0), self.shape)
        return jnp.einsum(equation, x, w)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Projection((4, 8, 32), name="query")("...d,nhd->...nh", x)
        x = jnp.tanh(x).reshape(*x.shape[:-2], 32)
        return nn.Dense(8, name="last")(Projection((32, 32), name="out")(x=x, equation="bd,fd->bf"))


@pytest.fixture(scope="module", autouse=True)
def _registered():
    sj.linen.register(Projection, "weight", lambda layer, call: call["equation"], input="x")


X = jax.random.normal(jax.random.key(1), (64, 32)) * jnp.arange(1, 33) / 8
RULE = sj.Rule("6:8", None)


@pytest.fixture(scope="module")
def variables():
    return Model().init(jax.random.key(0), X)


def test_registered_layers_compute_what_their_packed_kernels_say(variables):
    report = sj.Report()
    packed = sj.linen.convert(variables, RULE, Model(), X, report=report)
    assert [layer.path for layer in report.converted] == [
        "query/weight",
        "out/weight",
        "last/kernel",
    ]
    assert report.converted[0].shape == (32, 32) and not report.unpacked
    dense = jax.tree.map(lambda leaf: leaf, variables)
    query, out, last = (packed["params"][name] for name in ("query", "out", "last"))
    dense["params"]["query"]["weight"] = sj.unpack(query["weight"]).T.reshape(4, 8, 32)
    dense["params"]["out"]["weight"] = sj.unpack(out["weight"]).T
    dense["params"]["last"]["kernel"] = sj.unpack(last["kernel"])
    got, want = sj.linen.apply(Model(), packed, X), Model().apply(dense, X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    bits = sj.linen.convert(variables, "6:8", Model(), X)
    assert sj.linen.apply(Model(), bits, X).shape == (64, 8)


def test_registered_layers_are_calibrated(variables):
    sparse = sj.prune.convert(Model(), RULE, [X], params=variables)
    plain = sj.linen.convert(variables, RULE, Model(), X)
    want = Model().apply(variables, X)

    def loss(params):
        return jnp.abs(sj.linen.apply(Model(), params, X) - want).mean()

    assert loss(sparse) < 0.7 * loss(plain)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((int, "w", "bd,df->bf"), {}, TypeError, "subclass of flax.linen.Module"),
        ((Projection, 3, "bd,df->bf"), {}, TypeError, "name of a parameter"),
        ((Projection, "w", "bd->b"), {}, ValueError, "bd->b"),
        ((Projection, "w", 3), {}, TypeError, "einsum or a function"),
        ((Projection, "w", "bd,df->bf"), {"shape": 3}, TypeError, "shape must be"),
        ((Projection, "w", "bd,df->bf"), {"input": "y"}, ValueError, "not 'y'"),
    ],
)
def test_what_cannot_be_registered(arguments, options, error, message):
    with pytest.raises(error, match=message):
        sj.linen.register(*arguments, **options)


def test_layers_inside_nn_jit_are_found_after_the_model_has_run(variables):
    """`nn.jit` remembers what it traced, and would pass by the interceptors of a later call."""
    model = nn.jit(Model)()
    model.init(jax.random.key(0), X)
    model.apply(variables, X)
    for _ in range(2):
        report = sj.Report()
        sj.prune.convert(model, RULE, [X], params=variables, report=report)
        assert len(report.converted) == 3 and "3 stages" in report.notes[0]


# --- gemma ----------------------------------------------------------------------------------------


def gemma_config(modules, transformer, **settings):
    return transformer.TransformerConfig(
        num_embed=64,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        head_dim=16,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(modules.AttentionType.GLOBAL, modules.AttentionType.LOCAL_SLIDING),
        sliding_window_size=8,
        **settings,
    )


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"num_kv_heads": 2, "use_qk_norm": True}, ("q_einsum/w", "kv_einsum/w")),
        ({"num_kv_heads": 4, "transpose_gating_einsum": True}, ("qkv_einsum/w",)),
    ],
    ids=["grouped queries", "as many keys"],
)
def test_models_of_gemma_convert_and_calibrate(settings, layers):
    pytest.importorskip("gemma.gm", reason="needs gemma, the extra ecosystem")
    from gemma.gm.nn import _config, _modules, _transformer

    config = gemma_config(_modules, _config, **settings)
    model = _transformer.Transformer(config=config)
    ids = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    variables = model.init(jax.random.key(0), ids)
    report = sj.Report()
    packed = sj.linen.convert(variables, "dense", model, ids, report=report)
    names = {path for layer in report.converted for path in [layer.path.split("/", 1)[1]]}
    attention = {f"attn/{name}" for name in (*layers, "attn_vec_einsum/w")}
    assert names == {*attention, "mlp/gating_einsum", "mlp/linear"}
    assert len(report.converted) == 2 * len(names)
    assert set(report.unpacked) == {"embedder/input_embedding"}
    want = model.apply(variables, ids).logits
    got = sj.linen.apply(model, packed, ids).logits
    assert jnp.abs(got - want).max() < 0.1 * jnp.abs(want).max()
    report = sj.Report()
    sparse = sj.prune.convert(model, "6:8", [ids], params=variables, report=report)
    assert "layer by layer" in report.notes[0]
    assert jnp.isfinite(sj.linen.apply(model, sparse, ids).logits).all()
