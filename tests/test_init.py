"""The package's front door: every public name is there, and importing it loads nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import slidejax


def test_every_public_name_can_be_used():
    for name in (*slidejax.__all__, *slidejax._HOME, *slidejax._MODULES):
        assert getattr(slidejax, name) is not None
    assert set(slidejax.__all__) <= set(dir(slidejax))
    assert {"recover", "linen", "tune"} <= set(dir(slidejax))


def test_every_module_of_the_manual_is_there_without_importing_it():
    manual = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
    headings = re.findall(r"^## slidejax\.(\w+)$", manual, re.MULTILINE)
    assert headings and set(headings) <= set(slidejax._MODULES)


def test_what_a_type_checker_sees_is_what_there_is():
    """The names under TYPE_CHECKING and the table that `__getattr__` reads say the same."""
    tree = ast.parse(Path(slidejax.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        alias.name: node.module.removeprefix("slidejax").removeprefix(".")
        for node in block.body
        for alias in node.names
    }
    assert typed == {**dict.fromkeys(slidejax._MODULES, ""), **slidejax._HOME}


def test_importing_the_package_loads_nothing():
    code = "import sys, slidejax; print(sorted({'jax', 'flax', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
