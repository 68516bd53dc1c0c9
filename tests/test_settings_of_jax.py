"""Whole models under the settings of JAX that forbid or change what it does by itself.

`tests/ops/test_rank_promotion.py` has the ops.
"""

import contextlib
import gc

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import slidejax as sj
from slidejax.lm import serving
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.evaluate import evaluate
from slidejax.lm.text.examples import byte_tokenizer
from slidejax.train import fit, sample

IDS = np.random.default_rng(0).integers(0, 60, (8, 16))
X = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)


SETTINGS = {
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "nans": lambda: jax.debug_nans(True),
    "leaks": jax.checking_leaks,
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "highest": lambda: jax.default_matmul_precision("highest"),
    "x64": lambda: jax.enable_x64(True),
}
# x64 changes dtypes and so what the others see. Those do not disturb each other: guards that raise,
# and ways to compute. On together they cost one run.
TOGETHER = [[name for name in SETTINGS if name != "x64"], ["x64"]]


def pytest_generate_tests(metafunc):
    if "settings" in metafunc.fixturenames:
        each = [[name] for name in SETTINGS]
        every = metafunc.config.getoption("--every-case")
        metafunc.parametrize("settings", TOGETHER + each if every else TOGETHER, ids=" ".join)
        metafunc.parametrize("layers", [1, 2] if every else [1])


def generated(model):
    made = model.generate([[1, 2], [3]], max_new_tokens=3, temperature=0.7, top_k=9, top_p=0.9)
    assert [len(one.tokens) for one in made] == [3, 3]


def fitted(model):
    def loss(w, x):
        return (sj.linear(x, w) ** 2).mean()

    w = sj.pack(X.T, "6:8", dtype="int8")
    result = fit(loss, w, lambda step: X, steps=3, accumulate=2, warmup=0)
    assert result.losses[-1] < result.losses[0]


def recovered(model):
    sparse = sj.lm.convert(model, "6:8")
    _, result = sj.recover(sparse, model, IDS, steps=2, window=8, batch=4, held_out=4, warmup=0)
    assert np.isfinite(result.losses).all()


def adapted(model):
    tree = sj.adapters.add({"a": sj.pack(X.T, "6:8", dtype="int8")}, rank=2)
    train, rest = sj.partition(tree)
    jax.grad(lambda t: (sj.linear(X, sj.combine(t, rest)["a"]) ** 2).sum())(train)
    sj.adapters.merge(tree)


def converted(model):
    linear = nnx.Linear(64, 16, rngs=nnx.Rngs(0))
    assert type(sj.prune.convert(linear, "6:8", [X])).__name__ == "SlideLinear"
    sj.lm.convert(model, sj.lm.eight_bit("6:8"), "sparsegpt", IDS)


def evaluated(model):
    found = evaluate(
        serving.ready(model), IDS.ravel()[:40], window=8, batch=2, reference=serving.ready(model)
    )
    assert found.agreement is not None and found.agreement.top1 == 1


def mixed(model):
    assert (
        len(sj.prune.mixed(model, "6:8", IDS[:4], patterns=["6:8", "4:6"]))
        == 7 * model.config.num_layers
    )


def sampled(model):
    assert sample(model, IDS[:, :2], 6).shape == (8, 6)


WORK = [generated, fitted, recovered, adapted, converted, evaluated, mixed, sampled]


def test_every_setting_is_on_in_a_plain_run():
    assert sorted(name for names in TOGETHER for name in names) == sorted(SETTINGS)


@pytest.fixture
def _nothing_old_is_searched():
    """Leak checks collect garbage at every trace, which need not look at all that there was."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_nothing_old_is_searched")
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_whole_models_work_under_settings(work, settings, layers):
    with contextlib.ExitStack() as stack:
        for name in settings:
            stack.enter_context(SETTINGS[name]())
        work(tiny(num_layers=layers))


@pytest.mark.parametrize("mesh", [None, ("d",)], ids=["one device", "a mesh"])
def test_generation_passes_a_guard_of_transfers(mesh):
    """A call copies to the device only arrays that are meant for it, and no model in NumPy."""
    model = tiny(num_layers=1, vocab_size=260)
    model = sj.lm.Decoder(model.config, model.params, files=byte_tokenizer().files())
    if mesh is not None:
        place = NamedSharding(jax.make_mesh((2,), mesh, devices=jax.devices()[:2]), P())
        model = model.with_params(jax.device_put(model.params, place))
    host = jax.tree.map(np.asarray, model.params)
    ids = jax.device_put(np.ones((2, 4), np.int32), jax.tree.leaves(model.params)[0].sharding)
    with jax.transfer_guard("disallow"):
        generated(model)
        text = model.generate("ab", max_new_tokens=4, stop="zz").text
        assert "".join(model.stream("ab", max_new_tokens=4)) == text
        assert model(ids).shape == (2, 4, 260)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            model.generate("ab", max_new_tokens=4, params=host)
