"""Commands run in process on a tiny model."""

import shutil

from slidejax.commands import main as cli

SENTENCES = (
    "The moon is the only natural satellite of the Earth. It turns once while it goes round. "
)


def write_files(folder, original, pattern, text):
    """A model, one converted to a pattern, and a text: `dense`, `out` and `text.txt` in the folder, which is returned."""
    shutil.copytree(original, folder / "dense")
    assert (
        cli.main(["convert", str(folder / "dense"), str(folder / "out"), "--pattern", pattern]) == 0
    )
    (folder / "text.txt").write_text(text)
    return folder


def run(capsys, *args):
    """`(status, standard output, standard error)` of a command."""
    capsys.readouterr()
    status = cli.main([str(a) for a in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err
