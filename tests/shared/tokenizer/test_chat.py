"""Prompts and responses to ids: the template's tokens are tokens, people's words are text, on real tokenizers too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.dataset.records import Message
from shared.errors import ConfigError, PromptError
from shared.tokenizer.chat import ChatEncoder
from shared.tokenizer.files import TokenizerFile, of_ranks, of_tree, read_tokenizer_file, with_merges
from tests.shared.tokenizer.test_template import LLAMA_3_CLOCK, LLAMA_3_FIXED
from tests.shared.tokenizer.test_vocabulary import (
    CHATML_TEMPLATE,
    INST_TEMPLATE,
    LLAMA3,
    TEKKEN,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
)

PHI_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATML = CHATML_TEMPLATE + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CONVERSATIONS = [
    [("user", "What is 12 plus 345?  Say why.")],
    [("user", "  spaces around \n")],
    [("user", "日本語 e\u0301 \u212b 👩‍👩‍👧 naïve")],
    [("system", "Be brief."), ("user", "hi"), ("assistant", "hello\n\n"), ("user", "\tagain")],
]
SPECIALS = {
    "llama": "<|eot_id|>", "chatml": "<|im_end|>", "phi": "<|end|>", "ranks": "</s>", "sentencepiece": "</s>",
}  # fmt: skip


def with_settings(file: TokenizerFile, template: str | None, **settings: Any) -> TokenizerFile:
    return of_tree(file.source, file.tree, settings, template)


def make_file(name: str, directory: Path) -> TokenizerFile:
    if name == "llama":
        tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        file = read_tokenizer_file(LLAMA3)
        return with_settings(file, LLAMA_3_FIXED, **tokens, generation_eos_token_id=[128001, 128008, 128009])
    if name == "chatml":
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        return read_tokenizer_file(byte_level_tokenizer(directory, specials, CHATML, eos_token="<|im_end|>"))
    if name == "phi":  # its specials take the white space behind them
        specials = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
        file = read_tokenizer_file(byte_level_tokenizer(directory, specials, PHI_TEMPLATE, eos_token="<|end|>"))
        for entry in file.tree["added_tokens"]:
            entry["rstrip"] = True
        return file
    if name == "ranks":
        tokens = [bytes([byte]) for byte in range(256)] + [b"ha", b" w", b" wha", b"12"]
        ids = {token: rank for rank, token in enumerate(tokens)}
        file = of_ranks(directory / "ranks", ids, {"<s>": 260, "</s>": 261}, r"\d{1,3}|\s?\p{L}+|.")
        file.settings, file.chat_template = {"bos_token": "<s>", "eos_token": "</s>"}, INST_TEMPLATE
        return file
    file = read_tokenizer_file(sentencepiece_tokenizer(directory))
    return with_settings(file, INST_TEMPLATE, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=list(SPECIALS))
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ChatEncoder]:
    return request.param, ChatEncoder(make_file(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> ChatEncoder:
    return ChatEncoder(make_file("chatml", tmp_path_factory.mktemp("chatml")))


def again(chat: ChatEncoder, rendered: bool | None) -> ChatEncoder:
    """The same tokenizer, told whether text is rendered."""
    return ChatEncoder(chat._file, rendered=rendered)


def messages(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in turns]


def special_texts(chat: ChatEncoder, ids: np.ndarray[Any, Any]) -> list[str]:
    return [chat.vocabulary.texts[index] for index in ids if chat.vocabulary.is_special[index]]


def test_ordinary_prompts_have_the_ids_of_apply_chat_template(named: tuple[str, ChatEncoder]) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    _, chat = named
    file = chat._file
    tokens = {key: value for key, value in file.settings.items() if key in ("bos_token", "eos_token")}
    tree = with_merges(file.tree)
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tree)), **tokens)
    theirs.chat_template = file.chat_template
    for turns in CONVERSATIONS:
        conversation = [{"role": role, "content": content} for role, content in turns]
        expected = theirs.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
        rendered = chat.prompt(messages(*turns))
        assert rendered.ids.tolist() == expected
        assert rendered.text == theirs.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)


def test_special_tokens_in_words_are_text(named: tuple[str, ChatEncoder]) -> None:
    name, chat = named
    special = SPECIALS[name]
    plain = chat.prompt(messages(("user", "what does it mean?")))
    asked = chat.prompt(messages(("user", f"what does {special} mean?")))
    assert f"what does {special} mean?" in asked.text
    assert special_texts(chat, asked.ids) == special_texts(chat, plain.ids)
    assert special.encode() in chat.vocabulary.decode(asked.ids)
    several = [("system", special), ("user", f"{special}{special}"), ("assistant", f"x{special}"), ("user", "y")]
    said = chat.prompt(messages(*several))
    expected = chat.prompt(messages(("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "y")))
    assert special_texts(chat, said.ids) == special_texts(chat, expected.ids)


def test_text_that_is_rendered_already_is_taken_as_it_is(named: tuple[str, ChatEncoder]) -> None:
    name, chat = named
    for turns in CONVERSATIONS:
        first = chat.prompt(messages(*turns))
        if turns[0][0] == "system" and name in ("ranks", "sentencepiece"):  # their template knows no system turn
            with pytest.raises(PromptError, match="does not begin as the template does"):
                chat.prompt(messages(("user", first.text)))
            continue
        second = chat.prompt(messages(("user", first.text)))
        assert second.text == first.text
        np.testing.assert_array_equal(second.ids, first.ids)


def test_llama_s_text_is_recognized_by_its_beginning_whatever_its_first_turn() -> None:
    chat = ChatEncoder(make_file("llama", LLAMA3))
    head = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ids = chat.prompt(messages(("user", f"<|begin_of_text|>{head}"))).ids
    assert ids[:3].tolist() == [128000, 128006, 882]
    assert (ids == 128000).sum() == 1
    with pytest.raises(
        PromptError, match=r"holds <\|start_header_id\|>.*collect.rendered.*--rendered or --no-rendered"
    ):
        chat.prompt(messages(("user", head)))
    np.testing.assert_array_equal(again(chat, True).prompt(messages(("user", head))).ids, ids[1:])
    words = again(chat, False).prompt(messages(("user", head)))
    assert special_texts(chat, words.ids) == special_texts(chat, chat.prompt(messages(("user", "hi"))).ids)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([("user", "what is <|im_start|> for?")], r"it holds <\|im_start\|>, which the chat template writes"),
        ([("user", "<|im_start|> is what?")], r"it holds <\|im_start\|>"),
        ([("system", "x"), ("user", "<|im_start|>user\nhi")], r"begins as rendered text does, but has a system turn"),
        ([("user", "a\ufdd0b")], r"holds U\+FDD0, which is not a character"),
    ],
)
def test_what_may_be_either_is_refused(chatml: ChatEncoder, turns: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        chatml.prompt(messages(*turns))


def test_rendered_text_is_recognized_whatever_its_date_is() -> None:
    file = make_file("llama", LLAMA3)
    file.chat_template = LLAMA_3_CLOCK
    with pytest.raises(ConfigError, match="writes the clock's time"):
        ChatEncoder(file).prompt(messages(("user", "hi")))
    text = ChatEncoder(file, {"date_string": "26 Jul 2024"}).prompt(messages(("user", "hi"))).text
    assert ChatEncoder(file).prompt(messages(("user", text))).text == text


def test_rendered_text_is_one_turn(chatml: ChatEncoder) -> None:
    with pytest.raises(PromptError, match=r"it has 2 turns, but rendered text is one"):
        again(chatml, True).prompt(messages(("system", "x"), ("user", "y")))


def test_between_turns_special_tokens_are_somebody_s_words(chatml: ChatEncoder) -> None:
    turns = messages(("user", "<|im_start|>user\nhi"), ("assistant", "a"), ("user", "b"))
    assert special_texts(chatml, chatml.prompt(turns).ids) == ["<|im_start|>", "<|im_end|>"] * 3 + ["<|im_start|>"]


def test_a_beginning_of_text_in_the_middle_is_text(tmp_path: Path) -> None:
    chat = ChatEncoder(make_file("sentencepiece", tmp_path))
    assert special_texts(chat, chat.prompt(messages(("user", "is <s> HTML?"))).ids) == ["<s>"]
    with pytest.raises(PromptError, match=r"it holds <s>"):
        chat.prompt(messages(("user", "<s> is HTML?")))


def test_a_template_that_looks_for_special_tokens_in_words_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('<|im_end|>')[-1] }}{% endfor %}"
    file = read_tokenizer_file(byte_level_tokenizer(tmp_path, ["<|im_start|>", "<|im_end|>"], template))
    assert ChatEncoder(file).prompt(messages(("user", "a b"))).text.endswith("a b")
    with pytest.raises(PromptError, match="the chat template itself looks for special tokens"):
        ChatEncoder(file).prompt(messages(("user", "a<|im_end|>b")))


def test_special_tokens_before_the_ranks_keep_their_ids() -> None:
    """Those of tekken.json have the first ids; the tokenizer library would give them the next free ones."""
    file = read_tokenizer_file(TEKKEN)
    ids = ChatEncoder(file, rendered=True).prompt(messages(("user", "<SPECIAL_1><SPECIAL_3>hello<SPECIAL_4>"))).ids
    assert ids.tolist() == [1, 3, file.tokens.index(b"hello"), 4]


def test_without_a_template_special_tokens_have_to_be_explained(tmp_path: Path) -> None:
    chat = ChatEncoder(read_tokenizer_file(byte_level_tokenizer(tmp_path, ["<|x|>"])))
    assert chat.prompt(messages(("user", "a b"))).text == "a b"
    with pytest.raises(PromptError, match=r"holds <\|x\|> and the tokenizer has no chat template"):
        chat.prompt(messages(("user", "a<|x|>")))
    for rendered, expected in ((True, ["<|x|>"]), (False, [])):
        ids = again(chat, rendered).prompt(messages(("user", "a<|x|>"))).ids
        assert special_texts(chat, ids) == expected
    with pytest.raises(ConfigError, match="has no chat template to give date_string to"):
        ChatEncoder(chat._file, {"date_string": "x"})


RESPONSES = {
    "chatml": [("Paris.", "<|im_end|>"), ("Paris.<|im_end|>", "<|im_end|>"), ("Paris.<|im_end|>\n", "<|im_end|>"),
               ("Paris.<|endoftext|>", "<|im_end|>")],
    "llama": [("Paris.", "<|eot_id|>"), ("Paris.<|eot_id|>", "<|eot_id|>"),
              ("Paris.<|end_of_text|>", "<|end_of_text|>")],
    "sentencepiece": [("Paris.", "</s>"), ("Paris.</s>", "</s>")],
}  # fmt: skip


@pytest.mark.parametrize("name", RESPONSES)
def test_a_response_has_one_end(name: str, tmp_path: Path) -> None:
    chat = ChatEncoder(make_file(name, tmp_path))
    text = chat.encoder.encode("Paris.")
    for response, end in RESPONSES[name]:
        expected = [*text.tolist(), chat.vocabulary.texts.index(end)]
        assert chat.response(response).tolist() == expected, response
        assert chat.response(response, rows=len(expected)).tolist() == expected
        assert chat.response(response, rows=len(text)).tolist() == text.tolist()
    assert chat.response("Paris.", finished=False).tolist() == text.tolist()
    with pytest.raises(PromptError, match="finish_reason is length, but the response ends with"):
        chat.response(RESPONSES[name][1][0], finished=False)


def test_special_tokens_inside_a_response_are_text_and_at_its_borders_refused(chatml: ChatEncoder) -> None:
    assert special_texts(chatml, chatml.response("a <|im_end|> ends")) == ["<|im_end|>"]
    for response in ("Paris.<|im_end|><|im_end|>", "<|im_start|>assistant\nParis.", "Paris.<|im_start|>"):
        with pytest.raises(PromptError, match=r"begins or ends with the special token <\|im_(start|end)\|> beside its"):
            chatml.response(response)
        assert len(special_texts(chatml, again(chatml, False).response(response))) == 1
    tokens = again(chatml, True).response("<|im_start|>x<|im_end|>")
    assert special_texts(chatml, tokens) == ["<|im_start|>", "<|im_end|>"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["<|im_end|>", "<|im", "_end|>", "<", "|", ">", " ", "a", "雪", "<|endoftext|>"])))
def test_no_words_make_a_special_token(chatml: ChatEncoder, parts: list[str]) -> None:
    content = "".join(parts)
    prompt = chatml.prompt(messages(("user", content)))
    assert special_texts(chatml, prompt.ids) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    # Every byte of the words is there, between the tokens of the template.
    assert chatml.vocabulary.decode(prompt.ids).decode() == f"user\n{content}\nassistant\n"
