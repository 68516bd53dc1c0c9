"""`slidejax convert --budget`: a pattern for each layer by time."""

import json

import pytest

pytest.importorskip("rich")
pytest.importorskip("tokenizers")

from command_line import error, run, usage_error, write_decoder

import slidejax as sj


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("decoder"))


def test_layers_that_read_the_same_input_agree_and_the_budget_is_kept(capsys, decoder, tmp_path):
    out = tmp_path / "out"
    flags = ("--budget", "prefill=1.2", "--mixed", "dense,2:4", "--gpu", "NVIDIA H100")
    status, shown, err = run(
        capsys, "convert", decoder, out, *flags, "--sequences", "4", "--method", "wanda", "--json"
    )
    assert status == 0, err
    assert "note: the times of layers on NVIDIA H100 are measured at other shapes" in err
    about = json.loads(shown)
    assert about["budget"] == "prefill=1.2" and about["pattern"] is None
    layers = sj.lm.load(out).params["model"]["layers"]
    times = sj.prune.Times(4096, ["dense", "2:4"], device="NVIDIA H100")
    chosen = dense = 0.0
    for layer in layers.values():
        weights = {name: part["kernel"] for name, part in layer["self_attn"].items()}
        weights |= {name: part["kernel"] for name, part in layer["mlp"].items()}
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            assert len({weights[name].pattern for name in names}) == 1
        for w in weights.values():
            shape = (w.in_features, w.out_features)
            chosen += times(shape, w.pattern)
            dense += times(shape, sj.Pattern.parse("dense"))
    assert dense / 2 < chosen <= dense / 1.2 * (1 + 1e-6)


def test_what_cannot_be_had_is_said(capsys, decoder, tmp_path):
    flags = ("--budget", "decode=9", "--gpu", "NVIDIA H100", "--sequences", "4")
    message = error(capsys, "convert", decoder, tmp_path / "out", *flags)
    assert "--budget decode=9 cannot be reached with dense, 14:16, 6:8, 4:6, 2:4" in message
    flags = ("--budget", "decode=1.1", "--gpu", "toaster", "--sequences", "4")
    assert "no time is known" in error(capsys, "convert", decoder, tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpu", "NVIDIA H100"), "there is no --budget"),
        (("--budget", "decode=1.1", "--skip", ".*"), "no --skip with it"),
        (("--budget", "decode=1.1", "--dtype", "none"), "no --dtype none with it"),
        (("--budget", "decode=1.1", "--data-free"), "does not go with --budget"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(capsys, tmp_path, flags, message):
    assert message in error(capsys, "convert", "no model", tmp_path / "out", *flags)


@pytest.mark.parametrize(
    "text", ["1.08", "prefill", "prefill=", "prefill=0", "train=2", "decode=x"]
)
def test_a_bad_budget_is_one_line(capsys, tmp_path, text):
    assert "--budget" in usage_error(capsys, "convert", "x", tmp_path / "out", "--budget", text)
