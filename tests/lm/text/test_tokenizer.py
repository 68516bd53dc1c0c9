"""`Tokenizer`: encoding, decoding, conversations, and saving."""

import pytest

pytest.importorskip("jinja2")

from text_examples import sentence_piece

from slidejax.lm.text.examples import byte_tokenizer
from slidejax.lm.text.files import read
from slidejax.lm.text.tokenizer import Tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}<a>{{ m.content }}{% endfor %}"


def test_special_tokens_in_a_text_are_special_tokens():
    tokenizer = byte_tokenizer("<a>")
    assert tokenizer.encode("x<a>y") == [256, 120, 258, 121]
    assert tokenizer.decode([256, 120, 258, 121, 257]) == "xy"
    assert tokenizer.decode([256, 120, 258, 121, 257], special=True) == "<s>x<a>y</s>"


def test_a_leading_space_is_the_tokenizers_own_or_the_texts():
    tokenizer = sentence_piece()
    ids = tokenizer.encode("ab", start=False)
    assert tokenizer.decode(ids) == "ab" and tokenizer.decode(ids, continues=True) == " ab"
    assert tokenizer.decode(tokenizer.encode(" ab", start=False)) == " ab"
    plain = sentence_piece(prefix=False)
    assert plain.decode(plain.encode(" ab", start=False)) == " ab"


def test_ids_that_the_vocabulary_lacks_have_no_text():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode([104, 5000, 105]) == "hi" and tokenizer.vocab_size == 258


def test_no_text_is_cut_or_filled_up():
    backend = byte_tokenizer().backend
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    assert len(Tokenizer(backend).encode("abcdef")) == 6
    assert len(Tokenizer(backend).encode("ab")) == 2


def test_a_conversation_is_a_prompt_whose_template_writes_the_start():
    backend = byte_tokenizer("<a>").backend
    tokenizer = Tokenizer(
        backend,
        start=(256,),
        named={"bos_token": "<s>"},
        templates={"default": TEMPLATE, "short": "{{ messages[0].content }}"},
    )
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render(messages) == "<s><a>hi"
    assert tokenizer.chat(messages) == [256, 258, 104, 105]
    assert tokenizer.render(messages, template="short") == "hi"
    with pytest.raises(ValueError, match="no chat template 'tools'; there is default, short"):
        tokenizer.render(messages, template="tools")
    with pytest.raises(
        ValueError, match="the model has no chat template: give it a prompt as text"
    ):
        byte_tokenizer().render(messages)


def test_the_last_message_may_go_on():
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}.{% endfor %}"
    tokenizer = byte_tokenizer()
    tokenizer.templates = {"default": template, "hidden": "nothing"}
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "one "}]
    assert tokenizer.render(messages, goes_on=True) == "[user]one.[assistant]one"
    with pytest.raises(ValueError, match="last message"):
        tokenizer.render(messages, goes_on=True, template="hidden")


@pytest.mark.parametrize(
    "tokenizer", [byte_tokenizer("<a>"), sentence_piece(), sentence_piece(False)]
)
def test_what_is_saved_is_read(tmp_path, tokenizer):
    tokenizer.templates = {"default": TEMPLATE, "../../up": "{{ 1 }}"}
    tokenizer.save(tmp_path / "new")
    back = read(tmp_path / "new")
    text = "ab é ab<a></s>日"
    assert back.encode(text) == tokenizer.encode(text)
    assert back.decode(back.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    for name in ("start", "ends", "named", "templates", "eos_token_id", "bos_token_id"):
        assert getattr(back, name) == getattr(tokenizer, name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "generation_config.json",
        "new",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_transformers_reads_what_is_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    for tokenizer in (byte_tokenizer("<a>"), sentence_piece()):
        tokenizer.templates = {"default": TEMPLATE}
        tokenizer.save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
        text = "ab é ab<a>日"
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text, start=False)
        assert theirs.eos_token_id == tokenizer.eos_token_id
        messages = [{"role": "user", "content": "hi"}]
        assert theirs.apply_chat_template(messages, tokenize=False) == tokenizer.render(messages)


def test_a_named_token_must_be_there():
    with pytest.raises(ValueError, match=r"pad_token '<pad>' is not in the vocabulary"):
        Tokenizer(byte_tokenizer().backend, named={"pad_token": "<pad>"})


def test_a_conversation_without_text_is_no_list_of_no_prompts():
    tokenizer = Tokenizer(byte_tokenizer().backend, templates={"default": "{{ system }}"})
    with pytest.raises(ValueError, match="writes nothing for these 1 messages"):
        tokenizer.chat([{"role": "user", "content": "hi"}], system="")
