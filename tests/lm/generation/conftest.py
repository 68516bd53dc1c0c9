import fake_writer
import pytest


@pytest.fixture(params=[0, 8], ids=["asking loop", "fixed loop"])
def steps(request, monkeypatch):
    """Both kinds of loops that write tokens: as on a CPU, and as on a GPU."""
    monkeypatch.setattr(fake_writer, "STEPS", request.param)
