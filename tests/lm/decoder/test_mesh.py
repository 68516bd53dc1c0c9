"""A decoder whose weights are split over a mesh computes and writes what one on one device does."""

import contextlib
import functools
import warnings

import jax
import numpy as np
import pytest
from cases import some
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import slidejax as sj
from slidejax.lm.decoder.config import Rope
from slidejax.lm.decoder.examples import tiny
from slidejax.lm.decoder.fuse import fuse
from slidejax.lm.text.examples import byte_tokenizer
from slidejax.variants.prepared import weights_of
from slidejax.weights.packed import LinearWeight, SlideWeight

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")

# Inputs are split by whole blocks of 64. There are fewer heads of keys than devices.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 8, "vocab_size": 260}
SIZES |= {"num_kv_heads": 2, "head_dim": 32, "max_positions": 64}
# Nearly all of the time goes into compiling, so a decoder has one layer where a second is as the
# first. Two are between the layouts of int8, and where a window or a rotation differs.
MODELS = {
    "llama": {},
    "one layer": {"num_layers": 1},
    "gemma": {
        "tied": True,
        "qk_norm": True,
        "sandwich_norm": True,
        "windows": (6, None),
        "ropes": (Rope(300.0), Rope(10000.0, (8.0,))),
        "activation": "gelu_tanh",
    },
    "qwen": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
}
WEIGHTS = {
    "float32": None,
    "bfloat16": None,
    "int8": sj.Rule("6:8", qdtype="int8"),
    "e4m3": sj.Rule("6:8", qdtype="float8_e4m3fn"),
    "bfloat16 packed": sj.Rule("2:4", qdtype=None),
    "dense": sj.Rule("dense", qdtype="int8"),
}
PACKED_FLOATS = {"float32 packed": sj.Rule("6:8", qdtype=None)}
# How axes of the mesh split kernels [in, out].
LAYOUTS = {
    "outputs": (None, "model"),
    "inputs": ("model", None),
    "both": ("data", "model"),
    "outputs, two axes": (None, ("data", "model")),
}
LIKELY = ("outputs", "both")
# Those that a plain run takes.
MEET = [("float32", "outputs"), ("bfloat16", "both"), ("e4m3", "outputs")]
MEET += [("bfloat16 packed", "both"), ("dense", "both")]
PROMPTS = ["The moon is", "One"]


def mesh(kind=AxisType.Auto):
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    return Mesh(devices, ("data", "model"), axis_types=(kind, kind))


def placed(params, layout, mesh=mesh):
    """Parameters over the mesh; vectors and embeddings, whose rows are tokens, too."""
    inputs, outputs = LAYOUTS[layout]

    def put(path, leaf):
        if isinstance(leaf, SlideWeight):
            specs = leaf.partition_spec(out=outputs, k=inputs)
        else:
            specs = P(inputs, outputs) if leaf.ndim == 2 else P(outputs)
        # from the host: cutting what lies on a device would be a program for each shape
        on = lambda a, spec: jax.device_put(np.asarray(a), NamedSharding(mesh(), spec))  # noqa: E731
        return jax.tree.map(on, leaf, specs)

    is_weight = lambda leaf: isinstance(leaf, LinearWeight)  # noqa: E731
    return jax.tree_util.tree_map_with_path(put, params, is_leaf=is_weight)


@functools.cache
def of_kind(weights, architecture="one layer"):
    dtype = "bfloat16" if "bfloat16" in weights else "float32"
    model = tiny(dtype=dtype, **SIZES, **MODELS[architecture])
    model = sj.lm.Decoder(model.config, model.params, files=byte_tokenizer().files())
    rule = (WEIGHTS | PACKED_FLOATS)[weights]
    return model if rule is None else sj.lm.convert(model, rule)


def written(model, **options):
    return [c.tokens for c in model.generate(PROMPTS, max_new_tokens=8, ends=(), **options)]


def close(model):
    """How far logits may be apart, of the largest one.

    Sums in another order change a float a little. Then now and then another 8-bit code is nearest.
    """
    codes = any(w.dtype.itemsize == 1 for w in weights_of(model.params))
    return 0.05 if codes or model.dtype != np.float32 else 1e-5


def agrees(model, other, prompts=((1, 2, 3, 4, 5), (6,))):
    """Logits agree but for the order of sums, and what is written is likeliest in both."""
    ids = np.arange(24).reshape(2, 12)
    expected, got = (np.asarray(m(ids), np.float32) for m in (model, other))
    largest = np.abs(expected).max()
    assert np.abs(got - expected).max() <= close(model) * largest
    assert np.median(np.abs(got - expected)) <= (1e-2 if model.dtype != np.float32 else 1e-5)
    made_of_all = other.generate([*map(list, prompts)], max_new_tokens=6, ends=())
    texts = np.zeros_like(ids)  # the same program; nobody sees what follows
    for text, prompt, made in zip(texts, prompts, made_of_all, strict=True):
        text[: len(prompt) + 6] = [*prompt, *made.tokens]
    for logits, prompt, made in zip(
        np.asarray(model(texts), np.float32), prompts, made_of_all, strict=True
    ):
        assert len(made.tokens) == 6
        for at, token in enumerate(made.tokens, len(prompt) - 1):
            assert logits[at, token] >= logits[at].max() - close(model) * largest


@pytest.mark.parametrize(
    ("weights", "layout"),
    [("int8", layout) for layout in LAYOUTS]
    + some(MEET, [weights for weights in WEIGHTS if weights != "int8"], LIKELY),
)
def test_logits_and_what_is_written(weights, layout):
    two = weights == "int8" and layout in ("outputs", "both")
    model = of_kind(weights, "llama" if two else "one layer")
    agrees(model, model.with_params(placed(model.params, layout)))


@pytest.mark.parametrize(
    ("architecture", "layout"),
    some([("gemma", "outputs"), ("qwen", "both")], ["gemma", "qwen"], LIKELY),
)
def test_every_kind_of_decoder(architecture, layout):
    model = of_kind("int8", architecture)
    agrees(model, model.with_params(placed(model.params, layout)))


@pytest.mark.parametrize(
    ("layout", "made"),
    some([("outputs", fuse), ("inputs", sj.prepare)], ["outputs", "inputs"], [fuse, sj.prepare]),
)
def test_forms_streams_and_the_cache(layout, made):
    """Fused and prepared parameters, an 8-bit cache, and text as it comes."""
    model = of_kind("float32 packed")
    params = placed(model.params, layout)
    split = model.with_params(params)
    assert written(split, params=made(params)) == written(model)
    if made is fuse:
        assert written(split, cache_dtype="int8") == written(model, cache_dtype="int8")
    else:
        pieces = split.stream(PROMPTS[0], max_new_tokens=8)
        assert "".join(pieces) == model.generate(PROMPTS[0], max_new_tokens=8).text


@pytest.mark.parametrize(("weights", "inside"), [("float32", False), ("int8", True)])
def test_it_writes_on_a_mesh_with_explicit_axes(weights, inside):
    """`jax.make_mesh` makes them."""
    model, on = of_kind(weights), lambda: mesh(AxisType.Explicit)
    split = model.with_params(placed(model.params, "both", on))
    assert jax.typeof(split.params["model"]["norm"]["weight"]).sharding.spec == P("model")
    with jax.set_mesh(on()) if inside else contextlib.nullcontext():
        assert written(split) == written(model)


def test_saved_from_a_mesh_it_is_the_same_model(tmp_path):
    model = of_kind("int8")
    sj.lm.save(model.with_params(placed(model.params, "both")), tmp_path / "split")
    again = sj.lm.load(tmp_path / "split")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_inputs_that_do_not_divide_into_blocks_are_gathered():
    """A pattern has blocks of its own: 256 inputs are no whole number of blocks of 48."""
    model = sj.lm.convert(tiny(**SIZES, num_layers=1), sj.Rule("4:6", qdtype="int8"))
    with pytest.raises(ValueError, match="whole number of blocks of 48"):
        placed(model.params, "inputs")

    def put(leaf):
        if not isinstance(leaf, SlideWeight):
            return leaf
        cut = NamedSharding(mesh(), P(None, "model"))
        return leaf.replace(values=jax.device_put(leaf.values, cut))

    is_weight = lambda leaf: isinstance(leaf, LinearWeight)  # noqa: E731
    split = jax.tree.map(put, model.params, is_leaf=is_weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agrees(model, model.with_params(split))
