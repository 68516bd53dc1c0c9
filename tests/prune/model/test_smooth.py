import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.prune.model.inputs import rounded
from slidejax.prune.model.program import named_leaves
from slidejax.prune.model.smooth import smooth
from slidejax.prune.model.stages import Stages

INT8 = np.dtype("int8")


def traced(model, variables, *batch):
    paths = [path for path in named_leaves(variables) if path.endswith("kernel")]
    run = sj.linen.functional(model, variables).run
    return Stages(run, variables, batch[0], dict.fromkeys(paths, INT8))


class Gated(nn.Module):
    norm: type = nn.RMSNorm

    @nn.compact
    def __call__(self, x):
        h = self.norm(name="norm")(x)
        gate, up = (
            nn.Dense(32, use_bias=False, name="gate")(h),
            nn.Dense(32, use_bias=False, name="up")(h),
        )
        return x + nn.Dense(24, name="down")(nn.silu(gate) * up)


class After(nn.Module):
    """The norm's output goes on beside the layer: nothing can be folded into it."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        return h + nn.Dense(24, name="dense")(h)


def strong(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((64, 24)), jnp.float32)


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_the_model_computes_the_same_and_rounds_better(norm):
    model, x = Gated(norm), strong()
    variables = model.init(jax.random.key(0), x)
    # A norm makes some channels strong.
    loud = jnp.exp(2 * jax.random.normal(jax.random.key(1), (24,)))
    variables["params"]["norm"]["scale"] = loud
    if norm is nn.LayerNorm:
        variables["params"]["norm"]["bias"] = loud[::-1] / 9
    stages = traced(model, variables, x)
    new, paths = smooth(stages, variables, [x])
    assert sorted(paths) == ["down/kernel", "gate/kernel", "up/kernel"]
    np.testing.assert_allclose(model.apply(new, x), model.apply(variables, x), rtol=1e-3, atol=1e-3)

    def error(variables):
        leaves, values, total = named_leaves(variables), stages.start(x), 0.0
        for at, taps in enumerate(stages.taps):
            values, inputs = stages.advance(at, values, leaves)
            for tap in taps:
                change = rounded(inputs[tap.value], tap.axes, INT8) - inputs[tap.value]
                total += float(jnp.mean((change @ leaves[tap.path]) ** 2))
        return total

    assert error(new) < 0.5 * error(variables)
    same, none = smooth(stages, variables, [x], 0.0)
    assert same is variables and none == []


def test_nothing_is_folded_where_others_look():
    model, x = After(), strong()
    variables = model.init(jax.random.key(0), x)
    new, paths = smooth(traced(model, variables, x), variables, [x])
    assert new is variables and paths == []


def test_silent_channels():
    model, x = Gated(), strong().at[:, 3].set(0)
    variables = model.init(jax.random.key(0), x)
    new, paths = smooth(traced(model, variables, x), variables, [x])
    assert len(paths) == 3
    np.testing.assert_allclose(model.apply(new, x), model.apply(variables, x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers(name, tiny_llama):
    transformers = pytest.importorskip("transformers")
    if name == "llama":
        model = tiny_llama
    else:
        config = transformers.GPT2Config(
            vocab_size=97,
            n_embd=32,
            n_layer=1,
            n_head=2,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = transformers.FlaxGPT2LMHeadModel(config)
    ids = np.random.default_rng(0).integers(0, 97, (2, 16))
    paths = [p for p in named_leaves(model.params) if p.endswith("kernel") and "lm_head" not in p]
    stages = Stages(
        sj.huggingface.functional(model).run, model.params, ids, dict.fromkeys(paths, INT8)
    )
    new, smoothed = smooth(stages, model.params, [ids])
    run = jax.jit(lambda params: model(ids, params=params).logits)  # one program
    np.testing.assert_allclose(run(new), run(model.params), atol=1e-4)
    want = (
        ("c_attn", "c_fc")
        if name == "gpt2"
        else ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    )
    assert {path.split("/")[-2] for path in smoothed} == set(want)
    # every layer that writes to the residual stream is seen to
    writers = {path.split("/")[-2] for path, stream in stages.streams.items() if stream is not None}
    assert writers == ({"c_proj"} if name == "gpt2" else {"o_proj", "down_proj"})
