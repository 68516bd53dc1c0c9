"""`slidejax eval --task humaneval`."""

import json

import pytest

pytest.importorskip("rich")
pytest.importorskip("tokenizers")

from command_line import error, output, run, write_decoder

# A tiny random model writes no Python, so the second problem asks for nothing that it could spoil.
PROBLEMS = [
    {
        "task_id": "add",
        "prompt": "def add(a, b):\n",
        "entry_point": "add",
        "test": "def check(f):\n    assert f(1, 2) == 3\n",
    },
    {
        "task_id": "anything",
        "prompt": "def f():\n    return 1\n# ",
        "entry_point": "f",
        "test": "def check(f):\n    assert f() == 1\n",
    },
]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    file = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return str(file)


FLAGS = ("--task", "humaneval", "--run-generated-code", "--max-new-tokens", "8")


def test_a_model_is_tested_and_compared(capsys, decoder, tasks, tmp_path):
    written = tmp_path / "completions.jsonl"
    flags = (*FLAGS, "--problems", tasks, "--samples", "3", "--completions", str(written))
    status, out, err = run(capsys, "eval", decoder, *flags, "--json")
    assert status == 0 and "running programs that the models write, 2 problems" in err
    figures = json.loads(out)
    assert figures["problems"] == 2 and figures["samples"] == 3
    records = [json.loads(line) for line in written.read_text().splitlines()]
    assert [r["task_id"] for r in records] == ["add"] * 4 + ["anything"] * 4
    assert [r["temperature"] for r in records] == [0, 0.2, 0.2, 0.2] * 2
    for i, task in enumerate(("add", "anything")):
        passed = [r["passed"] for r in records[4 * i : 4 * i + 4]]
        assert figures["passed"][task] == [passed[0], sum(passed[1:])]
    assert figures["greedy_passed"] == sum(r["passed"] for r in records[::4])
    assert output(capsys, "eval", decoder, *flags, "--json") == out  # the draws are the same
    other = output(capsys, "eval", decoder, *flags, "--seed", "1", "--temperature", "2", "--json")
    assert json.loads(other)["problems"] == 2


def test_the_table_shows_both_models(capsys, decoder, tasks, tmp_path):
    same = tmp_path / "same"
    same.symlink_to(decoder)
    flags = (*FLAGS, "--problems", tasks, "--samples", "0", "--limit", "1", "--against", decoder)
    shown = output(capsys, "eval", str(same), *flags)
    assert "of 1" in shown and "0, 0" in shown and "original float32" in shown


def test_programs_run_only_if_one_agrees(capsys, decoder):
    message = error(capsys, "eval", decoder, "--task", "humaneval")
    assert "runs programs that the models write" in message and "--run-generated-code" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*FLAGS, "--text", "README.md"), "--text goes with --task perplexity"),
        ((*FLAGS, "--prompt", "x"), "--prompt goes with --task perplexity"),
        (("--samples", "2"), "--samples goes with --task humaneval, not with --task perplexity"),
        (("--run-generated-code",), "--run-generated-code goes with --task humaneval"),
        ((*FLAGS, "--samples", "0", "--temperature", "1"), "--samples 0 asks for none"),
        ((*FLAGS, "--problems", "none.jsonl"), "none.jsonl"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(capsys, flags, message):
    assert message in error(capsys, "eval", "no model", *flags)


def test_a_prompt_that_does_not_fit_fails_at_once(capsys, decoder, tasks):
    flags = ("--task", "humaneval", "--run-generated-code", "--problems", tasks)
    assert "context of 64" in error(capsys, "eval", decoder, *flags)
