"""The rows of the demo: programs that they share, and one conversion for all dtypes."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from command_line import SENTENCES

from slidejax import huggingface
from slidejax.lm import demo
from slidejax.lm.evaluate import evaluate
from slidejax.lm.models import load_model
from slidejax.rules import Rule

TEXT = SENTENCES * 2


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="on a GPU each pattern has its own kernel"
)
def test_demo_rows_share_programs(monkeypatch, tiny_directory):
    loaded, compiled, lower = load_model(tiny_directory), [], demo.Generator.compile

    def count(generator, *args, **kwargs):
        before = len(generator._compiled)
        lower(generator, *args, **kwargs)
        compiled.extend([0] * (len(generator._compiled) - before))

    monkeypatch.setattr(demo.Generator, "compile", count)
    ids = np.asarray(loaded.encode(TEXT), np.int32)[:61]
    with ThreadPoolExecutor(1) as pool:
        rows = [row for row, _ in demo.rows(loaded, ids, pool, window=30)]
    assert [row.pattern for row in rows[1:]] == [
        p for p in ("14:16", "6:8", "4:6", "2:4") for _ in range(2)
    ]
    assert len(compiled) == 3  # the original model, int8, float32
    for row in rows[3:5]:  # what `evaluate` finds with the packed form, converted alone
        alone = huggingface.convert(loaded.model, Rule("6:8", row.dtype))
        assert evaluate(alone, ids, window=30).perplexity == pytest.approx(row.perplexity, rel=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "bfloat16", None])
def test_one_conversion_serves_every_dtype(tiny_llama, dtype):
    got, seconds = demo._in_dtype(huggingface.convert(tiny_llama, Rule("6:8", None)), dtype)
    jax.tree.map(
        np.testing.assert_array_equal,
        got.params,
        huggingface.convert(tiny_llama, Rule("6:8", dtype)).params,
    )
    assert seconds > 0 or dtype is None
