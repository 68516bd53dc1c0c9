"""Directories as people have them, through the commands, the harness and `slidejax.lm`.

Each holds one thing that went wrong for users of other libraries: tokenizers of transformers 5,
several ends, settings in generation_config.json, no start of text, tokens that the model lacks, and
models that do not continue their prompt.
"""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import SENTENCES, error, output, run, usage_error

from slidejax.lm import load
from slidejax.lm.evaluate import Evaluator, evaluate
from slidejax.lm.harness import SlideLM
from slidejax.lm.reading import LoadedDecoder, decodes, read_model
from slidejax.lm.serving import called
from slidejax.lm.text.examples import byte_tokenizer

pytest.importorskip("rich")
pytest.importorskip("tokenizers")

SPECIAL = ("<end>", "<pad>")  # 258 and 259, after <s> and </s>
END, VOCAB = 258, 260


def config(**change):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 264,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        **change,
    }


def tensors(follows=None, seed=0):
    """Random weights; or with `follows`, a model that writes `follows(token)` after each token."""
    random, sizes = np.random.default_rng(seed), config()
    hidden, inner, vocab = sizes["hidden_size"], sizes["intermediate_size"], VOCAB
    scale = 0.0 if follows else 0.3

    def normal(*shape):
        return (random.normal(size=shape) * scale).astype(np.float32)

    state = {
        "model.embed_tokens.weight": random.normal(size=(vocab, hidden)).astype(np.float32),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": normal(vocab, hidden),
    }
    if follows:
        state["model.embed_tokens.weight"] = np.eye(vocab, hidden, dtype=np.float32)
        for token in range(vocab):
            state["lm_head.weight"][follows(token), token] += 10
    layer = {
        "self_attn.q_proj": (16, hidden),
        "self_attn.k_proj": (8, hidden),
        "self_attn.v_proj": (8, hidden),
        "self_attn.o_proj": (hidden, 16),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for name, shape in layer.items():
        state[f"model.layers.0.{name}.weight"] = normal(*shape)
    for name in ("input_layernorm", "post_attention_layernorm"):
        state[f"model.layers.0.{name}.weight"] = np.ones(hidden, np.float32)
    return state


def directory(path, state, tokenizer=None, **files):
    """A directory of Hugging Face; `__` in a name stands for a dot."""
    from safetensors.numpy import save_file

    path.mkdir(exist_ok=True)
    made = (tokenizer or byte_tokenizer(*SPECIAL)).files()
    made["generation_config.json"] = b"{}"
    for name, value in {"config__json": config(), **files}.items():
        made[name.replace("__", ".")] = json.dumps(value).encode()
    for name, content in made.items():
        (path / name).write_bytes(content)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def chain(text, *then):
    """The token that follows each: the bytes of a text and some special tokens, then the last."""
    ids = [*text.encode(), *then]
    table = dict(zip(ids, [*ids[1:], ids[-1]], strict=True))
    return lambda token: table.get(token, token)


def flax_classes():
    """transformers with its Flax classes, which version 5 lacks."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxPreTrainedModel"):
        pytest.skip("this version of transformers has no Flax classes")
    return transformers


class Request:
    def __init__(self, *args):
        self.args = args


def generate(capsys, path, prompt, *more):
    said = output(capsys, "generate", path, "--prompt", prompt, "--json", *more)
    return json.loads(said)["text"]


# --- the end of a text ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "stops"), [([257, END], []), (257, ["<end>"]), (257, ["C<end>Z", "<end>"])]
)
def test_a_text_ends_at_any_end_and_at_special_tokens(capsys, tmp_path, ends, stops):
    state = tensors(chain("ABC", END, ord("Z")))
    path = directory(tmp_path / "m", state, generation_config__json={"eos_token_id": ends})
    flags = [flag for stop in stops for flag in ("--stop", stop)]
    assert generate(capsys, path, "A", "--max-new-tokens", "8", *flags) == "BC"
    model = load(path)
    assert model.generate("A", max_new_tokens=8, stop=stops).text == "BC"
    assert "".join(model.stream("A", max_new_tokens=8, stop=stops)) == "BC"
    for given in (model, str(path)):
        lm = SlideLM(given, batch_size=2, max_gen_toks=8)
        assert lm.generate_until([Request("A", {"until": stops})]) == ["BC"]


# --- settings in files ----------------------------------------------------------------------------

SETTINGS = {
    "eos_token_id": 257,
    "num_beams": 4,
    "do_sample": True,
    "temperature": 7.0,
    "top_p": 0.02,
    "top_k": 1,
    "min_length": 50,
    "no_repeat_ngram_size": 1,
    "forced_bos_token_id": 5,
    "suppress_tokens": list(range(200)),
}


def test_settings_in_files_change_nothing(capsys, tmp_path):
    state = tensors()
    plain = directory(tmp_path / "plain", state)
    other = directory(tmp_path / "other", state, generation_config__json=SETTINGS)
    for flags in ([], ["--temperature", "1.5", "--seed", "3"]):
        flags += ["--max-new-tokens", "24"]
        assert generate(capsys, plain, "ab", *flags) == generate(capsys, other, "ab", *flags)
    ask = [Request("ab", {"max_gen_toks": 12})]
    assert SlideLM(str(plain)).generate_until(ask) == SlideLM(str(other)).generate_until(ask)


def test_what_is_asked_for_is_done(tmp_path):
    flat = {**tensors(), "lm_head.weight": np.zeros((VOCAB, 264), np.float32)}
    model = load(directory(tmp_path / "flat", flat))
    options = {"max_new_tokens": 60, "temperature": 1.0, "ends": ()}
    assert len(set(model.generate([5], **options).tokens)) > 30
    assert len(set(model.generate([5], **options, top_p=0.02).tokens)) <= 6
    assert set(model.generate([5], **options, top_k=1).tokens) == {0}


# --- tokens that the model lacks ------------------------------------------------------------------


def test_a_token_that_the_model_lacks_is_named(capsys, tmp_path):
    tokenizer = byte_tokenizer(*SPECIAL)
    tokenizer.backend.add_tokens(["<new>"])
    path = directory(tmp_path / "m", tensors(), tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("ab<new>c" * 9)
    assert "token 260" in error(capsys, "generate", path, "--prompt", "ab<new>c")
    assert "token 260" in error(capsys, "eval", path, "--text", text)
    out = tmp_path / "out"
    options = ["--pattern", "6:8", "--method", "wanda", "--calibration", text, "--sequences", "1"]
    assert "token 260" in error(capsys, "convert", path, out, *options)
    assert not out.exists()
    with pytest.raises(ValueError, match="token 260"):
        SlideLM(str(path)).loglikelihood([Request("ab<new>c", "d")])
    with pytest.raises(ValueError, match="token 260"):
        load(path).generate([1, 260])


# --- whoever wrote the tokenizer ------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"},
        {"extra_special_tokens": ["<end>"]},
        {"extra_special_tokens": {"end": "<end>"}, "model_max_length": 10**30},
    ],
)
def test_tokenizers_of_every_version_are_read(capsys, tmp_path, change):
    tokenizer = byte_tokenizer(*SPECIAL)
    about = {**json.loads(tokenizer.files()["tokenizer_config.json"]), **change}
    path = directory(tmp_path / "m", tensors(), tokenizer, tokenizer_config__json=about)
    assert read_model(path).encode("ab<end>") == [97, 98, END]
    assert generate(capsys, path, "ab", "--max-new-tokens", "3") is not None


# --- the start of a text --------------------------------------------------------------------------


def test_prompts_and_windows_begin_as_in_use(capsys, tmp_path):
    path = directory(tmp_path / "m", tensors())
    loaded = read_model(path)
    assert loaded.start == [256] and loaded.encode("ab") == [97, 98]
    model = loaded.model
    begun = model.generate([256, 97, 98], max_new_tokens=8)
    assert generate(capsys, path, "ab", "--max-new-tokens", "8") == begun.text
    assert begun.tokens != model.generate([97, 98], max_new_tokens=8).tokens

    text = tmp_path / "text.txt"
    text.write_text(SENTENCES)
    said = output(capsys, "eval", path, "--text", text, "--window", "16", "--json")
    ids, losses = list(SENTENCES.encode()), []
    for at in range(0, len(ids) - 1, 16):
        window = ids[at : at + 17]
        logits = np.asarray(model(jnp.array([[256, *window[:-1]]])), np.float64)[0, 1:]
        top = logits.max(-1, keepdims=True)
        normaliser = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        losses += list(normaliser - logits[np.arange(len(window) - 1), window[1:]])
    assert json.loads(said)["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert json.loads(said)["tokens"] == len(ids) - 1
    without = evaluate(called(model), ids, window=16)
    assert without.perplexity != pytest.approx(np.exp(np.mean(losses)), rel=1e-3)


def test_a_window_leaves_room_for_the_start(capsys, tmp_path):
    path = directory(tmp_path / "m", tensors(), config__json=config(max_position_embeddings=32))
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES)
    said = output(capsys, "eval", path, "--text", text, "--json")
    model = load(path)
    expected = evaluate(called(model), list(SENTENCES.encode()), window=31, start=[256])
    assert json.loads(said)["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    with pytest.raises(ValueError, match="32 positions, got 32 and 1 tokens before it"):
        Evaluator(called(model), window=32, start=[256])


def test_calibration_begins_as_in_use(tmp_path):
    import argparse

    from slidejax.commands import inputs

    loaded = read_model(directory(tmp_path / "m", tensors()))
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES * 9)
    args = argparse.Namespace(calibration=[str(text)], sequences=2, seed=None, method="wanda")
    ids = inputs.calibration_ids(loaded, args)
    assert ids.shape == (2, 256) and (ids[:, 0] == 256).all()
    assert ids[0, 1:].tolist() == list((SENTENCES * 9).encode())[:255]


# --- models that do not continue their prompt -----------------------------------------------------


def test_an_encoder_decoder_is_refused_everywhere(capsys, tmp_path):
    transformers = flax_classes()
    from slidejax.huggingface import write_pretrained

    model = transformers.FlaxBartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCAB,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=64,
        )
    )
    tokenizer = byte_tokenizer(*SPECIAL)
    write_pretrained(tmp_path / "bart", model)
    tokenizer.save(tmp_path / "bart")
    assert not decodes(tmp_path / "bart")
    assert "encoder" in error(capsys, "generate", tmp_path / "bart", "--prompt", "ab")
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES)
    assert "encoder" in error(capsys, "eval", tmp_path / "bart", "--text", text)
    with pytest.raises(TypeError, match="encoder"):
        SlideLM(str(tmp_path / "bart"))


# --- which way a model is read --------------------------------------------------------------------


def test_known_architectures_are_decoders_and_others_are_not(tmp_path):
    path = directory(tmp_path / "m", tensors())
    assert decodes(path) and decodes("smollm2")
    for name, values in (("gpt2", {"model_type": "gpt2"}), ("list", []), ("none", None)):
        other = directory(tmp_path / name, tensors(), config__json=values)
        assert not decodes(other)
    (path / "model.safetensors").unlink()
    (path / "flax_model.msgpack").write_bytes(b"")
    assert not decodes(path)  # weights of a Flax class
    assert not decodes(tmp_path / "nowhere")


def test_what_slidejax_saved_is_read_as_what_it_was(tmp_path, request):
    flax_classes()
    tiny_directory = request.getfixturevalue("tiny_directory")
    assert decodes(tiny_directory) and not decodes(tiny_directory, keep_class=True)
    assert isinstance(read_model(tiny_directory), LoadedDecoder)
    path = directory(tmp_path / "m", tensors())
    from slidejax.lm import convert, save
    from slidejax.lm.models import load_model

    save(convert(load(path), "6:8"), tmp_path / "out")
    assert decodes(tmp_path / "out", keep_class=True)
    with pytest.raises(ValueError, match=r"slidejax\.lm\.load"):
        load_model(tmp_path / "out")


def test_a_decoder_goes_through_every_command(capsys, tmp_path):
    """Convert, evaluate, recover, generate, demo: transformers is not needed."""
    path = directory(tmp_path / "m", tensors())
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES * 9)
    out, new = tmp_path / "out", tmp_path / "new"
    calibrate = ["--method", "wanda", "--calibration", text, "--sequences", "2"]
    said = output(capsys, "convert", path, out, "--pattern", "6:8", *calibrate)
    assert "7 layers converted" in said
    rows = json.loads(
        output(capsys, "eval", path, out, "--text", text, "--tokens", "64", "--prompt", "ab",
               "--max-new-tokens", "5", "--against", path, "--json")
    )  # fmt: skip
    assert [(row["pattern"], row["dtype"]) for row in rows] == [
        ("original", "float32"),
        ("6:8", "float8_e4m3fn+int8"),
    ]
    assert rows[0]["top1_agreement"] == 1 and rows[1]["kl"] > 0
    for name, row in ((path, rows[0]), (out, rows[1])):
        assert generate(capsys, name, "ab", "--max-new-tokens", "5") == row["written"]
    train = ["--text", text, "--window", "16", "--batch", "2", "--steps", "1", "--sample", "3"]
    output(capsys, "recover", out, new, "--against", path, *train)
    recovered = load(new)
    assert recovered.about["source"] == "m" and recovered.about["recovery"]["rows"] > 3
    assert recovered.generate("ab", max_new_tokens=3).prompt_tokens == 3
    # the text, the window and the prompt of eval, so the original runs the same programs
    demo = ["--text", text, "--tokens", "64", "--prompt", "ab", "--max-new-tokens", "5"]
    demo += ["--pattern", "6:8", "--dtypes", "int8"]
    table = json.loads(output(capsys, "demo", path, *demo, *calibrate, "--json"))
    assert [(row["pattern"], row["dtype"]) for row in table] == [
        ("original", "float32"),
        ("6:8", "int8"),
    ]
    assert all(row["tokens_per_second"] > 0 for row in table)
    mixed = output(
        capsys, "convert", path, tmp_path / "mix", "--pattern", "6:8", "--mixed", "14:16,2:4",
        *calibrate,
    )  # fmt: skip
    assert "7 layers converted" in mixed
    assert "converted already" in error(capsys, "convert", out, tmp_path / "x")


def test_a_conversion_that_is_interrupted_goes_on(capsys, tmp_path, monkeypatch):
    from slidejax.commands import convert

    path, out = directory(tmp_path / "m", tensors()), tmp_path / "out"
    (tmp_path / "text.txt").write_text(SENTENCES * 9)
    command = ["convert", path, out, "--method", "wanda", "--sequences", "2"]
    command += ["--calibration", tmp_path / "text.txt"]
    seen, stage = [], convert._Shown.stage

    def interrupt(self, done, total):
        stage(self, done, total)
        seen.append((done, total))
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(convert._Shown, "stage", interrupt)
    status, _, err = run(capsys, *command)
    assert status == 130 and "finished layers are kept in" in err and not out.exists()
    assert seen == [(1, 4), (2, 4)] and len(list((tmp_path / "out.work").glob("stage*"))) == 2
    assert "another conversion" in error(capsys, *command, "--pattern", "4:6")
    assert "7 layers converted" in output(capsys, *command)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "out", "text.txt"]


def test_a_tokenizer_that_cannot_be_read_is_refused_before_the_weights(capsys, tmp_path):
    path = directory(tmp_path / "m", tensors())
    (path / "tokenizer.json").rename(path / "tokenizer.model")
    (path / "model.safetensors").write_bytes(b"not weights")
    for command in (["generate", path], ["eval", path], ["convert", path, tmp_path / "out"]):
        flags = ["--pattern", "6:8"] if command[0] == "convert" else []
        assert "tokenizer.model" in error(capsys, *command, *flags)
    assert "model.safetensors" in error(capsys, "tune", path, "--dry-run")


def test_transformers_is_not_needed(tmp_path):
    path = directory(tmp_path / "m", tensors())
    (tmp_path / "text.txt").write_text(SENTENCES)
    code = f"""
import sys
sys.modules["transformers"] = None
from slidejax.commands.main import main
folder, out, text = {str(path)!r}, {str(tmp_path / "out")!r}, {str(tmp_path / "text.txt")!r}
assert main(["generate", folder, "--prompt", "ab", "--max-new-tokens", "2"]) == 0
assert main(["convert", folder, out, "--data-free"]) == 0
assert main(["eval", folder, out, "--text", text, "--tokens", "32"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# --- the command ----------------------------------------------------------------------------------


def test_the_command_shows_the_text_and_the_time_to_the_first_token(capsys, tmp_path):
    from command_line import run

    path = directory(tmp_path / "m", tensors(chain("Aé日b", ord("c"))))
    status, out, err = run(capsys, "generate", path, "--prompt", "A", "--max-new-tokens", "9")
    assert status == 0 and out == "Aé日bccc\n"
    assert "9 tokens, the first after " in err and "with compiling" in err and "tokens/s" in err
    said = json.loads(output(capsys, "generate", path, "--prompt", "A", "--json"))
    assert said["first_token_seconds"] > 0 and said["tokens"] == 64 and said["finish"] == "length"
    assert said["seconds"] >= said["first_token_seconds"]


def test_a_conversation(capsys, tmp_path):
    pytest.importorskip("jinja2")
    tokenizer = byte_tokenizer(*SPECIAL)
    tokenizer.templates = {"default": "{{ bos_token }}{{ messages[0].content }}{{ '<end>' }}"}
    path = directory(tmp_path / "m", tensors(chain("ab", END, ord("A"), ord("B"))), tokenizer)
    assert generate(capsys, path, "ab", "--chat", "--max-new-tokens", "2") == "AB"
    bare = directory(tmp_path / "bare", tensors())
    assert "no chat template" in error(capsys, "generate", bare, "--chat", "--prompt", "a")


def test_flags_are_checked_first(capsys, tmp_path):
    bad = (["--prompt", ""], ["--stop", ""], ["--top-p", "2"], ["--cache", "int4"])
    for flags in (*bad, ["--temperature", "inf"], ["--top-p", "0"], ["--seed", str(2**32)]):
        assert flags[0] in usage_error(capsys, "generate", tmp_path / "none", *flags)


def test_an_8_bit_cache_is_a_flag(capsys, tmp_path):
    path = directory(tmp_path / "m", tensors(chain("ABC")))
    assert generate(capsys, path, "A", "--cache", "int8", "--max-new-tokens", "2") == "BC"


def test_flags_that_a_flax_model_cannot_honour_are_refused(capsys, tmp_path):
    transformers = flax_classes()
    from slidejax.huggingface import write_pretrained

    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = transformers.FlaxGPT2LMHeadModel(transformers.GPT2Config(**sizes))
    path = tmp_path / "gpt2"
    write_pretrained(path, model)
    byte_tokenizer(*SPECIAL).save(path)
    for flags in (["--stop", "x"], ["--cache", "int8"]):
        assert flags[0] in error(capsys, "generate", path, "--prompt", "a", *flags)
    said = output(capsys, "generate", path, "--prompt", "ab", "--max-new-tokens", "3")
    assert said.startswith("ab")
