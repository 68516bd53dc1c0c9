"""The two functions under everything: pack a kernel, and multiply with it.

Unquantised, packing loses nothing but the pruned weights. A GPU multiplies with the weight as it
lies. `sj.prepare(w)` keeps more of it ready in memory, which is faster for many rows.
"""

import jax
import jax.numpy as jnp

import slidejax as sj

kernel = jax.random.normal(jax.random.key(0), (128, 32))
x = jax.random.normal(jax.random.key(1), (5, 128))

mask = sj.prune.magnitude(kernel, "6:8")
print("kept", float(mask.mean()), "of the weights")

exact = sj.pack(kernel, "6:8", mask=mask)
print("lossless", bool((sj.unpack(exact) == jnp.where(mask, kernel, 0)).all()))

expected = x @ jnp.where(mask, kernel, 0)
for dtype in (None, "int8"):
    w = sj.pack(kernel, "6:8", dtype=dtype, mask=mask)
    y = jax.jit(sj.linear)(x, w)
    close = jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)
    print(w.dtype, w.nbytes, "bytes; error below 2 %:", bool(close < 0.02))
