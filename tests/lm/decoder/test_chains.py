"""A decoding step in chains: what lies between two attentions is one call on one GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some

import slidejax as sj
from slidejax.lm.decoder import apply, layer
from slidejax.lm.decoder.cache import init_cache
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.decoder.fuse import fuse
from slidejax.ops import registry

ROWS = layer.CHAINED_ROWS


def packed(dtype="bfloat16", pattern="6:8", **changes):
    model = sj.lm.convert(tiny(dtype=dtype, **changes), pattern)
    return model.config, fuse(model.params)


def steps(config, params, rows, chained, monkeypatch, implementation=None):
    """Logits of three steps and the cache after them."""
    monkeypatch.setattr(layer, "CHAINED_ROWS", chained)
    if not chained:
        monkeypatch.setattr(layer, "HOPPER_CHAINED_ROWS", ())
    cache = init_cache(config, rows, 8, "float32")

    @jax.jit
    def step(ids, positions, cache):
        return apply(
            config, params, ids, positions, cache, last=True, implementation=implementation
        )

    logits = []
    for i in range(3):
        ids = jnp.arange(rows, dtype=jnp.int32)[:, None] + 3 + i
        y, cache = step(ids, jnp.full((rows, 1), i, jnp.int32), cache)
        logits.append(y)
    return jnp.stack(logits), cache


CHANGES = [{}, {"activation": "gelu_tanh", "qkv_bias": True}, {"qk_norm": True}, {"tied": True}]


@pytest.mark.parametrize(
    ("changes", "rows"),
    some([(CHANGES[0], 9), (CHANGES[1], 1), (CHANGES[2], 3), (CHANGES[3], 1)], CHANGES, [1, 3, 9]),
    ids=str,
)
def test_a_step_in_chains_is_the_step(monkeypatch, rows, changes):
    config, params = packed("float32", **changes)
    got, cache = steps(config, params, rows, ROWS, monkeypatch)
    want, other = steps(config, params, rows, 0, monkeypatch)
    # Codes of 8 bits differ by one where a sum of a norm is rounded otherwise.
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, atol=0.03 * scale)
    for one, held in zip(cache, other, strict=True):
        np.testing.assert_allclose(one.keys, held.keys, atol=0.1)


def calls(config, params, rows, implementation="decode", tokens=1):
    cache = init_cache(config, rows, 8)
    ids = jnp.zeros((rows, tokens), jnp.int32)

    def step(ids, cache):
        positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), ids.shape)
        return apply(
            config, params, ids, positions, cache, last=True, implementation=implementation
        )

    text = jax.jit(step).trace(ids, cache).lower(lowering_platforms=("cuda",)).as_text()
    kind = implementation or "decode"
    return [
        text.count(f"@{name}(") for name in (f"slidejax_chain_{kind}", f"slidejax_linear_{kind}")
    ]


def test_one_call_between_two_attentions():
    config, params = packed()
    # q, k, v of the first layer; then from each layer's attention to the next one's.
    assert calls(config, params, 1) == [1 + config.num_layers, 0]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("rows", [9, 64, 256])
def test_one_call_of_the_hopper_kernel_between_two_attentions(rows, prepared):
    config, params = packed()
    if prepared:
        form = registry.form_of("hopper")

        def with_metadata(w):
            if not is_packed(w):
                return w
            return w.replace(prepared={"hopper": jnp.zeros(form.shape(w), jnp.uint8)})

        params = jax.tree.map(with_metadata, params, is_leaf=is_packed)
    assert calls(config, params, rows, "hopper")[0] == 1 + config.num_layers


def is_packed(w):
    return isinstance(w, sj.SlideWeight)


def test_more_rows_of_the_hopper_kernel_have_no_chains():
    assert calls(*packed(), 257, "hopper")[0] == 0


@pytest.mark.parametrize("case", ["rows", "tokens", "parts", "sandwich", "arrays", "prepared"])
def test_other_steps_have_no_chains(case):
    changes = {"sandwich_norm": True} if case == "sandwich" else {}
    config, params = packed(**changes)
    if case == "parts":
        params = sj.lm.convert(tiny(dtype="bfloat16"), "6:8").params
    if case == "rows":  # which only the decode kernel takes
        rule = sj.Rule("6:8", qdtype="bfloat16")
        params = fuse(sj.lm.convert(tiny(dtype="bfloat16"), rule).params)
    if case == "arrays":
        params = fuse(tiny(dtype="bfloat16").params)
    if case == "prepared":
        params = sj.prepare(params, "dense", tune=False)
    rows = {"rows": ROWS + 1, "prepared": 3}.get(case, 1)
    tokens = 2 if case == "tokens" else 1
    assert calls(config, params, rows, None if case == "arrays" else "decode", tokens)[0] == 0
