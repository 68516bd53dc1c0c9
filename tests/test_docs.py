"""The documents are true: links resolve, lines are wrapped, the README's code runs, and docs/api.md
lists the public names."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for page in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "tests").rglob("*.md"),
    )
)
WIDTH = 100


def split_code(text):
    """The lines of a page outside code blocks, with their numbers, and the Python blocks."""
    prose, blocks, block, language = [], [], [], None
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("```"):
            if language == "python":
                blocks.append("\n".join(block))
            language, block = (line[3:] if language is None else None), []
        elif language is None:
            prose.append((number, line))
        else:
            block.append(line)
    return prose, blocks


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    prose, _ = split_code(path.read_text())
    headings = [re.sub(r"^#+ ", "", line) for _, line in prose if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_pages():
    assert {"README.md", "CHANGELOG.md", "design.md", "api.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    prose, _ = split_code(page.read_text())
    text = "\n".join(line for _, line in prose)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_wrapped(page):
    prose, _ = split_code(page.read_text())
    assert [n for n, line in prose if len(line) > WIDTH and not line.startswith("|")] == []


def test_every_module_has_its_tests():
    """They are in a file of its name, or tests/README.md says where."""
    modules = {
        str(path.relative_to(ROOT / "slidejax"))
        for path in (ROOT / "slidejax").rglob("*.py")
        if path.name != "__init__.py"
    }
    alone = {
        name
        for name in modules
        if not (ROOT / "tests" / name).with_name(f"test_{Path(name).name}").is_file()
    }
    page = (ROOT / "tests/README.md").read_text()
    elsewhere = dict(re.findall(r"^\| `(\S+)` \| `(\S+)` \|$", page, re.M))
    assert set(elsewhere) == alone
    assert [name for name in elsewhere.values() if not (ROOT / "tests" / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_have_a_head(page):
    """Rows without one are shown as text with bars in it."""
    prose, _ = split_code(page.read_text())
    lines = ["", *(line for _, line in prose), ""]
    starts = [i for i in range(1, len(lines) - 1) if lines[i][:1] == "|" != lines[i - 1][:1]]
    assert [lines[i] for i in starts if not lines[i + 1].startswith("|---")] == []


# --- the README's code ----------------------------------------------------------------------------


def linen_model():
    import flax.linen as nn

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(32)(nn.relu(nn.Dense(64)(x)))

    return MLP()


def nnx_model():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.Linear(64, 64, rngs=rngs)
            self.up = nnx.Linear(64, 128, rngs=rngs)
            self.head = nnx.Linear(128, 16, rngs=rngs)

    return Model(nnx.Rngs(0))


def text_model(folder):
    """A directory with a tiny decoder that has a tokenizer and a chat template."""
    from slidejax.lm import Decoder, save
    from slidejax.lm.decoder.examples import tiny
    from slidejax.lm.text.examples import byte_tokenizer

    # Sizes of the tiny Llama of transformers, so that calibration runs the same programs.
    sizes = {"hidden_size": 48, "intermediate_size": 104, "head_dim": 12, "query_scale": 12**-0.5}
    sizes |= {"num_layers": 1}
    model, tokenizer = tiny(vocab_size=260, max_positions=256, **sizes), byte_tokenizer()
    tokenizer.templates = {"default": "{{ messages[0].content }}"}
    save(Decoder(model.config, model.params, files=tokenizer.files()), folder)
    return folder


def test_a_file_stays_below_500_lines():
    """CONTRIBUTING.md says so."""
    kinds = ("*.py", "*.pyi", "*.cc", "*.h", "*.cu", "*.cuh", "*.md")
    files = [
        f
        for folder in ("slidejax", "cuda", "tests", "docs", "examples")
        for k in kinds
        for f in (ROOT / folder).rglob(k)
    ]
    files += [*ROOT.glob("*.md"), *(ROOT / "scripts").iterdir()]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    assert len(lengths) > 300
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_readme_code_runs(tmp_path, one_block_llama):
    """Every Python block of the README runs, in order, with the names that a reader would have."""
    pytest.importorskip("optax")
    pytest.importorskip("jinja2")
    from flax import nnx

    import slidejax as sj

    kernel = jax.random.normal(jax.random.key(0), (64, 32))
    x = jax.random.normal(jax.random.key(1), (4, 64))
    linen = linen_model()
    names = {
        "kernel": kernel,
        "x": x,
        "bias": jnp.zeros(32),
        "weight": jnp.ones(64),
        "tokens": np.random.default_rng(0).integers(0, 256, (4, 128)),
        "model": one_block_llama,
        "original": one_block_llama,
        "rngs": nnx.Rngs(0),
        "linen_model": linen,
        "variables": linen.init(jax.random.key(2), x),
        "nnx_model": nnx_model(),
        "original_nnx": nnx_model(),
        "params": {"kernel": sj.pack(kernel, "6:8"), "bias": jnp.zeros(32)},
        "path": tmp_path / "params",
        "folder": text_model(tmp_path / "model"),
        "out": tmp_path / "out",
    }
    _, blocks = split_code((ROOT / "README.md").read_text())
    assert len(blocks) > 5
    for block in blocks:
        block = block.replace("minutes=5", "steps=2")  # the same call, in a test's time
        exec(compile(block, "README.md", "exec"), names)

    w = sj.pack(kernel, "6:8", dtype="int8")
    assert (names["zeroed"] == sj.unpack(w)).all()
    assert len(names["report"].converted) == 2
    assert [choice.implementation for _, choice in sj.explain(sj.linear, x, w)] == ["dense"]


# --- docs/api.md ----------------------------------------------------------------------------------


def api():
    """(module, name, where the page says it is defined) for each public name of docs/api.md."""
    module = None
    for line in (ROOT / "docs" / "api.md").read_text().split("\n"):
        if line.startswith("## "):
            module = line[3:] if line.startswith("## slidejax") else None
        row = re.match(r"\| `(\w+)` \| .* \| `([\w.]+)` \|$", line)
        if module and row:
            yield module, row[1], row[2]


def test_api_lists_the_public_names():
    listed = {}
    for module, name, _ in api():
        listed.setdefault(module, set()).add(name)
    assert {"slidejax", "slidejax.prune", "slidejax.linen", "slidejax.train"} <= set(listed)
    for module, names in listed.items():
        assert names == set(importlib.import_module(module).__all__), module


def test_api_says_where_names_are_defined():
    wrong = []
    for module, name, where in api():
        thing = getattr(importlib.import_module(module), name)
        if inspect.ismodule(thing):
            defined = thing.__name__
        elif inspect.isclass(thing) or inspect.isfunction(thing):
            defined = thing.__module__
        else:  # constants and aliases know no module: it must at least have the name
            defined = where if getattr(importlib.import_module(where), name) is thing else None
        if defined != where:
            wrong.append((module, name, defined))
    assert not wrong


# --- docs/frontier.svg ----------------------------------------------------------------------------


def section(page, anchor):
    """The lines of a page below the heading with this anchor, up to the next heading."""
    lines, inside = [], False
    for line in (ROOT / "docs" / page).read_text().split("\n"):
        if re.match(r"#+ ", line):
            inside = re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") == anchor
        elif inside:
            lines.append(line)
    return lines


@pytest.fixture(scope="module")
def frontier():
    spec = importlib.util.spec_from_file_location("frontier", ROOT / "docs" / "frontier.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_frontier_has_figures_of_the_pages(frontier):
    recorded = frontier.recorded()
    for entry in (*recorded["quality"], recorded["megabytes"]):
        rows = [line.split("|")[1:-1] for line in section(*entry["page"].split("#"))]
        for pattern, value in entry["values"].items():
            named = [row for row in rows if row and row[0].strip(" `").startswith(pattern)]
            cells = {cell.strip() for row in named for cell in row[1:]}
            assert cells & {f"{value:.3f}", f"{value:.1f}"}, (entry["name"], pattern)
        cells = {cell.strip() for row in rows for cell in row[1:]}
        for mixes in (*entry.get("mixes", {}).values(), entry.get("recovered", {})):
            assert {f"{value:.3f}" for value in mixes.values()} <= cells


def test_the_table_of_the_frontier_is_what_is_drawn(frontier):
    smaller = frontier.sizes({}, frontier.recorded()["megabytes"]["values"])
    lines = section("accuracy.md", "quality-against-speed-and-size")
    for name, values in (("4,096 rows", frontier.speeds()), ("packed layers", smaller)):
        (row,) = [line for line in lines if line.startswith(f"| {name}")]
        cells = [float(cell) for cell in row.split("|")[2:-1]]
        assert cells == pytest.approx([values[p] for p in frontier.PATTERNS], abs=0.0051)


def test_the_frontier_is_drawn(frontier, tmp_path):
    pytest.importorskip("matplotlib")
    frontier.draw(tmp_path / "new.svg")
    new, kept = (
        (folder / name).read_text()
        for folder, name in ((tmp_path, "new.svg"), (ROOT / "docs", "frontier.svg"))
    )
    for text in [*frontier.PATTERNS, *(q["name"] for q in frontier.recorded()["quality"])]:
        assert text in new and text in kept
