"""Contractions: every product that a layer can be, against einsum with the unpacked kernel."""

import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
from slidejax.contraction import Contraction, axis_names, contract, stacked_axes, to_matrix
from slidejax.rules import Skipped


@pytest.mark.parametrize(("equation", "x_shape", "kernel_shape"), [
    ("btd,ndh->btnh", (2, 3, 16), (4, 16, 5)),
    ("btnh,nhd->btd", (2, 3, 4, 5), (4, 5, 7)),
    ("btnh,hnd->dtb", (2, 3, 4, 5), (5, 4, 7)),
    ("ebd,edf->ebf", (3, 2, 16), (3, 16, 5)),
    ("bed,fed->fbe", (2, 3, 16), (5, 3, 16)),
    ("...d,dh->h...", (2, 3, 16), (16, 5)),
])  # fmt: skip
def test_einsum(equation, x_shape, kernel_shape):
    random = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(random.normal(size=shape), jnp.float32) for shape in (x_shape, kernel_shape)
    )
    axes = Contraction.einsum(equation, x.ndim)
    order = sum(axes.kernel, ())
    w = sj.pack(to_matrix(kernel, axes.kernel), "6:8")
    dense = sj.unpack(w).reshape([kernel_shape[a] for a in order]).transpose(np.argsort(order))
    assert jnp.all((dense == kernel) | (dense == 0)) and jnp.any(dense != 0)
    got = contract(x, w, axes, tuple(kernel_shape[a] for a in axes.kernel_out))
    np.testing.assert_allclose(got, jnp.einsum(equation, x, dense), rtol=1e-4, atol=1e-4)
    residual = jnp.asarray(random.normal(size=got.shape), jnp.float32)
    features = tuple(kernel_shape[a] for a in axes.kernel_out)
    with_residual = contract(x, w, axes, features, residual=residual)
    np.testing.assert_allclose(with_residual, got + residual, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="shape of the layer's result"):
        contract(x, w, axes, features, residual=residual[..., :1])
    with pytest.raises(ValueError, match="does not fit"):
        contract(x, w, axes, (1,))


@pytest.mark.parametrize(("equation", "reason"), [
    ("bd,dd->b", "diagonal"), ("bd,df->f", "not a product"), ("ab,ab->ab", "not a product"),
    ("bd,d->b", "not a product"),
    ("bd,...d->b...", "ellipsis"), ("bd,df", "form"), ("bd,df,fg->bg", "form"),
])  # fmt: skip
def test_einsums_that_are_no_product_of_matrices(equation, reason):
    with pytest.raises(Skipped, match=reason):
        Contraction.einsum(equation, 2)


def test_stacked_axes():
    assert stacked_axes((16, 8), (16, 8), "k") == 0
    assert stacked_axes((2, 3, 16, 8), (16, 8), "k") == 2
    with pytest.raises(Skipped, match="along axis 1"):
        stacked_axes((16, 3, 8), (16, 8), "k")
    with pytest.raises(Skipped, match="cannot be told"):
        stacked_axes((16, 16, 8), (16, 8), "k")
    with pytest.raises(ValueError, match="k has shape"):
        stacked_axes((8,), (16, 8), "k")
    with pytest.raises(ValueError, match="k has shape"):
        stacked_axes((3, 15, 8), (16, 8), "k")


def test_axis_names_of_flattened_axes():
    axes = Contraction.general(3, (-1,), (), 2).kernel  # [embed, heads, width]
    w = sj.pack(jnp.ones((64, 12)), "6:8")
    names = axis_names(w, ("embed", "heads", "width"), 3, axes)
    assert tuple(names.values) == ("heads", "embed", None)
    assert tuple(axis_names(w, ("embed",), 3, axes).scale) == (None,)
