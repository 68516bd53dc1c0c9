"""Converted Hugging Face Flax models, against the same model with the unpacked kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers_models
from flax.traverse_util import flatten_dict, unflatten_dict

import slidejax as sj
from slidejax.variants.serving import serving

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "FlaxPreTrainedModel"):
    pytest.skip("this transformers has no Flax classes", allow_module_level=True)

FLOAT = sj.Rule("6:8", qdtype=None)
IDS = np.arange(3, 11).reshape(2, 4)


def logits(model, params=None):
    return transformers_models.logits(model, IDS, params)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers_models.made(transformers.FlaxGPT2LMHeadModel, config)


def bert():
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
    )
    return transformers_models.made(transformers.FlaxBertForMaskedLM, config)


def densified(sparse, model):
    """The parameters with packed kernels unpacked into their original shapes.

    GPT-2 keeps `[out, in]`.
    """
    like = flatten_dict(model.params)

    def dense(key, leaf):
        if not isinstance(leaf, sj.SlideWeight):
            return leaf
        matrix = sj.unpack(leaf)
        return (
            matrix.T
            if type(model).__name__ == "FlaxGPT2LMHeadModel"
            else matrix.reshape(like[key].shape)
        )

    return unflatten_dict(
        {key: dense(key, leaf) for key, leaf in flatten_dict(sparse.params).items()}
    )


def test_llama(tiny_llama):
    report, before = sj.Report(), flatten_dict(tiny_llama.params)
    sparse = sj.huggingface.convert(tiny_llama, FLOAT, report=report)
    assert type(sparse) is type(tiny_llama) and len(report.converted) == 14
    assert report.skipped == {"lm_head/kernel": "no rule matches"} and not report.unmatched
    assert all(leaf is before[key] for key, leaf in flatten_dict(tiny_llama.params).items())
    assert not any(isinstance(leaf, sj.SlideWeight) for leaf in before.values())

    dense = densified(sparse, tiny_llama)
    want = logits(tiny_llama, dense)
    np.testing.assert_allclose(sparse(IDS).logits, want, atol=1e-4)
    np.testing.assert_allclose(logits(sparse), want, atol=1e-4)
    assert jnp.abs(want - logits(tiny_llama)).max() > 0.01
    sparse.generation_config.max_length = 7
    assert tiny_llama.generation_config.max_length != 7


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"do_sample": True, "prng_key": jax.random.PRNGKey(3)}],
    ids=["greedy", "beam", "sample"],
)
def test_llama_generates(tiny_llama, options):
    sparse = sj.huggingface.convert(tiny_llama, FLOAT)
    dense = densified(sparse, tiny_llama)

    def generate(model, params):
        options_of_all = {"max_length": 9, "pad_token_id": 258}
        run = jax.jit(
            lambda params: model.generate(IDS, params=params, **options_of_all, **options).sequences
        )
        return run(params)

    want = generate(tiny_llama, dense)
    np.testing.assert_array_equal(generate(sparse, sparse.params), want)
    if not options:
        np.testing.assert_array_equal(
            sparse.generate(IDS, max_length=9, pad_token_id=258).sequences, want
        )


def test_8_bit_llama_is_near_its_dense_twin(tiny_llama):
    sparse = sj.huggingface.convert(tiny_llama, "14:16")
    assert sparse.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].dtype == jnp.int8
    got, want = logits(sparse), logits(tiny_llama, densified(sparse, tiny_llama))
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.99
    prepared = sj.prepare(sparse.params)
    np.testing.assert_allclose(logits(sparse, prepared), got, atol=1e-4)


def test_quantised_only(tiny_llama):
    """Quantised only, a model is nearer to the original than with any pattern, served or not."""
    want, near = logits(tiny_llama), []
    for pattern in ("dense", "14:16"):
        model = sj.huggingface.convert(tiny_llama, pattern)
        got = logits(model)
        near.append(float(jnp.mean((got - want) ** 2)))
        served = sj.huggingface.with_params(model, serving(model.params))
        np.testing.assert_allclose(logits(served), got, rtol=1e-4, atol=1e-4)
    assert near[0] < near[1] / 4
    unquantised = sj.huggingface.convert(tiny_llama, sj.Rule("dense", None))
    np.testing.assert_allclose(logits(unquantised), want, rtol=1e-4, atol=1e-4)


def test_gpt2_keeps_out_in():
    model, report = gpt2(), sj.Report()
    sparse = sj.huggingface.convert(model, FLOAT, report=report)
    shapes = {line.path.split("/")[-2] + str(line.shape) for line in report.converted}
    assert shapes == {"c_attn(32, 96)", "c_proj(32, 32)", "c_fc(32, 128)", "c_proj(128, 32)"}
    dense = densified(sparse, model)
    np.testing.assert_allclose(logits(sparse), logits(model, dense), atol=1e-5)

    def generate(model, params):
        run = jax.jit(lambda params: model.generate(IDS, params=params, max_length=7).sequences)
        return run(params)

    np.testing.assert_array_equal(generate(sparse, sparse.params), generate(model, dense))


def test_bert():
    model, report = bert(), sj.Report()
    sparse = sj.huggingface.convert(
        model, [(".*/attention/.*", None), (".*", FLOAT)], report=report
    )
    assert len(report.skipped) == 4 and all("/attention/" in path for path in report.skipped)
    assert len(report.converted) == 3
    np.testing.assert_allclose(logits(sparse), logits(model, densified(sparse, model)), atol=1e-5)


def test_a_model_without_parameters(tiny_llama):
    empty = type(tiny_llama)(tiny_llama.config, _do_init=False)
    with pytest.raises(ValueError, match=r"made with _do_init=False.*give params="):
        sj.huggingface.convert(empty, "6:8")
    sparse = sj.huggingface.convert(empty, "6:8", params=tiny_llama.params)
    assert sparse(IDS).logits.shape == (2, 4, 259)


def test_packed_parameters_run_in_a_dense_model(tiny_llama):
    sparse = sj.huggingface.convert(tiny_llama, FLOAT)
    again = sj.huggingface.with_params(tiny_llama, sparse.params)
    np.testing.assert_array_equal(logits(again), logits(sparse))
    with pytest.raises(ValueError, match="parameters are missing"):
        sj.huggingface.with_params(tiny_llama, {"model": {}})


def test_converting_twice_packs_what_is_left(tiny_llama):
    first = sj.huggingface.convert(tiny_llama, [(".*/mlp/.*", FLOAT)])
    report = sj.Report()
    second = sj.huggingface.convert(first, FLOAT, report=report)
    assert (
        len(report.converted) == 8
        and "packed already" in report.skipped["model/layers/0/mlp/up_proj/kernel"]
    )
    np.testing.assert_allclose(
        logits(second), logits(sj.huggingface.convert(tiny_llama, FLOAT)), atol=1e-6
    )


def test_save_pretrained(tiny_llama, tmp_path):
    sparse = sj.huggingface.convert(tiny_llama, "6:8")
    sparse.save_pretrained(tmp_path / "out")
    from slidejax.lm.models import load_model

    again = load_model(tmp_path / "out").model
    jax.tree.map(np.testing.assert_array_equal, again.params, sparse.params)
    np.testing.assert_array_equal(logits(again), logits(sparse))
    with pytest.raises(ValueError, match=r"takes no push_to_hub.*slidejax.checkpoint.save"):
        sparse.save_pretrained(tmp_path / "hub", push_to_hub=True)


def test_a_cast_of_the_parameters_is_an_error(tiny_llama):
    sparse = sj.huggingface.convert(tiny_llama, "6:8")
    with pytest.raises(ValueError, match=r"q_proj/kernel has leaves.*ruins packed weights"):
        sparse(IDS, params=sparse.to_bf16(sparse.params))


def test_methods(tiny_llama):
    seen = []

    def keep_first(kernel, pattern, path):
        seen.append(path)
        return jnp.broadcast_to(
            (jnp.arange(kernel.shape[0]) % pattern.group < pattern.kept)[:, None], kernel.shape
        )

    sparse = sj.huggingface.convert(tiny_llama, [(".*/0/mlp/up_proj", FLOAT)], method=keep_first)
    assert seen == ["model/layers/0/mlp/up_proj/kernel"]
    assert not sj.unpack(sparse.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"])[
        6:8
    ].any()
    with pytest.raises(ValueError, match="method must be a function or one of magnitude"):
        sj.huggingface.convert(tiny_llama, "6:8", method="nothing")
    with pytest.raises(ValueError, match="'magnitude' uses no calibration"):
        sj.huggingface.convert(tiny_llama, "6:8", calibration=IDS)
    with pytest.raises(TypeError, match="must be a Flax model of transformers, got dict"):
        sj.huggingface.convert({}, "6:8")
