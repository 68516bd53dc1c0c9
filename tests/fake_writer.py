"""A decoder in a few lines, for tests of generation. Each token that it read counts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from slidejax.lm.generation.programs import Programs
from slidejax.lm.text.examples import byte_tokenizer

VOCAB = 260
# Steps of a call that `Programs` gets where a test does not say: conftest.py of generation sets it.
STEPS = None


def init_cache(batch, length):
    """A place for the id of each token; -1 is none."""
    return {"ids": jnp.full((batch, length), -1, jnp.int32)}


def apply(params, ids, positions, cache):
    """Logits of the last token of each row: the sum of what each earlier token says, fading out.

    Reads the cache by its slots, so that padding, chunks and positions must be right.
    """
    rows = jnp.arange(ids.shape[0])[:, None]
    held = cache["ids"]
    slots = jnp.where(positions < 0, held.shape[1], positions)
    held = held.at[rows, slots].set(ids, mode="drop")
    last = positions.max(axis=1)[:, None]
    at = jnp.arange(held.shape[1])[None]
    weight = jnp.where(at <= last, 0.5 ** (last - at).astype(jnp.float32), 0.0)
    said = jnp.where((held >= 0)[..., None], params["says"][held], 0.0)
    return jnp.einsum("bl,blv->bv", weight, said, precision="highest"), {"ids": held}


def expected_logits(params, ids):
    """The same in NumPy for one row."""
    weight = 0.5 ** np.arange(len(ids) - 1, -1, -1, dtype=np.float32)
    return (weight[:, None] * np.asarray(params["says"])[np.asarray(ids)]).sum(0)


def greedy(params, ids, count, ends=()):
    """The likeliest continuation, token by token."""
    ids, new = list(ids), []
    for _ in range(count):
        token = int(expected_logits(params, ids).argmax())
        if token in ends:
            break
        new.append(token)
        ids.append(token)
    return new


@functools.cache
def says(seed):
    return jax.random.normal(jax.random.key(seed), (VOCAB, VOCAB), jnp.float32)


class FakeWriter:
    """The parts of a model that `generate` needs."""

    def __init__(self, seed=0, ends=(), context=4096, chunk=512, tokenizer=True, steps=None):
        self.params = {"says": says(seed)}
        self.vocab_size, self.context, self.ends = VOCAB, context, ends
        self.tokenizer = byte_tokenizer("<a>", "<b>") if tokenizer else None
        self.programs = Programs(
            init_cache, apply, chunk=chunk, steps=STEPS if steps is None else steps
        )

    def script(self, text, *special):
        """Makes the model write this text whatever the prompt is, as long as no byte repeats."""
        ids = [*text.encode(), *special]
        table = np.zeros((VOCAB, VOCAB), np.float32)
        for before, after in itertools.pairwise(ids):
            table[before, after] = 100.0
        self.params = {"says": jnp.asarray(table)}
        return ids[0]
