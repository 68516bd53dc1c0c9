"""One layer over a mesh of eight devices.

Rows of x, outputs of W and inputs of W are all split, and neither x nor W is gathered.
"""

import os

# Eight CPU devices stand in for eight GPUs.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import slidejax as sj

mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "out", "in"))
x = jax.random.normal(jax.random.key(0), (16, 256))
w = sj.pack(jax.random.normal(jax.random.key(1), (256, 128)), "6:8", dtype="int8")


def put(tree, specs):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


# K is cut between whole blocks of groups.
# The specs of the packed leaves follow from the axes' names.
cut_x, cut_w = put(x, P("data", "in")), put(w, w.partition_spec(out="out", k="in"))
linear = jax.jit(sj.linear)
y = linear(cut_x, cut_w)

print("W on each device", cut_w.values.addressable_shards[0].data.shape, "of", w.values.shape)
print("y is split over", y.sharding.spec)
print("equal to one device, bit for bit", bool((y == sj.linear(x, w)).all()))
compiled = linear.lower(cut_x, cut_w).compile().as_text()
print("gathers", compiled.count("all-gather("), "sums over K", compiled.count(" all-reduce(") > 0)
