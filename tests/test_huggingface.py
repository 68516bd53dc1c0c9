import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gpt2():
    config = transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=48, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=96)
    return transformers.FlaxGPT2LMHeadModel(config, seed=0)


@pytest.fixture(scope="module")
def bert():
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=80, max_position_embeddings=32
    )
    return transformers.FlaxBertModel(config, seed=0)


def tokens(rows=2, length=8):
    return np.random.default_rng(0).integers(1, 90, (rows, length))


def dense_twin(sparse):
    """The parameters of a sparse model, unpacked."""
    is_weight = lambda node: isinstance(node, sj.SlideWeight)  # noqa: E731
    return jax.tree.map(lambda node: sj.unpack(node) if is_weight(node) else node, sparse.params, is_leaf=is_weight)


def test_llama_runs_as_before(tiny_llama):
    report = sj.Report()
    sparse = sj.huggingface.convert(tiny_llama, sj.Rule("6:8", qdtype=None), report=report)
    assert type(sparse) is type(tiny_llama) and len(report.converted) == 14
    ids = tokens()
    want = tiny_llama(ids, params=dense_twin(sparse)).logits
    np.testing.assert_allclose(sparse(ids).logits, want, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(jax.jit(lambda ids, p: sparse(ids, params=p).logits)(ids, sparse.params), want, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(leaf, sj.SlideWeight) for leaf in jax.tree.leaves(tiny_llama.params, is_leaf=lambda n: isinstance(n, sj.SlideWeight)))


def test_generation_greedy_sampled_beam_and_jitted(tiny_llama):
    sparse, ids = sj.huggingface.convert(tiny_llama, "6:8"), tokens(1, 5)
    greedy = sparse.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).sequences
    assert greedy.shape == (1, 9) and (greedy[:, :5] == ids).all()
    step = sparse(ids).logits[0, -1].argmax()
    assert greedy[0, 5] == step
    jitted = jax.jit(lambda ids, p: sparse.generate(ids, params=p, max_new_tokens=4, do_sample=False, eos_token_id=None).sequences)
    np.testing.assert_array_equal(jitted(ids, sparse.params), greedy)
    sampled = sparse.generate(ids, max_new_tokens=4, do_sample=True, prng_key=jax.random.key(1), eos_token_id=None).sequences
    beam = sparse.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False, eos_token_id=None).sequences
    assert sampled.shape == beam.shape == greedy.shape


def test_gpt2s_kernels_are_stored_the_other_way_round(gpt2):
    sparse, ids = sj.huggingface.convert(gpt2, sj.Rule("6:8", qdtype=None)), tokens()
    w = sparse.params["transformer"]["h"]["0"]["mlp"]["c_fc"]["kernel"]
    assert isinstance(w, sj.SlideWeight) and w.shape == (48, 192)
    assert gpt2.params["transformer"]["h"]["0"]["mlp"]["c_fc"]["kernel"].shape == (192, 48)
    flat = jax.tree.map(lambda old, new: new if new is old else new.T, gpt2.params, dense_twin(sparse))
    np.testing.assert_allclose(sparse(ids).logits, gpt2(ids, params=flat).logits, rtol=1e-3, atol=1e-3)


def test_bert_encodes(bert):
    sparse, ids = sj.huggingface.convert(bert, "14:16"), tokens()
    change = np.abs(sparse(ids).last_hidden_state - bert(ids).last_hidden_state).mean()
    assert 0 < change < 0.2 * np.abs(bert(ids).last_hidden_state).mean()


def test_a_cast_of_the_parameters_is_noticed(tiny_llama):
    sparse = sj.huggingface.convert(tiny_llama, "6:8")
    with pytest.raises(ValueError, match="astype"):
        sparse(tokens(), params=sparse.to_bf16(sparse.params))


def test_saved_models_come_back(tiny_llama, tmp_path):
    from slidejax.models import load_model

    sparse = sj.huggingface.convert(tiny_llama, "6:8")
    sparse.save_pretrained(tmp_path / "out")
    again = load_model(tmp_path / "out").model
    np.testing.assert_array_equal(again(tokens()).logits, sparse(tokens()).logits)


def test_bad_arguments(tiny_llama):
    with pytest.raises(TypeError, match="Flax model of transformers"):
        sj.huggingface.convert(jnp.ones(3), "6:8")
    with pytest.raises(ValueError, match="method"):
        sj.huggingface.convert(tiny_llama, "6:8", method="guess")
