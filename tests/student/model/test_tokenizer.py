import hashlib
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from shared.errors import VocabularyError
from shared.tokenizer.vocabulary import Vocabulary, load_tokenizer
from student.model.tokenizer import SPECIAL_TOKENS, train_tokenizer
from tests.fixtures.conversations import conversations

TEXTS = [text for pair in conversations(200) for text in pair]


def test_it_is_of_llada_s_construction(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 500)
    assert len(tokenizer) == 500
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(494, 500))
    decomposed = unicodedata.normalize("NFD", "naïve")
    assert tokenizer(decomposed)["input_ids"] == tokenizer("naïve")["input_ids"]
    assert tokenizer.decode(tokenizer(" 日本 \n🙂\t é")["input_ids"]) == " 日本 \n🙂\t é"
    tokenizer.save_pretrained(tmp_path)
    vocabulary = Vocabulary.from_tokenizer(tmp_path)
    assert {bytes([byte]) for byte in range(256)} <= set(vocabulary.tokens)
    assert vocabulary.is_special.sum() == len(SPECIAL_TOKENS)
    strings = {role: vocabulary.texts[index] for role, index in vocabulary.roles.items()}
    assert strings == {
        "bos": "<|startoftext|>",
        "end_of_text": "<|endoftext|>",
        "end_of_turn": "<|eot_id|>",
        "start_header": "<|start_header_id|>",
        "end_header": "<|end_header_id|>",
        "mask": "<|mdm_mask|>",
        "pad": "<|endoftext|>",
    }


def test_the_chat_template_is_llama_3_s_with_llada_s_specials(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 400).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    turns.append({"role": "assistant", "content": "Hello"})
    assert tokenizer.apply_chat_template(turns, tokenize=False).endswith("<|end_header_id|>\n\nHello<|eot_id|>")


def test_word_boundaries_are_gpt_2_s(tmp_path: Path) -> None:
    """No token runs over the start of a word, so that most boundaries are the teacher's too."""
    tokenizer = train_tokenizer(TEXTS, 800)
    tokenizer.save_pretrained(tmp_path)
    for token in Vocabulary.from_tokenizer(tmp_path).tokens:
        assert b" " not in token.strip(b" ")
        assert not token.strip(b" ") or not token.startswith(b"  ")


def test_digits_are_merged_or_kept_apart_as_asked(tmp_path: Path) -> None:
    merged = train_tokenizer(TEXTS * 3, 900)
    apart = train_tokenizer(TEXTS * 3, 900, individual_digits=True)
    apart.save_pretrained(tmp_path)
    _, encoder = load_tokenizer(tmp_path)
    assert len(encoder.encode("123")) == 3
    assert any(token.strip("Ġ").isdigit() and len(token.strip("Ġ")) > 1 for token in merged.get_vocab())
    assert not any(token.strip("Ġ").isdigit() and len(token.strip("Ġ")) > 1 for token in apart.get_vocab())


def test_two_processes_train_the_same_tokenizer() -> None:
    program = (
        "from student.model.tokenizer import train_tokenizer\n"
        "from tests.fixtures.conversations import conversations\n"
        "texts = [text for pair in conversations(200) for text in pair]\n"
        "print(train_tokenizer(texts, 700).backend_tokenizer.to_str())"
    )
    digests = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        output = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        digests.add(hashlib.sha256(output.stdout).hexdigest())
    assert len(digests) == 1


def test_too_small_a_vocabulary_and_no_text_are_refused() -> None:
    with pytest.raises(
        VocabularyError, match="a vocabulary of 261 is too small: 256 bytes and 6 special tokens need 262"
    ):
        train_tokenizer(TEXTS, 261)
    with pytest.raises(VocabularyError, match="there is no text"):
        train_tokenizer([], 400)


def test_less_text_than_asked_for_gives_a_smaller_vocabulary_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_tokenizer(["a b a b"], 5000)
    assert len(tokenizer) < 300
    assert "not the 5000" in caplog.text
