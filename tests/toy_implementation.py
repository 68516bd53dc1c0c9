"""An implementation of the products in one file, as somebody outside slidejax would write it."""

import jax.numpy as jnp

from slidejax.ops.implementations.base import Form, Implementation
from slidejax.ops.implementations.reference import exact_int8_dot, finish
from slidejax.ops.lift_quantize import quantize_rows
from slidejax.weights.layout import scatter_values


def transposed_codes(w):
    """`[in, out]`, zeros included."""
    return scatter_values(w.values, w.zeros).reshape(w.out_features, -1)[:, : w.in_features].T


class Toy(Implementation):
    """Whole linear layers of int8 weights and at most 64 rows."""

    name = "toy"
    form = Form("toy_codes", transposed_codes)
    searched: list[int] = []  # noqa: RUF012

    def refuses(self, problem):
        if problem.op == "sparse_matmul":
            return "it computes whole layers only"
        if problem.rows > 64:
            return f"at most 64 rows, not {problem.rows}"
        if problem.dtype != jnp.int8:
            return f"values must be int8, not {problem.dtype.name}"
        return None

    def linear(self, x, prologue, w, bias, out_dtype, platform="default"):
        x = x if prologue is None else prologue.apply(x)
        codes, scale_x = quantize_rows(x, jnp.int8)
        held = w.prepared.get("toy_codes")
        kernel = transposed_codes(w) if held is None else held
        return finish(exact_int8_dot(codes, kernel.T), scale_x, w.scale, bias, out_dtype)

    def facts(self):
        return {"toy_version": "0.1"}

    def settings(self, w, rows):
        return f"toy settings of {rows} rows"

    def search(self, w, rows):
        self.searched.append(rows)
        return f"toy has nothing to find at {rows} rows"
