"""For the tests of Linen models: data, and converted variables with their kernels unpacked."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import slidejax as sj

KEY = jax.random.key(0)
FLOAT = sj.Rule("6:8", qdtype=None)


def densified(converted, original):
    """The converted variables with every packed kernel unpacked into the shape of the original."""
    flat, like = flatten_dict(nn.meta.unbox(converted)), flatten_dict(nn.meta.unbox(original))

    def dense(key, leaf):
        return (
            sj.unpack(leaf).reshape(like[key].shape).astype(like[key].dtype)
            if isinstance(leaf, sj.SlideWeight)
            else leaf
        )

    return unflatten_dict({key: dense(key, leaf) for key, leaf in flat.items()})


def data(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)
