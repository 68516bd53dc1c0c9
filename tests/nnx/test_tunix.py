"""google-tunix with our layers: its models convert, and its Llama 3 trains and samples on a mesh.

Needs google-tunix, which the extra `ecosystem` installs. The specs are those that tunix gives its
own weights: batches and inputs are cut over "fsdp", outputs over "tp".
"""

import contextlib
import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import slidejax as sj

pytest.importorskip("tunix", reason="needs google-tunix, the extra ecosystem")

SIZES = {
    "num_layers": 1,
    "embed_dim": 64,
    "hidden_dim": 128,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
}
ROPE = {"vocab_size": 64, "rope_theta": 10000, "norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("module", "name", "settings", "packed", "dense"),
    [
        ("llama3", "Llama3", ROPE, 7, {"embedder/input_embedding"}),
        ("qwen2", "Qwen2", ROPE, 7, {"embedder/input_embedding"}),
        ("qwen3", "Qwen3", ROPE, 7, {"embedder/input_embedding"}),
        (
            "qwen3",
            "Qwen3",
            {**ROPE, "num_experts": 4, "num_experts_per_tok": 2},
            4,
            {
                "embedder/input_embedding",
                *(f"layers/0/mlp/{name}_proj" for name in ("gate", "up", "down")),
            },
        ),
        (
            "gemma3",
            "Gemma3",
            {"num_embed": 64, "sliding_window_size": 8},
            6,
            {"embedder/input_embedding"},
        ),
    ],
    ids=["llama3", "qwen2", "qwen3", "qwen3-moe", "gemma3"],
)
def test_models_of_tunix_convert(module, name, settings, packed, dense):
    library = importlib.import_module(f"tunix.models.{module}.model")
    config = library.ModelConfig(**SIZES, **settings)
    model = getattr(library, name)(config, rngs=nnx.Rngs(0))
    report = sj.Report()
    sparse = sj.nnx.convert(model, "dense", report=report)
    assert len(report.converted) == packed and set(report.unpacked) == dense
    ids = jnp.ones((2, 8), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((8, 8), bool)), (2, 8, 8))
    want = model(ids, positions, None, mask)[0].astype(jnp.float32)
    got = sparse(ids, positions, None, mask)[0].astype(jnp.float32)
    assert jnp.abs(got - want).max() < 0.1 * jnp.abs(want).max()
    report = sj.Report()
    calibrated = sj.prune.convert(model, "6:8", [(ids, positions, None, mask)], report=report)
    assert len(report.converted) == packed and "layer by layer" in report.notes[0]
    assert jnp.isfinite(calibrated(ids, positions, None, mask)[0]).all()


# --- Llama 3 on a mesh ----------------------------------------------------------------------------

EIGHT = pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 CPU devices")
END, PAD = 1, 0
STEPS = 4
# Adam whose steps do not hang on the sign of a gradient that is nearly zero.
OPTIMISER = optax.adam(3e-3, eps=1e-3)


class Letters:
    """A tokenizer with one id for each character."""

    def encode(self, text):
        return [2 + ord(letter) % 62 for letter in text]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def bos_id(self):
        return 2

    def eos_id(self):
        return END

    def pad_id(self):
        return PAD


def llama(columns=256, is_sampling=False):
    """A Llama 3 of tunix with random weights; tunix itself begins with zeros in the MLP."""
    library = importlib.import_module("tunix.models.llama3.model")
    config = library.ModelConfig(
        num_layers=2,
        embed_dim=columns,
        hidden_dim=2 * columns,
        num_heads=4,
        head_dim=columns // 4,
        num_kv_heads=2,
        shd_config=library.ShardingConfig.get_default_sharding(is_sampling),
        **ROPE,
    )
    model = library.Llama3(config, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(1), 200)
    kernels = (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Param))
    for key, kernel in zip(keys, kernels, strict=False):
        shape = kernel.get_value().shape
        if len(shape) > 1:
            kernel.set_value(jax.random.normal(key, shape) / np.sqrt(columns))
    return model


def mesh_of(fsdp, tp):
    return Mesh(np.array(jax.devices("cpu")[: fsdp * tp]).reshape(fsdp, tp), ("fsdp", "tp"))


def cut(model, mesh):
    """The model with each leaf cut as its names say: tunix's own way to place a model."""
    graph, state = nnx.split(model)
    specs = nnx.get_partition_spec(state)
    placed = jax.tree.map(
        lambda leaf, s: jax.device_put(leaf, NamedSharding(mesh, s)), state, specs
    )
    return nnx.merge(graph, placed)


def trained(model, mesh=None):
    """The losses of some steps of tunix's own trainer, and the model after them."""
    trainer_of = importlib.import_module("tunix.sft.peft_trainer")
    losses = []

    class Watch:
        def on_train_step_end(self, trainer, step, loss):
            losses.append(float(loss))

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    config = trainer_of.TrainingConfig(eval_every_n_steps=100, max_steps=STEPS)
    trainer = trainer_of.PeftTrainer(model, OPTIMISER, config)
    trainer.with_training_hooks(Watch())

    def inputs(batch):
        ids = batch["input_tokens"]
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
        return {
            "input_tokens": ids,
            "input_mask": jnp.ones(ids.shape, bool),
            "positions": positions,
            "attention_mask": jnp.broadcast_to(causal, (len(ids), *causal.shape)),
        }

    trainer.with_gen_model_input_fn(inputs)
    ids = np.random.default_rng(0).integers(2, 64, (8, 16)).astype(np.int32)
    batches = [{"input_tokens": ids}] * STEPS
    if mesh is None:
        trainer.train(batches)
    else:
        with mesh:
            trainer.train(batches)
    return losses, model


def converted(model, kind):
    """The model with packed weights that can be trained, in one of three ways."""
    if kind == "floats":
        return sj.nnx.convert(model, sj.Rule("6:8", None))
    packed = sj.nnx.convert(model, "6:8")
    if kind == "masters":
        return sj.nnx.map_weights(packed, sj.trainable.masters)
    add = functools.partial(sj.adapters.add, rank=4)
    return sj.nnx.map_weights(packed, add)


def leaves(model, kinds):
    return dict(nnx.to_flat_state(nnx.state(model, kinds)))


@EIGHT
@pytest.mark.parametrize(("fsdp", "tp"), [(8, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("kind", ["masters", "floats", "adapters"])
def test_llama_trains_with_fsdp_as_on_one_device(kind, fsdp, tp):
    mesh, model = mesh_of(fsdp, tp), llama(512 if fsdp == 8 else 256)
    kinds = nnx.LoRAParam if kind == "adapters" else nnx.Param
    before = leaves(converted(model, kind), kinds)
    want, alone = trained(converted(model, kind))
    got, sharded = trained(cut(converted(model, kind), mesh), mesh)
    assert len(want) == STEPS and all(a > b for a, b in itertools.pairwise(want))
    # A rounding of 8-bit activations or weights may fall on the other side.
    np.testing.assert_allclose(got, want, rtol=1e-4 if kind == "floats" else 1e-2)
    after, expected = leaves(sharded, kinds), leaves(alone, kinds)
    moved = {
        path: np.abs(np.asarray(after[path]) - np.asarray(before[path])).max() for path in after
    }
    assert min(moved.values()) > 0
    for path, leaf in after.items():
        difference = np.abs(np.asarray(leaf) - np.asarray(expected[path])).mean()
        assert difference < 0.05 * moved[path], path
    if kind != "adapters":
        values = sharded.layers[0].mlp.up_proj.values.get_value()
        share = values.addressable_shards[0].data.size
        assert share * fsdp * tp == values.size, "the steps keep the cut"


def sampled(model, mesh=None):
    """The tokens and logits that tunix's Sampler gives two prompts."""
    sampler_of = importlib.import_module("tunix.generate.sampler")
    config = sampler_of.CacheConfig(cache_size=32, num_layers=2, num_kv_heads=2, head_dim=64)
    sampler = sampler_of.Sampler(model, Letters(), config)
    sampler.transformer_state = nnx.variables(model)  # as tunix hands over trained weights
    with contextlib.nullcontext() if mesh is None else mesh:
        found = sampler(["the moon is", "one, two"], 12, return_logits=False)
    return [np.asarray(tokens).tolist() for tokens in found.tokens]


@EIGHT
@pytest.mark.parametrize("is_sampling", [False, True], ids=["as trained", "tunix's for sampling"])
@pytest.mark.parametrize("prepared", [False, True], ids=["packed", "prepared"])
def test_llama_samples_on_a_mesh_as_on_one_device(is_sampling, prepared):
    mesh = mesh_of(4, 2)
    sparse = sj.nnx.convert(llama(is_sampling=is_sampling), "6:8")
    if prepared:
        sparse = sj.nnx.map_weights(sparse, functools.partial(sj.prepare, implementation="dense"))
    want = sampled(sparse)
    assert all(len(tokens) == 12 for tokens in want) and len({*want[0]}) > 2
    assert sampled(cut(sparse, mesh), mesh) == want


@EIGHT
def test_what_was_trained_with_fsdp_is_deployed_and_sampled():
    mesh = mesh_of(4, 2)
    _, model = trained(cut(converted(llama(), "masters"), mesh), mesh)
    sparse = sj.nnx.map_weights(model, sj.trainable.deploy)
    values = sparse.layers[1].mlp.down_proj.values.get_value()
    assert values.dtype == jnp.int8 and len(values.sharding.device_set) == 8
    whole = nnx.clone(sparse)
    nnx.update(whole, jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), nnx.state(sparse)))
    assert sampled(sparse, mesh) == sampled(whole)
