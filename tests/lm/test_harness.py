"""The adapter for the evaluation harness, against figures computed row by row.

Where the real package is installed, it is used too.
"""

import dataclasses
import functools
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("transformers")

from slidejax import huggingface
from slidejax.lm import serving
from slidejax.lm.decoder.model import Decoder
from slidejax.lm.harness import SlideLM
from slidejax.lm.models import LoadedModel
from slidejax.lm.reading import LoadedDecoder, read_model


@dataclasses.dataclass
class Request:
    """A request, as the harness's `Instance` gives it to a model."""

    args: tuple


def ask(method, *args):
    return method([Request(a) for a in args])


@pytest.fixture(scope="module", params=["flax", "decoder"])
def loaded(request, tmp_path_factory, tiny_config, tiny_params, tiny_tokenizer):
    """The tiny Llama, converted, as a Flax model of transformers and as our own decoder."""
    model = huggingface.convert(huggingface.build(tiny_config, tiny_params), "6:8")
    if request.param == "flax":
        return LoadedModel(model, tiny_tokenizer, "tiny")
    path = tmp_path_factory.mktemp("harness") / "tiny"
    huggingface.write_pretrained(path, model, tiny_tokenizer)
    return read_model(path)


def vocabulary(loaded):
    if isinstance(loaded, LoadedDecoder):
        return loaded.tokenizer.backend.get_vocab()
    return loaded.tokenizer.get_vocab()


def text_of(loaded, ids):
    if isinstance(loaded, LoadedDecoder):
        return loaded.tokenizer.decode(ids)
    return loaded.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def lm(loaded):
    return SlideLM(loaded, batch_size=2, max_length=40, max_gen_toks=6)


@functools.cache
def program(model):
    call = serving.called(model)
    return jax.jit(lambda params, ids: call(ids, params=params).logits[0])


def log_probs(loaded, ids):
    """log p [position, vocabulary] of the token after each position, with packed weights."""
    row = np.zeros(
        (1, 128), np.int32
    )  # one length, one program: what follows a position does not reach it
    row[0, : len(ids)] = ids
    logits = np.asarray(program(loaded.model)(loaded.model.params, row), np.float64)[: len(ids)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_what_follows_a_row_does_not_reach_it(loaded):
    alone = program(loaded.model)(loaded.model.params, np.array([[5, 17, 3]]))
    logits = np.asarray(alone, np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(log_probs(loaded, [5, 17, 3]), expected, atol=1e-4)


def test_continuations(lm, loaded):
    pairs = [("The moon", " is round"), ("", "abc"), ("a ", "b"), ("x" * 60, "yz"), ("q", "")]
    got = ask(lm.loglikelihood, *pairs)
    for (context, continuation), (score, greedy) in zip(pairs, got, strict=True):
        ids = (loaded.encode(context) or [lm.prefix_token_id]) + loaded.encode(continuation)
        count = len(continuation) + len(context) - len(context.rstrip())
        ids = ids[-41:]
        rows = log_probs(loaded, ids[:-1] if len(ids) > 1 else ids)
        rows = rows[len(rows) - count :] if count else rows[:0]
        target = np.asarray(ids[len(ids) - count :], int)
        assert score == pytest.approx(rows[np.arange(count), target].sum(), rel=1e-4, abs=1e-4)
        assert greedy == bool((rows.argmax(-1) == target).all())
    likeliest = {
        c: int(log_probs(loaded, loaded.encode(c))[-1].argmax()) for c in "abcdefghijklmnop"
    }
    letter = {
        i: c
        for c, i in vocabulary(loaded).items()
        if c.isascii() and c.isprintable() and len(c) == 1
    }
    context, best = next((c, letter[i]) for c, i in likeliest.items() if i in letter)
    assert ask(lm.loglikelihood, (context, best)) == [
        (pytest.approx(log_probs(loaded, loaded.encode(context))[-1].max(), rel=1e-4), True)
    ]


def test_rolling_predicts_each_token_once(lm, loaded):
    text = (
        "The moon turns once while it goes round the Earth. " * 2
    )  # 102 tokens: windows of 40, 40 and 22
    (got,) = ask(lm.loglikelihood_rolling, (text,))
    ids = [lm.prefix_token_id, *loaded.encode(text)]
    expected, at = 0.0, 1
    for end in (41, 81, 103):
        start = max(end - 41, 0)
        rows = log_probs(loaded, ids[start : end - 1])
        expected += sum(rows[i - 1 - start, ids[i]] for i in range(at, end))
        at = end
    assert got == pytest.approx(expected, rel=1e-4)
    assert ask(lm.loglikelihood_rolling, ("",)) == [0]


def test_generation_stops_where_it_should(lm, loaded):
    prompts = ["ab", "The moon is the only natural satellite", "abc" * 30]
    free = ask(lm.generate_until, *((p, {"max_gen_toks": 5}) for p in prompts))
    for prompt, text in zip(prompts, free, strict=True):
        ids = loaded.encode(prompt)[-35:]
        for _ in range(5):
            ids.append(int(log_probs(loaded, ids)[-1].argmax()))
            if ids[-1] == lm.eot_token_id:
                ids.pop()
                break
        start = min(len(prompt), 35)
        assert text == text_of(loaded, ids[start:])
    stop = free[0][1]
    (stopped,) = ask(lm.generate_until, ("ab", {"until": [stop], "max_gen_toks": 5}))
    assert stopped == free[0][: free[0].index(stop)]
    sampled = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 5}
    assert ask(lm.generate_until, ("ab", sampled))[0] != free[0]
    assert len(ask(lm.generate_until, ("ab", {}))) == 1  # max_gen_toks of the model


def test_what_the_harness_wants_to_know(lm):
    assert (lm.eot_token_id, lm.prefix_token_id, lm.max_length, lm.tokenizer_name) == (
        257,
        256,
        40,
        "tiny",
    )
    assert lm.chat_template(False) is None


def test_bad_input(lm, loaded):
    with pytest.raises(ValueError, match="does not fit max_length 40"):
        ask(lm.loglikelihood, ("a", "b" * 50))
    with pytest.raises(ValueError, match=r"max_length must be in 2\.\.128"):
        SlideLM(loaded, max_length=200)
    for name in ("batch_size", "max_gen_toks"):
        for bad in (0, -1, 1.5, "x", None, float("inf")):
            with pytest.raises(ValueError, match=f"{name} must be a positive whole number"):
                SlideLM(loaded, **{name: bad})
    assert SlideLM(loaded, batch_size="2", max_gen_toks="3").batch_size == 2
    if isinstance(loaded, LoadedDecoder):
        bare = LoadedDecoder(Decoder(loaded.model.config, loaded.model.params), "bare")
    else:
        bare = dataclasses.replace(loaded, tokenizer=None)
    with pytest.raises(ValueError, match="without a tokenizer"):
        SlideLM(bare)
    with pytest.raises(ValueError, match="'num_beams': 4"):
        ask(lm.generate_until, ("a", {"num_beams": 4}))
    with pytest.raises(ValueError, match="repetition_penalty"):
        ask(lm.generate_until, ("a", {"repetition_penalty": 1.1}))


def test_options_of_a_request_are_obeyed(lm):
    greedy = ask(lm.generate_until, ("ab", {"max_gen_toks": 5}))
    hot = {"max_gen_toks": 5, "do_sample": True, "temperature": 9.0}
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        assert ask(lm.generate_until, ("ab", {**hot, **options})) == greedy
    for options in (
        {"num_beams": 1},
        {"do_sample": False, "temperature": 9.0},
        {"do_sample": True, "temperature": 0.0},
        {"top_p": None},
    ):
        assert ask(lm.generate_until, ("ab", {**options, "max_gen_toks": 5})) == greedy
    assert lm._generation("ab", {"do_sample": True})[2][1:] == (1.0, 0, 1.0)


def test_a_context_begins_with_the_start_where_it_is_asked_for(loaded):
    """The tiny tokenizer names a start of text and does not put it there; now it does."""
    bare, begun = SlideLM(loaded, batch_size=2), SlideLM(loaded, batch_size=2, add_bos_token=True)
    assert begun._start == loaded.start == []  # the tokenizer adds none
    begun._start = [256]
    assert begun._encode_pair("ab", "c") == ([256, *loaded.encode("ab")], loaded.encode("c"))
    assert begun._encode_pair("<s>ab", "c")[0] == [256, *loaded.encode("ab")]
    assert begun._generation("ab", {"max_gen_toks": 5})[0] == [256, *loaded.encode("ab")]
    long = begun._generation("ab" * 100, {"max_gen_toks": 100})[0]
    assert long == [256, *loaded.encode("ab" * 100)[-27:]]
    assert bare._encode_pair("ab", "c")[0] == loaded.encode("ab")


def test_it_imports_without_the_harness():
    code = (
        "import sys; sys.modules['lm_eval'] = None; import slidejax.lm_eval as m; "
        "print(m.SlideLM.__mro__[1].__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "object"


def test_with_the_harness(lm, tmp_path, monkeypatch):
    """A task of our own, from a file: nothing is downloaded."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import json

    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    assert get_model("slidejax") is SlideLM
    lines = [{"question": "ab", "choices": ["c", "d"], "answer": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    results = simple_evaluate(
        lm, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    assert (
        results["results"]["tiny_choice"]["acc,none"] == 0.5
    )  # the same choice each time, right every second time
