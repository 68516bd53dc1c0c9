"""A model, the model converted, and a text, for all commands; tests only read them."""

import pytest


@pytest.fixture(scope="session")
def model(tiny_directory):
    """The directory of the tiny Llama."""
    return str(tiny_directory)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file of about 180 tokens."""
    from command_line import SENTENCES

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(SENTENCES * 2)
    return str(path)


@pytest.fixture(scope="session")
def out(tmp_path_factory, model):
    """The directory of the tiny Llama converted to 6:8."""
    pytest.importorskip("rich")
    from slidejax.commands import main as cli

    path = str(tmp_path_factory.mktemp("converted") / "out")
    assert cli.main(["convert", model, path, "--data-free"]) == 0
    return path
