import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.prune.model.program import named_leaves
from slidejax.prune.model.stages import SeveralDepths, Stages

INT8 = np.dtype("int8")


class Attention(nn.Module):
    """Blocks that each compute their own mask, a remat, and a head that is not pruned."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            q, k = nn.Dense(8, name=f"q{i}")(x), nn.Dense(8, name=f"k{i}")(x)
            mask = jnp.tril(jnp.ones((x.shape[-2], x.shape[-2])))
            scores = jnp.where(mask > 0, q @ jnp.swapaxes(k, -1, -2), -1e9)
            x = x + nn.remat(nn.Dense)(8, name=f"o{i}")(jax.nn.softmax(scores) @ x)
        return nn.Dense(5, name="head")(x)


def run_of(model):
    return sj.linen.functional(model, {}).run


@pytest.fixture(scope="module")
def attention():
    model, x = Attention(), jax.random.normal(jax.random.key(0), (3, 6, 8))
    variables = model.init(jax.random.key(1), x)
    paths = [
        path for path in named_leaves(variables) if path.endswith("kernel") and "head" not in path
    ]
    return model, variables, x, Stages(run_of(model), variables, x, dict.fromkeys(paths, INT8))


def names(stages):
    return [sorted(tap.path.split("/")[0] for tap in taps) for taps in stages.taps]


def test_layers_come_in_the_order_of_their_inputs(attention):
    _, _, _, stages = attention
    assert names(stages) == [["k0", "q0"], ["o0"], ["k1", "q1"], ["o1"]]
    assert all(len({tap.value for tap in taps}) == 1 for taps in stages.taps), (
        "q and k have one input"
    )
    assert [path for path, stream in stages.streams.items() if stream is not None] == [
        "o0/kernel",
        "o1/kernel",
    ]


def test_stages_compute_what_the_model_does(attention):
    model, variables, x, stages = attention
    _, seen = model.apply(variables, x, capture_intermediates=True)
    values, leaves, sizes = stages.start(x), named_leaves(variables), []
    for at, taps in enumerate(stages.taps):
        values, inputs = stages.advance(at, values, leaves)
        sizes.append(len(values))
        for tap in taps:
            name = tap.path.split("/")[0]
            layer = variables["params"][name]
            want = seen["intermediates"][name]["__call__"][0]
            np.testing.assert_allclose(
                inputs[tap.value] @ layer["kernel"] + layer["bias"], want, rtol=1e-5, atol=1e-5
            )
    assert max(sizes) <= 3, "masks do not wait for later stages"


def test_new_kernels_and_rounding_reach_later_stages(attention):
    _, variables, x, stages = attention
    leaves = named_leaves(variables)
    values, _ = stages.advance(0, stages.start(x), leaves)
    changed = {**leaves, "q0/kernel": 2 * leaves["q0/kernel"]}
    plain = stages.advance(1, values, leaves)[1]
    for other in (
        stages.advance(1, values, changed)[1],
        stages.advance(1, values, leaves, round_inputs=True)[1],
    ):
        change = max(float(jnp.abs(other[v] - plain[v]).max()) for v in plain)
        assert change > 1e-4


def test_equal_blocks_are_one_program(attention):
    model, variables, x, _ = attention
    stages = Stages(
        run_of(model),
        variables,
        x,
        {p: INT8 for p in named_leaves(variables) if p.endswith("kernel")},
    )
    values = stages.start(x)
    for at in range(len(stages.taps)):
        values, _ = stages.advance(at, values, named_leaves(variables))
    programs = {id(program) for _, _, program in stages._programs.values()}
    assert len(programs) < len(stages.taps)
    again = Stages(run_of(model), variables, x, stages.qdtypes)
    assert all(id(again._program(at, False)[2]) in programs for at in range(len(stages.taps))), (
        "another conversion finds them"
    )
    other = Stages(run_of(model), variables, x[:2], stages.qdtypes)
    assert not any(
        id(other._program(at, False)[2]) in programs for at in range(1, len(stages.taps))
    ), "of other shapes"


def test_what_cannot_be_staged():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(8, name="shared")
            return layer(jnp.tanh(layer(x)))

    x, model = jnp.ones((3, 8)), Twice()
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(SeveralDepths, match="shared/kernel is used at several depths"):
        Stages(run_of(model), variables, x, {"shared/kernel": INT8})
