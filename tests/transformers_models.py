"""Flax models of transformers, made and run by one program each, not operation by operation."""

import jax

import slidejax as sj


def made(cls, config):
    """A model with parameters that are drawn."""
    model = cls(config, _do_init=False)
    draw = jax.jit(lambda key: model.init_weights(key, (1, 1)))
    return sj.huggingface.with_params(model, draw(jax.random.key(0)))


def logits(model, ids, params=None):
    """The model's logits with its own or other parameters."""
    run = jax.jit(lambda params: model(ids, params=params).logits)
    return run(model.params if params is None else params)
