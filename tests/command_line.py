"""Commands run in process on a tiny model."""

import shutil

import jax
import pytest

from slidejax.commands import main as cli
from slidejax.lm import Decoder, save
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.text.examples import byte_tokenizer
from slidejax.weights.packed import SlideWeight

SENTENCES = (
    "The moon is the only natural satellite of the Earth. It turns once while it goes round. "
)


def write_files(folder, original, pattern, text):
    """Writes `dense` (a model), `out` (the model converted) and `text.txt`; returns the folder."""
    shutil.copytree(original, folder / "dense")
    convert = ["convert", str(folder / "dense"), str(folder / "out"), "--pattern", pattern]
    assert cli.main([*convert, "--data-free"]) == 0
    (folder / "text.txt").write_text(text)
    return folder


def write_decoder(folder, **changes):
    """Writes a tiny random decoder of a layer with a tokenizer of bytes; returns its directory."""
    model = tiny(**{"vocab_size": 260, "max_positions": 64, "num_layers": 1} | changes)
    save(Decoder(model.config, model.params, files=byte_tokenizer().files()), folder / "model")
    return str(folder / "model")


def run(capsys, *args):
    """`(status, standard output, standard error)` of a command."""
    capsys.readouterr()  # what fixtures have printed
    status = cli.main([str(a) for a in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def output(capsys, *args):
    """Standard output of a command that must succeed."""
    status, out, err = run(capsys, *args)
    assert status == 0, err
    return out


def error(capsys, *args):
    """The one line that a failing command says."""
    status, out, err = run(capsys, *args)
    lines = [line for line in err.splitlines() if "error:" in line]
    assert status == 1 and len(lines) == 1 and "Traceback" not in err and out == ""
    return lines[0]


def usage_error(capsys, *args):
    """The one line that a command says about arguments before it reads anything."""
    with pytest.raises(SystemExit) as stopped:
        run(capsys, *args)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert stopped.value.code == 2 and len(lines) == 1 and captured.out == ""
    return lines[0]


def packed(params):
    """The packed weights of a tree."""

    def is_weight(node):
        return isinstance(node, SlideWeight)

    return [w for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w)]


def layers():
    """(in, out) of all linear layers of the tiny Llama's block."""
    return [(48, 48), (48, 48), (48, 24), (48, 24), (48, 104), (48, 104), (104, 48)]


def packed_bytes(pattern, size, inputs, outputs):
    """Bytes of a packed weight, whose K is padded to blocks of eight groups.

    They are the values, one byte of zeros for each group that has some, and a float32 scale for
    each output.
    """
    kept, group = (4, 4) if pattern == "dense" else map(int, pattern.split(":"))
    groups = -(-inputs // (8 * group)) * 8
    return outputs * (groups * (kept * size + (kept < group)) + 4)
