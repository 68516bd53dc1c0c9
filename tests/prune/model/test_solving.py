"""Outputs that are shared among devices give what one device gives."""

import jax
import numpy as np
import pytest

import slidejax as sj
from slidejax.prune.model.ahead import CompileAhead, shapes_of
from slidejax.prune.model.methods import SPARSEGPT, WANDA
from slidejax.prune.model.solving import solved_by


def problem(corrects, outs=(24, 9), width=64):
    """`(kernels, moments, correct, damping)` of layers with one input."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, width)) @ rng.normal(size=(width, width))
    gram = (x.T @ x).astype(np.float32)
    kernels = tuple(rng.normal(size=(width, n)).astype(np.float32) for n in outs)
    lost = [gram @ (k + rng.normal(size=k.shape).astype(np.float32) / 50) for k in kernels]
    wanted = [None, lost[1]] if corrects else [None, None]
    cross = gram * np.float32(1.01) if corrects else None
    return kernels, (gram, cross, wanted), np.float32(0.75), np.float32(0.1)


@pytest.mark.parametrize(
    ("method", "corrects", "devices"), [(SPARSEGPT, True, 2), (WANDA, False, 8)]
)
def test_devices_share_the_outputs(method, corrects, devices):
    if len(jax.local_devices()) < devices:
        pytest.skip("needs several devices")
    solve, args = method.solver(sj.Rule("6:8")), problem(corrects)
    alone = solved_by(solve, outputs=33, least=34)
    spread = solved_by(solve, outputs=33, least=33 // devices)
    with CompileAhead() as ahead:
        ahead.begin(spread, *shapes_of(args))
        finite, found = ahead.call(spread, *args)
    expected_finite, expected = alone(*args)
    assert finite.all() and expected_finite.all()  # inputs and solution
    assert [one.kernel.shape for one in found] == [(64, 24), (64, 9)]
    for got, want in zip(found, jax.device_get(expected), strict=True):
        np.testing.assert_array_equal(got.mask, want.mask)
        if want.scale is None:
            np.testing.assert_array_equal(got.kernel, want.kernel)
            continue
        # The codes are equal; scales may differ in the last bit, as products of other sizes do.
        np.testing.assert_allclose(got.scale, want.scale, rtol=1e-6)
        codes = [np.rint(one.kernel / one.scale) for one in (got, want)]
        assert np.abs(codes[1]).max() == 127
        np.testing.assert_array_equal(*codes)
    broken = args[1][0].copy()
    broken[3, 3] = np.inf
    inputs, _ = spread(args[0], (broken, *args[1][1:]), *args[2:])[0]
    assert not inputs


def test_few_outputs_stay_on_one_device():
    solve = WANDA.solver(sj.Rule("6:8"))
    assert solved_by(solve, 100) is solved_by(solve, 200)
    assert solved_by(solve, 10_000) is not solved_by(solve, 100) or len(jax.local_devices()) == 1


def test_a_whole_model_on_several_devices(monkeypatch):
    from slidejax.lm.decoder.examples import tiny
    from slidejax.prune.model import sequential

    ids = np.random.default_rng(0).integers(0, 64, (2, 16)).astype(np.int32)
    alone = sj.lm.convert(tiny(), "6:8", "wanda", ids)
    used = []

    def spread(solve, outputs):
        used.append(outputs)
        return solved_by(solve, outputs, least=8)

    monkeypatch.setattr(sequential, "solved_by", spread)
    shared = sj.lm.convert(tiny(), "6:8", "wanda", ids)
    assert set(used) == {64, 32, 96}  # q, k and v; o and down; gate and up
    jax.tree.map(np.testing.assert_array_equal, shared.params, alone.params)
