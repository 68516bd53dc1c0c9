"""Converted Linen models, against the same model with the unpacked kernels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from linen_models import FLOAT, KEY, data, densified

import slidejax as sj


def check(model, x, rules=FLOAT, atol=2e-5, count=None):
    """Converts a model and compares it with the unpacked one, eagerly and under jit.

    Returns the converted variables and the report.
    """
    variables, report = model.init(KEY, x), sj.Report()
    converted = sj.linen.convert(variables, rules, model, x, report=report)
    want = model.apply(densified(converted, variables), x)
    np.testing.assert_allclose(sj.linen.apply(model, converted, x), want, atol=atol)
    np.testing.assert_allclose(
        jax.jit(lambda v, x: sj.linen.apply(model, v, x))(converted, x), want, atol=atol
    )
    if count is not None:
        assert len(report.converted) == count, str(report)
    return converted, report


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=24)(x, x)
        return nn.Dense(5, use_bias=False)(nn.gelu(nn.Dense(32)(x)))


def test_attention_model():
    converted, report = check(Attention(), data(2, 7, 20), count=6)
    attention = converted["params"]["MultiHeadDotProductAttention_0"]
    assert attention["query"]["kernel"].shape == (20, 24) and attention["out"]["kernel"].shape == (
        24,
        20,
    )
    assert not report.skipped and not report.unmatched
    assert report.bytes_after == sum(
        w.nbytes
        for w in jax.tree.leaves(converted, is_leaf=lambda n: isinstance(n, sj.SlideWeight))
        if isinstance(w, sj.SlideWeight)
    )
    assert "6 layers converted" in str(
        report
    ) and "MultiHeadDotProductAttention_0/query/kernel" in str(report)


@pytest.mark.parametrize("layer", [
    nn.Dense(7),
    nn.DenseGeneral((3, 4)),
    nn.DenseGeneral(6, axis=(-2, -1)),
    nn.DenseGeneral(6, axis=(1, -1), use_bias=False),
    nn.DenseGeneral((2, 3), batch_dims=(0,), bias_init=nn.initializers.normal()),
    nn.Einsum((20, 3, 4), "abcd,dhk->ahbck"),
    nn.Einsum((4, 20, 3), "abcd,cdk->akbc", bias_init=nn.initializers.normal()),
    nn.Einsum((20, 3), "...d,dk->k...", bias_init=nn.initializers.normal()),
])  # fmt: skip
def test_layers_of_every_form(layer):
    check(layer, data(2, 3, 4, 20), count=1)


def test_scanned_vmapped_and_subclassed_layers():
    class Doubled(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.remat(nn.Dense)(12)(x) + nn.DenseGeneral((3, 4))(x).reshape(x.shape), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, _ = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )()(x, None)
            experts = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=0,
                axis_size=2,
            )
            return nn.jit(Doubled)(6)(experts(7)(x))

    converted, _ = check(Model(), data(2, 5, 12), count=4)
    shapes = sorted(
        w.shape
        for w in jax.tree.leaves(converted, is_leaf=lambda n: isinstance(n, sj.SlideWeight))
        if isinstance(w, sj.SlideWeight)
    )
    assert shapes == [(2, 12, 7), (3, 12, 12), (3, 12, 12), (7, 6)]


def test_layers_that_are_skipped_say_why():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.normal(), (x.shape[-1], 4))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (3,), name="conv")(x)
            x = nn.Dense(
                16, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), name="custom"
            )(x)
            x = nn.WeightNorm(nn.Dense(16, name="normed"))(x)
            second = nn.vmap(
                nn.Dense,
                variable_axes={"params": 1},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=3,
            )
            square = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=16,
            )
            x = second(10, use_bias=False, name="second")(x)[0] + square(10, name="square")(x)[0]
            x = nn.Embed(10, 10, name="embed").attend(x)
            return nn.Dense(3, name="head")(Own(name="own")(x))

    _, report = check(Model(), data(2, 5, 16), [("head", None), ("(?!head).*", FLOAT)], count=0)
    reasons = {path.removesuffix("/kernel"): reason for path, reason in report.skipped.items()}
    assert reasons.keys() == {"conv", "custom", "normed", "second", "square", "head", "own"}
    assert "Conv is not a linear layer" in reasons["conv"] and "Own is not" in reasons["own"]
    assert "product of its own" in reasons["custom"] and "WeightNorm" in reasons["normed"]
    assert "stacked along axis 1" in reasons["second"] and "cannot be told" in reasons["square"]
    assert reasons["head"] == "a rule says so"


def test_without_a_model_only_matrices_convert():
    x = data(2, 3, 20)
    model = Attention()
    report = sj.Report()
    converted = sj.linen.convert(model.init(KEY, x)["params"], FLOAT, report=report)
    assert {line.path for line in report.converted} == {"Dense_0/kernel", "Dense_1/kernel"}
    assert (
        all("need the model" in reason for reason in report.skipped.values())
        and len(report.skipped) == 4
    )
    assert sj.linen.apply(model, {"params": converted}, x).shape == (2, 3, 5)


def test_forms_of_variables_and_what_is_untouched():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(12)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    x = data(4, 16)
    variables = Model().init(KEY, x)
    converted = sj.linen.convert(freeze(variables), "6:8", Model(), x, train=True)
    assert isinstance(converted, FrozenDict) and isinstance(
        converted["params"]["Dense_0"]["kernel"], sj.SlideWeight
    )
    assert isinstance(variables["params"]["Dense_0"]["kernel"], jax.Array)
    assert converted["params"]["Dense_0"]["bias"] is variables["params"]["Dense_0"]["bias"]
    only = sj.linen.convert(variables["params"], "6:8", Model(), x)
    jax.tree.map(np.testing.assert_array_equal, only, dict(converted["params"].unfreeze()))
    y, updates = sj.linen.apply(
        Model(), converted, x, train=True, mutable=["batch_stats"], rngs={"dropout": KEY}
    )
    assert y.shape == (4, 12) and "batch_stats" in updates


def test_shared_kernels_stay_one():
    class Model(nn.Module):
        def setup(self):
            self.twice = nn.Dense(16)
            self.other = nn.Dense(16)

        def __call__(self, x):
            return self.other(self.twice(self.twice(x)))

    x = data(3, 16)
    _converted, _report = check(Model(), x, count=2)
    params = Model().init(KEY, x)["params"]
    params["other"]["kernel"] = params["twice"]["kernel"]
    tied = sj.linen.convert(params, FLOAT, Model(), x)
    assert tied["other"]["kernel"] is tied["twice"]["kernel"]


def test_a_kernel_that_other_code_reads_is_an_error():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(8, name="layer")
            return layer(x) @ layer.variables["params"]["kernel"].T

    x = data(2, 16)
    variables = Tied().init(KEY, x)
    with pytest.raises(ValueError, match=r"does not run.*must be skipped"):
        sj.linen.convert(variables, "6:8", Tied(), x)
    report = sj.Report()
    sj.linen.convert(variables, [("layer", None)], Tied(), x, report=report)
    assert report.skipped == {"layer/kernel": "a rule says so"}


def test_two_uses_of_one_kernel():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Einsum((16, 16), None, use_bias=False, name="layer")
            return layer(layer(x, "bi,io->bo"), "bo,io->bi")

    _, report = check(Twice(), data(2, 16), count=0)
    assert report.skipped == {"layer/kernel": "its kernel is used in two ways"}


def test_boxed_kernels_of_a_scan():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    step = nn.scan(
        lambda module, x, _: (nn.Dense(64, kernel_init=init, name="up")(x), None),
        variable_axes={"params": 0}, split_rngs={"params": True}, length=2, metadata_params={nn.PARTITION_NAME: "layers"},
    )  # fmt: skip

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return step(self, x, None)[0]

    converted, _ = check(Model(), data(2, 64), count=1)
    spec = nn.get_partition_spec(converted)["params"]["up"]["kernel"]
    assert tuple(spec.values) == ("layers", "mlp", "embed", None) and tuple(spec.scale) == (
        "layers",
        "mlp",
    )


def test_abstract_arguments_and_tracing():
    x = data(2, 16)
    model = nn.Dense(8)
    variables = model.init(KEY, x)
    converted = sj.linen.convert(variables, "6:8", model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    traced = jax.eval_shape(lambda v: sj.linen.convert(v, "6:8", model, x), variables)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), traced) == jax.tree.map(
        lambda a: (a.shape, a.dtype), converted
    )


def test_convert_errors():
    x = data(2, 16)
    variables = nn.Dense(8).init(KEY, x)
    with pytest.raises(ValueError, match=r"kernel has shape \(16, 8\).*\(15, 8\)"):
        sj.linen.convert(variables, "6:8", nn.Dense(8), data(2, 15))
    with pytest.raises(TypeError, match="variables must be the dict"):
        sj.linen.convert([1], "6:8")
    with pytest.raises(TypeError, match=r"model must be a flax\.linen Module"):
        sj.linen.convert(variables, "6:8", lambda x: x)
    with pytest.warns(UserWarning, match="matched no linear layer"):
        sj.linen.convert(variables, [(".*", "6:8"), ("none", None)])
    converted = sj.linen.convert(variables, "6:8")
    with pytest.raises(ValueError, match="ruins packed weights"):
        sj.linen.apply(nn.Dense(8), jax.tree.map(lambda a: a.astype(jnp.bfloat16), converted), x)


def test_kernels_of_numpys_float64_are_converted_as_jax_takes_them():
    variables = nn.Dense(8).init(KEY, data(2, 16))
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
    packed, want = sj.linen.convert(wide, "6:8"), sj.linen.convert(variables, "6:8")
    jax.tree.map(np.testing.assert_array_equal, packed["params"], want["params"])


def test_it_is_said_if_no_layer_that_a_rule_chose_can_be_converted():
    variables = nn.Dense(8).init(KEY, data(2, 16))
    for bad, why in (
        (jax.tree.map(lambda a: a.astype(jnp.int32), variables), "its kernel is int32"),
        (sj.linen.convert(variables, "6:8"), "it is packed already"),
    ):
        with pytest.warns(UserWarning, match=f"no layer was converted: kernel: {why}$"):
            sj.linen.convert(bad, "6:8")


def test_what_a_program_knows_is_converted_while_it_is_traced():
    x = data(2, 16)
    variables = nn.Dense(8).init(KEY, x)

    @jax.jit
    def run(x):
        return sj.linen.apply(nn.Dense(8), sj.linen.convert(variables, FLOAT), x)

    want = sj.linen.apply(nn.Dense(8), sj.linen.convert(variables, FLOAT), x)
    np.testing.assert_allclose(run(x), want, rtol=1e-6)
    variables = jax.tree.map(lambda a: a * jnp.nan, variables)
    with pytest.raises(ValueError, match="kernel: the kernel holds inf or nan"):
        run(x[:1])
