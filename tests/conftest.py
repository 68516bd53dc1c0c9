"""Settings of all tests, and a tiny Llama for many of them."""

import atexit
import gc
import os
import re
import shutil
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path


def _gpu_is_used():
    """Whether JAX will run on a GPU. Programs are timed there, so nothing below is changed."""
    cpu_only = os.environ.get("JAX_PLATFORMS") == "cpu"
    return not cpu_only and bool(list(Path("/dev").glob("nvidia[0-9]*")))


def _share_compiled_programs():
    """Lets the processes of a test run share compiled programs, so that each is compiled once.

    The processes are those of pytest-xdist and those that tests start. The programs are in a
    directory of this run alone, unless JAX_COMPILATION_CACHE_DIR names one, which is kept for the
    next run.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="slidejax-tests-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


# Tests compile thousands of small programs that run once. With these flags XLA compiles one for a
# CPU in a third of the time: LLVM does not optimise it, each computation is written as plain loops
# instead of by the compiler for fusions, and a program is not cut into parts for threads. What a
# program computes stays the same, operation by operation; only its speed changes. XLA_FLAGS comes
# later and wins. `tests/ops/test_optimized.py` and the examples run programs as users have them.
_QUICK_TO_COMPILE = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# XLA ends a process that names a flag which it does not have. jaxlib 0.11.2 has lost this one.
if tuple(map(int, re.findall(r"\d+", version("jaxlib"))[:3])) < (0, 11, 1):
    _QUICK_TO_COMPILE.append("--xla_cpu_use_fusion_emitters=false")

# The tests' products in NumPy are small. Threads of OpenBLAS would mostly wait, and a core is busy
# while they do.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# All this is set before JAX starts. The sharding tests run on eight CPU devices that XLA makes up.
_flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if not _gpu_is_used():
    _share_compiled_programs()
    _flags = [*_QUICK_TO_COMPILE, *_flags]
os.environ["XLA_FLAGS"] = " ".join(_flags)

import cases
import hypothesis
import jax
import pytest
from jax._src.interpreters import mlir

# An example has shapes of its own, so that each compiles its programs.
_EXAMPLES, _EVERY_EXAMPLE = 12, 100


def _examples_of_properties(count):
    """How many examples of each property run where a test does not say it; always the same ones."""
    hypothesis.settings.register_profile(
        "slidejax", deadline=None, max_examples=count, derandomize=True
    )
    hypothesis.settings.load_profile("slidejax")


_examples_of_properties(_EXAMPLES)  # for decorators, which are read before pytest's options


# Each program takes some of the 65,530 memory maps that Linux gives a process; without more of them
# the next one ends in a segmentation fault. It takes memory, too.
_MANY_PROGRAMS = 1000


class _FewPrograms:
    """Drops the programs of a process that has lowered many; a plugin, so for doctests too.

    JAX 0.10 lowers each program in a new MLIR context and keeps it. To make one takes longer than
    to lower a small program, and MLIR looks through all that are kept: the more there are, the
    longer the next one takes. So the programs that are dropped together share one here. Threads
    have new ones: XLA calls a partitioner in a thread while the main one waits.
    """

    def __init__(self):
        self.lowered = 0
        self.shared = None
        jax.monitoring.register_event_duration_secs_listener(self.count)
        if hasattr(mlir, "make_ir_context"):  # private: without it, tests only take longer
            self.new_context = mlir.make_ir_context
            mlir.make_ir_context = self.context

    def context(self):
        if threading.get_ident() != threading.main_thread().ident:
            return self.new_context()
        self.shared = self.shared or self.new_context()
        return self.shared

    def count(self, event, seconds, **_):
        self.lowered += event == "/jax/core/compile/jaxpr_to_mlir_module_duration"

    def pytest_runtest_logfinish(self):
        if self.lowered > _MANY_PROGRAMS:
            jax.clear_caches()
            self.lowered = 0
            self.shared = None


def pytest_configure(config):
    config.pluginmanager.register(_FewPrograms())
    if config.getoption("--every-case"):
        _examples_of_properties(_EVERY_EXAMPLE)
        cases.every_case = True


def pytest_collection_finish():
    """Has the garbage collector look less often, and never at modules and collected tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # a program that JAX traces is many objects, most of them kept


def pytest_addoption(parser):
    parser.addoption(
        "--every-case",
        action="store_true",
        help="run every case of the tests that otherwise take some of them, and more examples of each "
        "property",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leaves out what is marked `every_case`, and skips tests of a GPU where there is none."""
    if not config.getoption("--every-case"):
        left_out = {item for item in items if item.get_closest_marker("every_case")}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: jax sees only " + jax.default_backend())
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_config():
    """A Llama of two layers with a tied head; its widths fill no whole block of any pattern."""
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=48,
        intermediate_size=104,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_theta=50000.0,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        architectures=["LlamaForCausalLM"],
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    """Parameters of the tiny Llama: nested dicts of float32 NumPy arrays, without the tied head."""
    import numpy as np
    from transformers import FlaxLlamaForCausalLM

    shapes = FlaxLlamaForCausalLM(tiny_config, _do_init=False).params_shape_tree
    random = np.random.default_rng(0)

    def draw(path, leaf):
        spread = 1.0 if "embedding" in jax.tree_util.keystr(path) else 2.0 / np.sqrt(leaf.shape[0])
        return (random.normal(size=leaf.shape) * spread + (leaf.ndim == 1)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return {"model": params["model"]}


@pytest.fixture
def tiny_llama(tiny_config, tiny_params):
    """A new FlaxLlamaForCausalLM with those parameters, its head tied to the embedding."""
    from slidejax.huggingface import build

    return build(tiny_config, tiny_params)


def _one_block(config, params):
    """The model with its first block alone, where a second one is more of the same to compile."""
    import copy

    from slidejax.huggingface import build

    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    model = params["model"]
    return build(config, {"model": {**model, "layers": {"0": model["layers"]["0"]}}})


@pytest.fixture
def one_block_llama(tiny_config, tiny_params):
    """The same with one block."""
    return _one_block(tiny_config, tiny_params)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory, tiny_config, tiny_params, tiny_tokenizer):
    """A directory with one block of that model and its tokenizer; tests only read it."""
    from slidejax.huggingface import write_pretrained

    folder = tmp_path_factory.mktemp("tiny") / "dense"
    write_pretrained(folder, _one_block(tiny_config, tiny_params), tiny_tokenizer)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token for each byte, and three special ones."""
    pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<pad>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
