"""Loading the compiled library, with modules that are made up."""

import sys
import types

import jax
import pytest

import slidejax
from slidejax.ops.cuda import library

cpu_only = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="tests what a machine without a GPU does"
)


@pytest.fixture
def compiled(monkeypatch):
    """`compiled(ffi_api)`: loads a module that was built against a version of the interface.

    Returns its result and what it registered. The library that is installed stays as it was loaded.
    """
    registered = []
    monkeypatch.setattr(jax.ffi, "register_ffi_type", lambda name, *a, **k: registered.append(name))
    monkeypatch.setattr(
        jax.ffi, "register_ffi_target", lambda name, *a, **k: registered.append(name)
    )

    def install(ffi_api):
        module = types.ModuleType("slidejax._cuda")
        module.__spec__ = types.SimpleNamespace(name="slidejax._cuda")
        module.build_info = lambda: {
            "ffi_api": ffi_api,
            "jaxlib": "0.0.1",
            "architectures": "90a-real",
            "hopper": True,
        }
        module.types = lambda: {"a type": object()}
        module.registrations = lambda: {"a call": object()}
        monkeypatch.setitem(sys.modules, "slidejax._cuda", module)
        monkeypatch.setattr(slidejax, "_cuda", module, raising=False)
        loaded = library.load.__wrapped__()
        monkeypatch.setattr(library, "load", lambda: loaded)
        return loaded, registered

    return install


def test_a_library_for_this_jaxlib_is_registered(compiled):
    (module, reason), registered = compiled(library._ffi_interface())
    assert reason is None and module.build_info() == library.build_info()
    assert registered == ["a type", "a call"]


def test_a_library_for_a_later_jaxlib_is_refused(compiled):
    major, minor = library._ffi_interface()
    (module, reason), registered = compiled((major, minor + 1))
    assert module is None and f"built against FFI {major}.{minor + 1} (jaxlib 0.0.1)" in reason
    assert f"this jaxlib has FFI {major}.{minor}" in reason and not registered
    assert library.build_info() is None


@cpu_only
def test_without_a_gpu_programs_may_still_be_lowered_for_one():
    assert not library.on_gpu() and library.unusable() is None
