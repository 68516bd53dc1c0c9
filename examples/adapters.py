"""Low-rank adapters on a packed int8 layer.

The packed weight is frozen. The adapter is trained, and then merged onto the mask.
"""

import jax
import jax.numpy as jnp

import slidejax as sj
from slidejax.train import Shuffled, fit

key = jax.random.key(0)
x = jax.random.normal(key, (256, 64))
params = {
    "kernel": sj.pack(jax.random.normal(jax.random.key(1), (64, 32)), "6:8", dtype="int8"),
    "bias": jnp.zeros(32),
}
change = (
    jax.random.normal(jax.random.key(2), (64, 1))
    @ jax.random.normal(jax.random.key(3), (1, 32))
    / 8
)
target = sj.linear(x, params["kernel"]) + x @ jnp.where(sj.unpack(params["kernel"]) != 0, change, 0)


def loss(params, batch):
    x, target = batch
    return jnp.mean((sj.linear(x, params["kernel"], params["bias"]) - target) ** 2)


rows = Shuffled(jnp.arange(256), 64)
adapted = sj.adapters.add(params, rank=4, masked=True)
fitted = fit(
    loss,
    adapted,
    lambda step: (x[rows(step)], target[rows(step)]),
    steps=200,
    learning_rate=1e-2,
    trained=sj.adapters.FACTORS,
)
frozen = (fitted.params["kernel"].base.values == params["kernel"].values).all()
print(
    "trained the factors",
    fitted.params["kernel"].lora_a.shape,
    fitted.params["kernel"].lora_b.shape,
    "and nothing else:",
    bool(frozen),
)

merged = sj.adapters.merge(fitted.params)
errors = [float(loss(p, (x, target))) for p in (params, fitted.params, merged)]
print("the error falls a hundredfold:", errors[1] < errors[0] / 100)
print(
    "merged it is",
    merged["kernel"].pattern,
    merged["kernel"].dtype,
    "and as good to rounding:",
    errors[2] < errors[0] / 50,
)
