"""Bad values of arguments, and the check that each of them is refused by its name."""

import traceback
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slidejax as sj
import slidejax.prune
from slidejax.lm.decoder.examples import tiny

KERNEL = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
GRAM = np.eye(64, dtype=np.float32)
X = np.ones((3, 64), np.float32)
W = sj.pack(KERNEL, "6:8", dtype="int8")
FLOAT = sj.pack(KERNEL, "6:8")
MASK = sj.prune.magnitude(KERNEL, "6:8")
CODES, SCALE = sj.lift_quantize(X, "6:8")
LAYER = {"kernel": KERNEL, "mask": MASK, "gram": GRAM, "start": KERNEL}
MODEL, IDS = tiny(num_layers=1), np.ones((4, 8), int)

ARRAYS = [None, "3", "6:8", "", {}, object(), b"x", 10**30, np.array(["a"]), W, np.float64, len]
ARRAYS += [jax.ShapeDtypeStruct((3, 64), jnp.float32), np.zeros((2, 2, 2)), np.zeros(0), 0, True]
COMPLEX = np.ones((64, 16), complex)
EMPTY = [np.zeros((0, 16), np.float32), np.zeros((64, 0), np.float32)]
NUMBERS = ["3", "", {}, [], object(), np.zeros(3), W, float("nan"), -1, len]
WHOLE = [*NUMBERS, None, 1.5, float("inf")]
GIVEN_WHOLE = [*NUMBERS, 1.5, float("inf")]
REAL = [*NUMBERS, None, float("inf")]
NAMES = ["none", "", 0, 1.5, object(), [], [1], {}, np.zeros(3), np.zeros((2, 2)), W, len]
AXES = ["none", "", 0, 1.5, [], object(), {}, np.array(["a"]), W, len]
DTYPES = ["int4", "6:8", "", 1.5, [], {}, object(), np.zeros(3, int), len]


def flat(cases) -> Iterator:
    """A test's parameters for each argument of each function.

    Args:
      cases: triples of a function, its good arguments, and bad values by the name of an argument.
    """
    for function, arguments, bad in cases:
        for name, values in bad.items():
            yield pytest.param(function, arguments, name, values, id=f"{function.__name__}-{name}")


def check_named(function, arguments, name, values) -> None:
    """Asserts that each value is refused by slidejax, in a short error that names the argument."""
    wrong = []
    for value in values:
        try:
            function(**{**arguments, name: value})
        except (ValueError, TypeError, NotImplementedError) as e:
            last = traceback.extract_tb(e.__traceback__)[-1].filename
            if name.removesuffix("s") not in str(e) or "slidejax" not in last or len(str(e)) > 400:
                wrong.append(f"{value!r:.60}: {type(e).__name__} in {last[-40:]}: {str(e)[:160]}")
        except Exception as e:
            wrong.append(f"{value!r:.60}: {type(e).__name__}: {str(e)[:160]}")
        else:
            wrong.append(f"{value!r:.60}: accepted")
    assert not wrong, "\n".join(wrong)
