"""The parts that tests of texts share."""

import pytest


@pytest.fixture(scope="session")
def training_text():
    """Text to train on, with a part of the docstrings; all of Python's library is parsed for it."""
    from slidejax.lm import texts

    return texts.training(0.02)
