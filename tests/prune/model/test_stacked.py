"""Layers whose kernels are one parameter are calibrated as if each had a parameter of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slidejax as sj
from slidejax.prune.model.grams import collect_all
from slidejax.prune.model.program import Program

WIDTH, DEPTH, EXPERTS = 16, 3, 2
X = jax.random.normal(jax.random.key(7), (3, 32, WIDTH)) * jnp.exp(
    jax.random.normal(jax.random.key(8), (WIDTH,))
)
BATCHES = list(X)


class Block(nn.Module):
    """A gated residual block with a norm, which smoothing changes."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.RMSNorm(name="norm")(x)
        gate = nn.Dense(24, use_bias=False, name="gate")(h)
        up = nn.Dense(24, use_bias=False, name="up")(h)
        return x + nn.Dense(WIDTH, name="down")(nn.silu(gate) * up), None


class Listed(nn.Module):
    """The blocks one by one."""

    @nn.compact
    def __call__(self, x):
        for i in range(DEPTH):
            x, _ = Block(name=f"block{i}")(x)
        return nn.Dense(8, name="last")(x)


class Scanned(nn.Module):
    """The same blocks, scanned, and each of them computed again in the backward pass."""

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH
        )
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(8, name="last")(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, 24, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 24, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(24, WIDTH, rngs=rngs)

    def __call__(self, x):
        h = self.norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class NnxScanned(nnx.Module):
    """Blocks that `nnx.vmap` stacks and `nnx.scan` runs."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=DEPTH)(nnx.vmap(NnxBlock, in_axes=0))
        self.blocks = make(rngs)
        self.last = nnx.Linear(WIDTH, 8, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x, block):
            return block(x)

        return self.last(forward(x, self.blocks))


@pytest.fixture(scope="module")
def listed():
    variables = Listed().init(jax.random.key(0), X[0])
    return variables, *pruned(Listed(), variables)


def pruned(model, variables=None, rule="6:8", method="sparsegpt", **settings):
    report = sj.Report()
    how = sj.prune.Calibration(BATCHES, **settings)
    given = {} if variables is None else {"params": variables}
    return sj.prune.convert(model, rule, how, method=method, report=report, **given), report


def stacked(variables):
    """The parameters of `Listed` as `Scanned` has them."""
    params = dict(variables["params"])
    blocks = [params.pop(f"block{i}") for i in range(DEPTH)]
    return {"params": {**params, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}}


def test_scanned_blocks_are_pruned_as_listed_ones_are(listed):
    variables, want, of_list = listed
    got, report = pruned(Scanned(), stacked(variables))
    assert report.notes == of_list.notes  # as many stages, as many inputs smoothed
    assert "smoothed" in report.notes[0] and len(report.converted) == 4
    jax.tree.map(np.testing.assert_array_equal, got, stacked(want))
    sj.linen.apply(Scanned(), got, X[0])


def test_nnx_blocks_that_are_scanned(listed):
    variables, want, of_list = listed
    model = NnxScanned(nnx.Rngs(0))
    state = stacked(variables)["params"]
    state["blocks"]["norm"] = {"scale": state["blocks"]["norm"]["scale"]}
    nnx.update(model, nnx.State(state))
    got, report = pruned(model)
    assert report.notes == of_list.notes
    packed = stacked(want)["params"]["blocks"]["down"]["kernel"]
    np.testing.assert_array_equal(got.blocks.down.kernel.values, packed.values)
    np.testing.assert_array_equal(got.blocks.down.kernel.scale, packed.scale)
    dense = model(X[0])
    assert jnp.abs(got(X[0]) - dense).mean() < 0.3 * jnp.abs(dense).mean()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_with_the_inputs_of_the_original_model(listed, method):
    variables = listed[0]

    def at_once(model, variables):
        how = sj.prune.Calibration(BATCHES, in_order=False)
        return sj.prune.convert(model, "6:8", how, params=variables, method=method)

    got, want = at_once(Scanned(), stacked(variables)), at_once(Listed(), variables)
    masks = jax.tree.map(np.array_equal, got, stacked(want))
    assert all(jax.tree.leaves(masks))


def test_a_stopped_conversion_of_scanned_blocks_goes_on(listed, tmp_path):
    variables, want, _ = listed

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruned(Scanned(), stacked(variables), work=tmp_path, progress=stop)
    got, _ = pruned(Scanned(), stacked(variables), work=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, got, stacked(want))


class Experts(nn.Module):
    """Experts under vmap: each has rows of its own, or all have the same."""

    own_rows: bool

    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(
            Expert,
            in_axes=0 if self.own_rows else None,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            axis_size=EXPERTS,
        )(name="experts")
        return experts(x.reshape(EXPERTS, -1, WIDTH) if self.own_rows else x)


class Expert(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="down")(nn.relu(nn.Dense(24, name="up")(x)))


@pytest.mark.parametrize("own_rows", [True, False])
def test_experts_under_vmap_are_pruned_one_by_one(own_rows):
    model = Experts(own_rows)
    variables = model.init(jax.random.key(0), X[0])
    got, report = pruned(model, variables, method="wanda")  # which is quick to compile
    assert len(report.converted) == 2
    for i in range(EXPERTS):
        alone = jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"]["experts"])
        how = [x.reshape(EXPERTS, -1, WIDTH)[i] if own_rows else x for x in BATCHES]
        want = sj.prune.convert(
            Expert(), "6:8", sj.prune.Calibration(how), params={"params": alone}, method="wanda"
        )["params"]
        for name in ("up", "down"):
            one, mine = got["params"]["experts"][name]["kernel"], want[name]["kernel"]
            np.testing.assert_array_equal(one.zeros[i], mine.zeros)
            np.testing.assert_allclose(one.scale[i], mine.scale, rtol=1e-4)


def test_a_loop_of_blocks_with_experts():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(
                lambda experts, x, _: (x + experts(x).repeat(2, -1).reshape(x.shape), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            return blocks(Experts(own_rows=True), x, None)[0]

    model = Both()
    variables = model.init(jax.random.key(0), X[0])
    paths = [f"Experts_0/experts/{name}/kernel" for name in ("down", "up")]
    program = Program(sj.linen.functional(model, variables).run, variables, X[0], paths)
    assert {program.stacks[path] for path in paths} == {(2, EXPERTS)}
    assert len([step for step in program.steps if step.tap is not None]) == 2 * EXPERTS * 2
    got, report = pruned(model, variables, method="wanda")
    shapes = [line.shape for line in report.converted]
    assert shapes == [(2, EXPERTS, 24, 8), (2, EXPERTS, 16, 24)]
    assert sj.linen.apply(model, got, X[0]).shape == X[0].shape


def test_a_batched_einsum_is_calibrated_kernel_by_kernel():
    model = nn.Einsum((4, WIDTH, 8), "eri,eio->ero", use_bias=False)
    batches = [x.reshape(4, -1, WIDTH) for x in BATCHES]
    variables = model.init(jax.random.key(0), batches[0])
    got = sj.prune.convert(
        model, sj.Rule("6:8", None), sj.prune.Calibration(batches), params=variables
    )["params"]["kernel"]
    for i in range(4):
        kernel = variables["params"]["kernel"][i]
        rows = jnp.concatenate([batch[i] for batch in batches])
        mask, new = sj.prune.sparsegpt(kernel, "6:8", rows.T @ rows, damping=0.3)
        np.testing.assert_array_equal(sj.unpack(got)[i] != 0, mask)
        np.testing.assert_allclose(sj.unpack(got)[i], new, rtol=2e-3, atol=1e-4)


def test_a_mapped_model_has_more_rows():
    """`jax.vmap` over the inputs alone changes nothing but the number of rows."""
    model = Expert()
    variables = model.init(jax.random.key(0), X[0])
    functional = sj.linen.functional(model, variables)

    def mapped(variables, x):
        return jax.vmap(functional.run, (None, 1))(variables, x.reshape(8, -1, WIDTH))

    got = collect_all(mapped, variables, BATCHES)
    want = collect_all(functional.run, variables, BATCHES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, want)


def test_kernels_that_are_cast_before_the_loop(listed):
    """Mixed precision casts the whole stack; the elements are still known."""
    variables = stacked(listed[0])
    run = sj.linen.functional(Scanned(), variables).run

    def cast(variables, x):
        return run(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables), x)

    program = Program(cast, variables, X[0], ["blocks/up/kernel"])
    assert program.stacks["blocks/up/kernel"] == (DEPTH,)
    paths = {step.tap.path for step in program.steps if step.tap is not None}
    assert paths == {f"blocks/up/kernel[{i}]" for i in range(DEPTH)}


def test_what_cannot_be_told_is_refused_by_name(listed):
    variables = stacked(listed[0])
    run = sj.linen.functional(Scanned(), variables).run

    def doubled(variables, x):
        return run(jax.tree.map(lambda leaf: leaf * 2, variables), x)

    with pytest.raises(NotImplementedError, match=r"blocks/up/kernel: its layers compute"):
        Program(doubled, variables, X[0], ["blocks/up/kernel"])

    class Until(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(WIDTH, name="layer")
            layer(x)
            return nn.while_loop(
                lambda layer, x: jnp.sum(x) < 3, lambda layer, x: layer(x), layer, x
            )

    model = Until()
    variables = model.init(jax.random.key(0), X[0])
    with pytest.raises(NotImplementedError, match=r"inside while, such as layer/kernel.*rule"):
        pruned(model, variables)
    assert not pruned(model, variables, rule=[("layer", None)])[1].converted
