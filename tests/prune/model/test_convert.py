"""Calibrated pruning of whole models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slidejax as sj
from slidejax.prune import layer_error
from slidejax.prune.model.grams import collect
from slidejax.prune.model.stages import Stages
from slidejax.prune.model.store import Store

WIDTH = 24
UNROUNDED = sj.Rule("4:6", qdtype=None)


def inputs(rows=512, seed=0):
    """Inputs of a few strong channels."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, WIDTH)) @ (
        np.eye(WIDTH) + rng.standard_normal((WIDTH, WIDTH)) / 4
    )
    return jnp.asarray(x * np.exp(rng.standard_normal(WIDTH)), jnp.float32)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(24, name="shared")
        return nn.Dense(8, name="last")(jnp.tanh(layer(jnp.tanh(layer(x)))))


class Blocks(nn.Module):
    """Two gated residual blocks."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            h = nn.RMSNorm(name=f"norm{i}")(x)
            gate, up = (
                nn.Dense(32, use_bias=False, name=f"gate{i}")(h),
                nn.Dense(32, use_bias=False, name=f"up{i}")(h),
            )
            x = x + nn.Dense(WIDTH, name=f"down{i}")(nn.silu(gate) * up)
        return nn.Dense(8, name="head")(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.up = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 32, rngs=rngs)
        self.down = nnx.Linear(32, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


def run_of(model):
    return sj.linen.functional(model, {}).run


def model_error(model, dense, sparse, x):
    return float(jnp.mean((sj.linen.apply(model, sparse, x) - model.apply(dense, x)) ** 2))


@pytest.fixture(scope="module")
def blocks():
    model, x = Blocks(), inputs()
    return model, model.init(jax.random.key(1), x), x


def converted(blocks, rules, method="sparsegpt", **settings):
    model, variables, x = blocks
    return sj.prune.convert(
        model,
        rules,
        sj.prune.Calibration(jnp.split(x, 4), **settings),
        params=variables,
        method=method,
    )


def test_in_order_and_correcting_beat_the_original_models_inputs(blocks):
    model, variables, x = blocks

    def error(method="sparsegpt", **settings):
        return model_error(model, variables, converted(blocks, UNROUNDED, method, **settings), x)

    by_magnitude = model_error(
        model, variables, sj.linen.convert(variables, UNROUNDED, model, x), x
    )
    at_once, in_order, corrected = error(in_order=False), error(correct=0.0), error(correct=1.0)
    assert corrected < in_order < at_once < error("wanda") < by_magnitude


def test_codes_chosen_together_beat_rounding_afterwards(blocks):
    model, variables, x = blocks
    rule = sj.Rule("4:6", "int8")
    chosen = converted(blocks, rule)
    kernels = converted(blocks, UNROUNDED, smooth=0)
    rounded = sj.linen.convert(
        jax.tree.map(lambda w: w, variables),
        rule,
        model,
        x,
        prune=lambda k, p, path: _dense(kernels, path),
    )
    assert model_error(model, variables, chosen, x) < model_error(model, variables, rounded, x)


def test_quantising_alone(blocks):
    """With the pattern dense Wanda only smooths, and SparseGPT chooses the codes together.

    Each step comes nearer to the original model.
    """
    model, variables, x = blocks
    rule = sj.Rule("dense", "float8_e4m3fn")
    plain = sj.linen.convert(variables, rule, model, x)
    chosen, smoothed = (converted(blocks, rule, method) for method in ("sparsegpt", "wanda"))
    errors = [model_error(model, variables, sparse, x) for sparse in (chosen, smoothed, plain)]
    assert errors[0] < errors[1] < errors[2]
    assert {
        w.pattern
        for w in jax.tree.leaves(chosen, is_leaf=lambda n: isinstance(n, sj.SlideWeight))
        if isinstance(w, sj.SlideWeight)
    } == {rule.pattern}


def _dense(variables, path):
    kernel = sj.unpack(variables["params"][path.split("/")[0]]["kernel"])
    return kernel != 0, kernel


def test_it_is_deterministic(blocks):
    first, again = converted(blocks, "6:8"), converted(blocks, "6:8")
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_a_stopped_conversion_goes_on(blocks, tmp_path, monkeypatch):
    whole = converted(blocks, "6:8")
    counts = []

    def stop(done, total):
        counts.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(blocks, "6:8", work=tmp_path / "work", progress=stop)
    assert counts == [(1, 5), (2, 5), (3, 5)]
    saved = []
    save = Store.save
    monkeypatch.setattr(
        Store, "save", lambda self, stage, pruned: [saved.append(stage), save(self, stage, pruned)]
    )
    resumed = converted(blocks, "6:8", work=tmp_path / "work")
    assert saved == [3, 4], "two stages were left"
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    with pytest.raises(ValueError, match="another conversion"):
        converted(blocks, "4:6", work=tmp_path / "work")


def test_offloaded_values_give_the_same(blocks, monkeypatch):
    kinds = []
    advance = Stages.advance

    def spy(self, stage, values, leaves, **options):
        if stage:
            kinds.append({isinstance(v, np.ndarray) for v in values.values()})
        return advance(self, stage, values, leaves, **options)

    monkeypatch.setattr(Stages, "advance", spy)
    plain = converted(blocks, "6:8", smooth=0)
    assert {*map(tuple, kinds)} == {(False,)}
    kinds.clear()
    jax.tree.map(
        np.testing.assert_array_equal, converted(blocks, "6:8", smooth=0, offload=True), plain
    )
    assert {*map(tuple, kinds)} == {(True,)}


def test_inputs_that_are_not_finite_are_named(blocks):
    model, variables, x = blocks
    with pytest.raises(
        ValueError, match=r"(gate|up)0/kernel: the calibration inputs or the kernel hold inf"
    ):
        sj.prune.convert(model, "6:8", [x.at[3, 3].set(jnp.nan)], params=variables)


def test_nnx_and_linen_agree_on_what_a_model_is():
    x = inputs()
    model = nnx.Sequential(NnxBlock(nnx.Rngs(0)), NnxBlock(nnx.Rngs(1)))
    report = sj.Report()
    sparse = sj.prune.convert(model, UNROUNDED, [x], report=report)
    assert len(report.converted) == 4 and "layer by layer in 4 stages" in report.notes[0]
    want, quick = model(x), sj.nnx.convert(model, UNROUNDED)
    assert float(jnp.mean((sparse(x) - want) ** 2)) < 0.5 * float(jnp.mean((quick(x) - want) ** 2))
    np.testing.assert_array_equal(model(x), want)  # the model itself stays


def test_a_layer_at_two_depths_is_pruned_with_the_original_models_inputs():
    model, x, report = Twice(), inputs(64), sj.Report()
    sparse = sj.prune.convert(
        model, "6:8", [x], params=model.init(jax.random.key(1), x), report=report
    )
    assert isinstance(sparse["params"]["shared"]["kernel"], sj.SlideWeight)
    assert "shared/kernel is used at several depths" in report.notes[0]


def test_mixed_patterns_refuse_scanned_layers():
    """The layers of a stack have one pattern, and `collect` serves `mixed`."""

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            return body(nn.Dense(8, name="dense"), x, None)[0]

    model, x = Scanned(), jnp.ones((3, 8))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(NotImplementedError, match=r"slidejax\.prune\.mixed.*nn\.scan"):
        collect(run_of(model), variables, [x])


def test_bad_arguments(blocks):
    model, variables, x = blocks
    with pytest.raises(ValueError, match="needs params="):
        sj.prune.convert(model, "6:8", [x])
    with pytest.raises(ValueError, match="batches of one shape"):
        sj.prune.convert(model, "6:8", [x, x[:3]], params=variables)
    with pytest.raises(ValueError, match="token ids"):
        sj.prune.convert(model, "6:8", x, params=variables)


def test_a_model_is_pruned_with_what_it_was_calibrated_on(one_block_llama):
    rules = [(".*/mlp/.*", UNROUNDED)]
    tokens = np.random.default_rng(0).integers(0, 256, (32, 32))
    dense = one_block_llama.params["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"]
    grams = collect(
        sj.huggingface.functional(one_block_llama).run, one_block_llama.params, np.split(tokens, 2)
    )
    gram = grams["model/layers/0/mlp/down_proj/kernel"]
    errors, distances = [], []

    def logits(model):  # as one program
        return jax.jit(lambda params: model(tokens[:8], params=params).logits)(model.params)

    for method in ("magnitude", "wanda", "sparsegpt"):
        at_once = (
            "magnitude"
            if method == "magnitude"
            else sj.huggingface.calibrated(one_block_llama, method, tokens)
        )
        model = sj.huggingface.convert(one_block_llama, rules, at_once)
        packed = model.params["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"]
        errors.append(float(layer_error(dense, sj.unpack(packed), gram)))
        if method != "magnitude":
            model = sj.huggingface.convert(
                one_block_llama, rules, method=method, calibration=tokens
            )
        distances.append(float(jnp.mean((logits(model) - logits(one_block_llama)) ** 2)))
    assert errors[2] < errors[1] < errors[0]
    assert distances[2] < distances[1] < distances[0]
    with pytest.raises(ValueError, match="needs calibration"):
        sj.huggingface.convert(one_block_llama, "6:8", method="wanda")
    with pytest.raises(ValueError, match="uses no calibration"):
        sj.huggingface.convert(one_block_llama, "6:8", calibration=tokens)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(
    ("of_inputs", "of_kernel"), [(2.0**120, 1), (2.0**-84, 1), (2.0**40, 2.0**40)]
)
def test_inputs_and_kernels_of_any_size_are_pruned_as_others(method, of_inputs, of_kernel):
    """Squares of these inputs overflow float32, or vanish."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="second")(nn.Dense(16, use_bias=False, name="first")(x))

    x, model = inputs(64), Model()
    params = model.init(jax.random.key(0), x)

    def convert(params, x, **options):
        calibration = sj.prune.Calibration([x], **options)
        return sj.prune.convert(model, "6:8", calibration, method=method, params=params)["params"]

    large = jax.tree.map(lambda leaf: leaf, params)
    large["params"]["first"]["kernel"] *= of_kernel
    for options in ({}, {"in_order": False}):
        got, want = convert(large, of_inputs * x, **options), convert(params, x, **options)
        for layer, scale in (("first", of_kernel), ("second", 1)):
            got_kernel, kernel = got[layer]["kernel"], want[layer]["kernel"]
            np.testing.assert_array_equal(got_kernel.values, kernel.values)
            np.testing.assert_array_equal(got_kernel.scale, scale * kernel.scale)
