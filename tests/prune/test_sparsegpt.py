import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import examples
from hypothesis import given
from hypothesis import strategies as st

import slidejax as sj
from slidejax.prune import (
    clip_search,
    exchange,
    layer_error,
    magnitude,
    refit,
    round_kernel,
    sparsegpt,
    wanda,
)


def problem(seed, columns, features=12, rows=256):
    """Inputs that are correlated and of very different strength, as those of a model are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) @ (
        np.eye(columns) + rng.standard_normal((columns, columns)) / np.sqrt(columns)
    )
    x = (x * np.exp(rng.standard_normal(columns))).astype(np.float32)
    return jnp.asarray(rng.standard_normal((columns, features)), jnp.float32), jnp.asarray(x.T @ x)


def error(kernel, mask, gram):
    return float(layer_error(kernel, jnp.where(mask, kernel, 0), gram))


@examples(5)
@given(st.sampled_from(["2:4", "6:8", "14:16"]), st.sampled_from([16, 50]), st.integers(0, 99))
def test_each_method_beats_the_one_before(pattern, columns, seed):
    kernel, gram = problem(seed, columns)
    by_magnitude, by_wanda = magnitude(kernel, pattern), wanda(kernel, pattern, gram)
    mask, new = sparsegpt(kernel, pattern, gram, damping=1e-4)
    _, plain = sparsegpt(kernel, pattern, gram, damping=1e-4, rounds=0)
    assert error(kernel, by_wanda, gram) < error(kernel, by_magnitude, gram)
    assert float(layer_error(kernel, plain, gram)) < error(kernel, by_wanda, gram)
    assert float(layer_error(kernel, new, gram)) <= 1.0001 * float(layer_error(kernel, plain, gram))
    # what comes out fits the pattern and is packed without loss
    np.testing.assert_array_equal(sj.unpack(sj.pack(new, pattern, mask=mask)), new)
    assert (np.asarray(mask).sum(0) == np.asarray(by_magnitude).sum(0)).all()


@pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8"])
def test_one_group_reaches_the_optimum(pattern):
    """With a single group there are few masks: none, with its own best weights, is better."""
    columns = sj.Pattern.parse(pattern).group
    kernel, gram = problem(3, columns, features=5)
    mask, new = sparsegpt(kernel, pattern, gram, damping=0.0)
    exact = np.asarray(gram, np.float64)
    for o in range(5):
        w = np.asarray(kernel, np.float64)[:, o]
        best = np.inf
        for dropped in itertools.combinations(range(columns), 2):
            kept = [c for c in range(columns) if c not in dropped]
            fitted = np.zeros(columns)
            fitted[kept] = np.linalg.solve(exact[np.ix_(kept, kept)], exact[kept] @ w)
            best = min(best, (w - fitted) @ exact @ (w - fitted))
        difference = w - np.asarray(new, np.float64)[:, o]
        assert difference @ exact @ difference <= best * 1.001
        assert int(mask[:, o].sum()) == columns - 2


def test_refit_solves_the_normal_equations():
    kernel, gram = problem(1, 40)
    mask = magnitude(kernel, "4:6")
    fitted = np.asarray(refit(kernel, mask, gram, damping=0.0, steps=200), np.float64)
    exact = np.asarray(gram, np.float64)
    for o in range(kernel.shape[1]):
        kept = np.flatnonzero(np.asarray(mask)[:, o])
        want = np.linalg.solve(
            exact[np.ix_(kept, kept)], exact[kept] @ np.asarray(kernel, np.float64)[:, o]
        )
        np.testing.assert_allclose(fitted[kept, o], want, rtol=2e-2, atol=2e-2)
    assert not fitted[~np.asarray(mask)].any()


def test_inputs_that_are_never_driven():
    kernel, gram = problem(2, 16)
    gram = gram.at[5].set(0).at[:, 5].set(0)
    mask, new = sparsegpt(kernel, "6:8", gram)
    assert np.isfinite(new).all() and not np.asarray(mask)[5].any()


def test_no_damage_where_nothing_must_go():
    kernel, gram = problem(4, 16)
    kernel = kernel.at[jnp.array([1, 2, 9, 12])].set(0)
    mask, new = sparsegpt(kernel, "6:8", gram)
    np.testing.assert_allclose(new, kernel, atol=1e-4)
    assert not np.asarray(mask)[[1, 2, 9, 12]].any()


def test_the_pattern_dense_keeps_all():
    kernel, gram = problem(6, 20)
    mask, new = sparsegpt(kernel, "dense", gram)
    np.testing.assert_array_equal(new, kernel)
    assert (
        np.asarray(mask).all()
        and np.asarray(wanda(kernel, "dense", gram)).all()
        and np.asarray(magnitude(kernel, "dense")).all()
    )
    with pytest.raises(ValueError, match="no pairs to exchange"):
        exchange(kernel, mask, gram, kernel, "dense")


def test_bad_arguments():
    kernel, gram = problem(0, 16)
    for method in (wanda, sparsegpt):
        with pytest.raises(ValueError, match="gram must be"):
            method(kernel, "6:8", gram[:8, :8])
        with pytest.raises(ValueError, match=r"kernel must be \[in, out\]|kernel must be floating"):
            method(jnp.ones((2, 16, 3)), "6:8", gram)
    with pytest.raises(ValueError, match="not finite"):
        sparsegpt(kernel, "6:8", gram.at[0, 0].set(jnp.nan))


def test_under_jit():
    kernel, gram = problem(0, 16)
    mask, new = jax.jit(lambda k, g: sparsegpt(k, "6:8", g))(kernel, gram)
    again, same = sparsegpt(kernel, "6:8", gram)
    np.testing.assert_array_equal(mask, again)
    np.testing.assert_allclose(new, same, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("unit", "damping"), [(1e-4, 0.01), (1e4, 0.0)])
def test_dead_inputs_are_pruned_whatever_the_unit(unit, damping):
    """Two inputs of each group are always zero: 6:8 prunes them, and loses nothing."""
    kernel, _ = problem(7, 64)
    x = unit * np.random.default_rng(7).normal(size=(256, 64)).astype(np.float32)
    dead = np.arange(64) % 8 < 2
    x[:, dead] = 0
    gram = jnp.asarray(x.T @ x)
    mask, new = sparsegpt(kernel, "6:8", gram, damping=damping)
    assert not np.asarray(mask)[dead].any() and np.asarray(mask)[~dead].all()
    np.testing.assert_allclose(np.asarray(new)[~dead], np.asarray(kernel)[~dead], atol=1e-5)


def test_a_gram_that_cannot_be_factorised_is_an_error():
    few = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    kernel, _ = problem(0, 64)
    with pytest.raises(ValueError, match="damping 0 is too small"):
        sparsegpt(kernel, "6:8", few.T @ few, damping=0.0)
    with pytest.raises(ValueError, match="kernel holds inf or nan"):
        sparsegpt(kernel.at[0, 0].set(jnp.nan), "6:8", jnp.eye(64))


@pytest.mark.parametrize(
    ("of_kernel", "of_gram"),
    [(120, 0), (-110, 0), (0, 110), (0, -110), (120, 100), (-100, -100), (1, 2), (-3, 6)],
)
def test_results_do_not_depend_on_the_units(of_kernel, of_gram):
    """Powers of four change no digit, and nothing overflows or vanishes on the way."""
    kernel, gram = problem(3, 40)
    mask, new = sparsegpt(kernel, "6:8", gram)

    def results(kernel, new, gram, unit):
        pruned, values = sparsegpt(kernel, "6:8", gram)
        exchanged, better = exchange(kernel, mask, gram, new, "6:8")
        rounded = [round_kernel(kernel, mask, gram, new, d) for d in ("int8", "float8_e4m3fn")]
        masks = pruned, exchanged, wanda(kernel, "6:8", gram)
        return masks, jax.tree.map(
            lambda x: np.asarray(x, np.float64) / unit,
            (values, better, refit(kernel, mask, gram), rounded, clip_search(kernel, jnp.diagonal(gram), "int8")),
        )  # fmt: skip

    unit = 2.0**of_kernel
    got = results(unit * kernel, unit * new, 2.0**of_gram * gram, unit)
    jax.tree.map(np.testing.assert_array_equal, got, results(kernel, new, gram, 1.0))
