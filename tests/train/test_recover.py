"""Recovery of a tiny pruned Llama from its dense original."""

import inspect

import jax
import numpy as np
import pytest

pytest.importorskip("transformers")

import slidejax as sj
from slidejax.lm.evaluate import evaluate
from slidejax.lm.texts import WINDOW as EVALUATED
from slidejax.train import distill
from slidejax.train.recover import set_aside

WINDOW = 32


@pytest.fixture(scope="module")
def written(tiny_config, tiny_params):
    """The dense model's own text, to train on and to evaluate on."""
    from slidejax.huggingface import build

    dense = build(tiny_config, tiny_params)
    prompts = np.random.default_rng(0).integers(0, 256, (104, 1))
    rows = distill.sample(dense, prompts, WINDOW + 1, batch=52, seed=3)
    return dense, rows[:96, :WINDOW], rows[96:].ravel()


@pytest.mark.parametrize(("qdtype", "hidden"), [("int8", 0.0), (None, 0.5)])
def test_recovery_lowers_the_divergence(written, qdtype, hidden):
    dense, rows, held_out = written
    sparse = sj.huggingface.convert(dense, sj.Rule("4:6", qdtype))
    before = jax.tree.map(np.array, sparse.params)
    recovered, fitted = sj.recover(
        sparse,
        dense,
        rows,
        steps=25,
        batch=8,
        window=WINDOW,
        learning_rate=3e-3,
        warmup=3,
        hidden=hidden,
    )
    start, end = (
        evaluate(m, held_out, window=WINDOW, reference=dense).agreement.kl
        for m in (sparse, recovered)
    )
    assert end < 0.85 * start and fitted.steps == 25
    jax.tree.map(np.testing.assert_array_equal, sparse.params, before)  # the input stays as it is
    kernels = [
        m.params["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"] for m in (sparse, recovered)
    ]
    assert kernels[0].dtype == kernels[1].dtype and (kernels[0].zeros == kernels[1].zeros).all()
    assert not np.array_equal(kernels[0].values, kernels[1].values)
    np.testing.assert_array_equal(
        recovered.params["model"]["embed_tokens"]["embedding"],
        dense.params["model"]["embed_tokens"]["embedding"],
    )


def test_a_float_packed_model_comes_out_quantised(written):
    dense, rows, _ = written
    sparse = sj.huggingface.convert(dense, sj.Rule("6:8", None))
    recovered, _ = sj.recover(
        sparse, dense, rows, steps=2, batch=4, window=WINDOW, qdtype="int8", hidden=0.0
    )
    kernel = recovered.params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.dtype == np.int8
    # what comes out is what the last step left: its loss on a batch is the one that training would
    # go on from
    ids = rows[:4]
    loss = distill.kl_divergence(recovered(ids).logits, dense(ids).logits)
    _, more = sj.recover(
        recovered, dense, ids, steps=1, batch=4, window=WINDOW, learning_rate=1e-12, hidden=0.0
    )
    assert more.losses[0] == pytest.approx(float(loss), rel=1e-4)


def test_a_rate_that_is_far_too_high_does_no_harm(written):
    """Without rows that are held out it ruins the model; with them the start is kept, or better."""
    dense, rows, held_out = written
    sparse = sj.huggingface.convert(dense, "4:6")
    options = {"steps": 5, "batch": 8, "window": WINDOW, "learning_rate": 1.0, "warmup": 0}

    def divergence(model):
        return evaluate(model, held_out, window=WINDOW, reference=dense).agreement.kl

    guarded, fitted = sj.recover(sparse, dense, rows, **options)
    ruined, unguarded = sj.recover(sparse, dense, rows, held_out=0, **options)
    assert fitted.checked and not unguarded.checked
    assert divergence(guarded) <= 1.05 * divergence(sparse) < 0.5 * divergence(ruined)


@pytest.mark.parametrize(
    ("rows", "batch", "parts", "count", "aside"),
    [
        (96, 8, 1, None, 8),
        (96, 8, 4, None, 8),
        (96, 32, 4, None, 12),  # an eighth of the rows
        (10, 8, 1, None, 1),
        (7, 4, 1, None, 0),
        (8, 8, 1, None, 0),
        (96, 8, 1, 0, 0),
        (96, 8, 2, 30, 30),
    ],
)
def test_rows_are_held_out_of_the_training(rows, batch, parts, count, aside):
    ids = np.arange(rows)[:, None]
    kept, out = set_aside(ids, batch, parts, count, seed=3)
    assert (0 if out is None else len(out)) == aside and len(kept) == rows - aside >= batch
    everything = kept if out is None else np.concatenate([kept, out])
    assert sorted(everything.ravel().tolist()) == list(range(rows))


def test_bad_input(written, tiny_config):
    dense, rows, _ = written
    sparse = sj.huggingface.convert(dense, "6:8")
    with pytest.raises(ValueError, match="model has no packed weights"):
        sj.recover(dense, dense, rows, steps=1)
    with pytest.raises(ValueError, match=r"0\.\.258"):
        sj.recover(sparse, dense, rows + 200, steps=1, window=8)
    with pytest.raises(ValueError, match="fill no row"):
        sj.recover(sparse, dense, [1, 2, 3], steps=1)
    for count in (-1, 93, 5):
        with pytest.raises(ValueError, match=r"held_out must be .*from 0"):
            sj.recover(
                sparse, dense, rows, steps=1, batch=4, window=8, accumulate=2, held_out=count
            )
    with pytest.raises(ValueError, match="prompt <"):
        distill.sample(dense, rows, 4)


def test_rows_are_as_long_as_the_windows_of_an_evaluation():
    assert inspect.signature(sj.recover).parameters["window"].default == EVALUATED
