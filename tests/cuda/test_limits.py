"""Limits and names that Python has in common with the CUDA sources.

Python needs them where no library was compiled, to lower a program for a GPU. So they stand on both
sides, and are compared here without a compiler.
"""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from slidejax.ops import chain, decode_attention
from slidejax.ops.cuda import prologues
from slidejax.ops.implementations import decode, hopper
from slidejax.ops.prologue import Activation

CUDA = Path(__file__).parents[2] / "cuda"
LANES = 32


def source(header):
    return re.sub(r"//.*", "", (CUDA / header).read_text())


def constant(header, name):
    """The value of a constant: a number, another constant of its folder, or a product of these."""
    [value] = re.findall(rf"\b{name} = ([\w* ]+)[,;]", source(header))
    product = 1
    for factor in value.split("*"):
        factor = factor.strip()
        if factor == "kLanes":
            product *= LANES
        elif factor.isdigit():
            product *= int(factor)
        else:
            product *= constant(Path(header).parent / "plan.h", factor)
    return product


def names(header, function):
    """The names in the table of a function that turns a name into an enumerator."""
    table = rf"\b{function}\([^)]*\) {{\s*constexpr \S+ kNames\[\] = {{([^}}]*)}}"
    [found] = re.findall(table, source(header))
    return re.findall(r'"(\w+)"', found)


@pytest.mark.parametrize(
    ("header", "name", "ours"),
    [
        ("decode/decode.h", "kDecodeTokens", decode.ROWS),
        ("decode/gemv_plan.h", "kGemvRows", decode.GEMV_ROWS),
        ("decode/skinny_plan.h", "kSkinnyRows", decode._ROWS_AT_ONCE),
        ("decode/plan.h", "kStepBlocks", decode._STEP_BLOCKS),
        ("hopper/plan.h", "kResidualTokens", hopper.RESIDUAL_ROWS),
        ("hopper/plan.h", "kDenseResidualTokens", hopper.DENSE_RESIDUAL_ROWS),
        ("attention/plan.h", "kWantedBlocks", decode_attention._WANTED_BLOCKS),
        ("attention/plan.h", "kMaxSplits", decode_attention._MAX_SPLITS),
        ("attention/plan.h", "kHeadDimMultiple", decode_attention._HEAD_DIMS.step),
        ("attention/plan.h", "kMaxHeadDim", decode_attention._HEAD_DIMS[-1]),
    ],
)
def test_limits_are_those_of_the_sources(header, name, ours):
    assert constant(header, name) == ours


def test_names_are_those_of_the_sources():
    assert names("lift/lift.h", "PrologueOf") == ["none", *prologues.NAMES.values()]
    activations = names("lift/lift.h", "ActivationOf")
    assert {name: i for i, name in enumerate(activations)} == chain._ACTIVATION_NUMBERS
    for name in activations:
        Activation(name)  # raises where Python has none of this name
    [dtypes] = re.findall(r"kNames\[\] = {([^}]*)}", source("common/dtype.h"))
    for name in re.findall(r'"(\w+)"', dtypes):
        assert jnp.dtype(name).name == name
