"""A decoder calibrates, prunes, recovers and takes adapters like any other model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import slidejax as sj
from slidejax.lm.decoder import apply
from slidejax.lm.decoder.examples import tiny
from slidejax.weights.packed import SlideWeight

LAYERS = {
    f"model/layers/{i}/{name}/kernel"
    for i in range(2)
    for name in (
        "self_attn/q_proj",
        "self_attn/k_proj",
        "self_attn/v_proj",
        "self_attn/o_proj",
        "mlp/gate_proj",
        "mlp/up_proj",
        "mlp/down_proj",
    )
}


def tokens(rows=4, length=24, seed=0):
    return np.random.default_rng(seed).integers(0, 64, (rows, length)).astype(np.int32)


def off(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).mean())


@pytest.mark.parametrize("tied", [False, True])
def test_a_single_pattern_leaves_the_head(tied):
    report = sj.Report()
    model = sj.lm.convert(tiny(tied=tied), "6:8", report=report)
    assert {line.path for line in report.converted} == LAYERS
    assert set(report.skipped) == (set() if tied else {"lm_head/kernel"})
    assert report.unpacked == {"model/embed_tokens/embedding": "64x32, an embedding"}
    assert isinstance(model, sj.lm.Decoder) and model.config.tied == tied


def test_8_bit_rules_are_for_all_hidden_layers():
    report = sj.Report()
    model = sj.lm.convert(tiny(), sj.lm.eight_bit("4:6"), report=report)
    dtypes = {line.path: line.rule.qdtype.name for line in report.converted}
    assert dtypes == {p: "float8_e4m3fn" if "down_proj" in p else "int8" for p in LAYERS}
    assert not report.unmatched and {str(line.rule.pattern) for line in report.converted} == {"4:6"}
    assert jnp.isfinite(model(tokens())).all()


def test_rules_choose_by_the_names_of_hugging_face():
    report = sj.Report()
    rules = [
        ("model/layers/1/.*", None),
        (".*/mlp/.*", sj.Rule("4:6", "bfloat16")),
        ("lm_head", "dense"),
    ]
    model = sj.lm.convert(tiny(), rules, report=report)
    patterns = {line.path: str(line.rule.pattern) for line in report.converted}
    mlp = {path for path in LAYERS if "/0/mlp/" in path}
    assert patterns == {**dict.fromkeys(mlp, "4:6"), "lm_head/kernel": "dense"}
    assert isinstance(model.params["lm_head"]["kernel"], SlideWeight)
    assert model(tokens()).shape == (4, 24, 64)


@pytest.mark.parametrize("method", [None, "wanda"])
def test_a_tied_model_gets_a_head_of_its_own_where_a_rule_converts_it(method):
    model, ids = tiny(tied=True), tokens(8)
    rules = [("lm_head", "dense"), (".*", "6:8")]
    converted = sj.lm.convert(model, rules, method, None if method is None else ids)
    assert not converted.config.tied and model.config.tied
    head = converted.params["lm_head"]["kernel"]
    embedding = converted.params["model"]["embed_tokens"]["embedding"]
    if method is None:  # calibration smooths: it scales the norm before the head, and the head
        np.testing.assert_allclose(sj.unpack(head), embedding.T, atol=0.02)
    assert str(head.pattern) == "dense" and not isinstance(embedding, SlideWeight)
    others = sj.lm.convert(model, [(".*layers.*", "6:8")], method, None if method is None else ids)
    assert others.config.tied and off(converted(ids), others(ids)) < 0.05


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_calibration_is_better_than_magnitude(method):
    """Inputs of very different sizes, which magnitude does not know about."""
    model = tiny(num_layers=1)
    params = jax.tree.map(lambda x: x, model.params)
    size = np.exp(np.random.default_rng(0).normal(size=32) * 1.5).astype(np.float32)
    for layer in params["model"]["layers"].values():
        for name in ("input_layernorm", "post_attention_layernorm"):
            layer[name] = {"weight": jnp.asarray(size)}
    model, ids = model.with_params(params), tokens(8)
    exact = sj.lm.convert(model, sj.Rule("dense", None))
    assert off(exact(ids), model(ids)) < 1e-5
    by_magnitude = sj.lm.convert(model, sj.Rule("2:4", "float32"))
    calibrated = sj.lm.convert(model, sj.Rule("2:4", "float32"), method, ids)
    assert off(calibrated(ids), model(ids)) < 0.9 * off(by_magnitude(ids), model(ids))


def test_the_one_door_knows_decoders():
    model, ids = tiny(), tokens(8)
    converted = sj.prune.convert(model, "6:8", sj.prune.Calibration(ids), method="wanda")
    same = sj.lm.convert(model, "6:8", "wanda", ids)
    np.testing.assert_array_equal(converted(ids), same(ids))
    rules = sj.prune.mixed(model, "6:8", ids, patterns=("6:8", "4:6"))
    assert {path for path, _ in rules} >= LAYERS


def test_files_and_notes_go_along():
    model = sj.lm.Decoder(
        tiny().config, tiny().params, files={"tokenizer.json": b"{}"}, about={"a": 1}
    )
    converted = sj.lm.convert(model, "6:8")
    assert converted.files == {"tokenizer.json": b"{}"} and converted.about == {"a": 1}


def test_the_tools_of_nnx_work_on_the_shell():
    model, ids = sj.lm.convert(tiny(), "6:8"), tokens()
    adapted = sj.nnx.map_weights(model, functools.partial(sj.adapters.add, rank=2))
    np.testing.assert_allclose(adapted(ids), model(ids), atol=1e-5)
    factors = nnx.state(adapted, nnx.LoRAParam)
    assert len(jax.tree.leaves(factors)) == 2 * len(LAYERS)
    masters = sj.nnx.map_weights(model, sj.trainable.masters)
    np.testing.assert_allclose(masters(ids), model(ids), atol=1e-4)
    graph, state = nnx.split(model)
    np.testing.assert_array_equal(nnx.merge(graph, state)(ids), model(ids))


def test_adapters_and_masters_in_the_tree_go_into_a_decoder_and_back():
    model, ids = sj.lm.convert(tiny(), "6:8"), tokens()
    adapted = model.with_params(sj.adapters.add(model.params, rank=2))
    np.testing.assert_allclose(adapted(ids), model(ids), atol=1e-5)
    train, rest = sj.partition(adapted.params)
    loss = lambda t: apply(model.config, sj.combine(t, rest), ids)[0].var()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(train)
    assert len([g for g in jax.tree.leaves(grads) if np.abs(np.asarray(g)).max() > 0]) > 0
    merged = model.with_params(sj.adapters.merge(adapted.params))
    np.testing.assert_allclose(merged(ids), model(ids), atol=1e-5)
    with pytest.raises(TypeError, match="AdaptedWeight"):
        sj.lm.save(adapted, "nowhere")


def test_recovery_brings_a_pruned_decoder_nearer():
    pytest.importorskip("optax")
    original, ids = tiny(), tokens(16, 16)
    pruned = sj.lm.convert(original, "2:4")
    recovered, _ = sj.recover(
        pruned, original, ids, steps=40, window=16, learning_rate=3e-3, warmup=2
    )
    assert isinstance(recovered, sj.lm.Decoder)
    assert off(recovered(ids), original(ids)) < 0.8 * off(pruned(ids), original(ids))
    kernel = recovered.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == np.int8 and str(kernel.pattern) == "2:4"


def test_what_is_no_decoder_is_refused():
    with pytest.raises(TypeError, match=r"must be a slidejax\.lm\.Decoder, got Linear"):
        sj.lm.convert(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), "6:8")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: p["model"].pop("norm"), "model/norm/weight is missing"),
        (lambda p: p.update(extra=jnp.ones(3)), "extra is unknown"),
        (
            lambda p: p["lm_head"].update(kernel=jnp.ones((4, 4))),
            r"lm_head/kernel is \(4, 4\) instead of \(32, 64\)",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_named(change, match):
    params = jax.tree.map(lambda x: x, tiny().params)
    change(params)
    with pytest.raises(ValueError, match=match):
        sj.lm.Decoder(tiny().config, params)


def test_calibration_with_tokens_that_the_model_does_not_have_is_refused():
    for bad in (np.full((2, 8), 64), np.full((2, 8), -1)):
        with pytest.raises(ValueError, match="calibration must be token ids from 0 to 63"):
            sj.lm.convert(tiny(), "6:8", "wanda", bad)
    with pytest.raises(TypeError, match=r"calibration must be token ids .*, got str"):
        sj.lm.convert(tiny(), "6:8", "wanda", "text")
    with pytest.raises(TypeError, match=r"report must be a slidejax\.Report, got int"):
        sj.lm.convert(tiny(), "6:8", report=5)
