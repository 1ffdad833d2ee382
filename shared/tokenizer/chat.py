"""Conversations, rendered text and responses to token ids: the one way in for `collect`, `score` and `import-json`.

What the chat template writes are tokens; what people write is text, special tokens in it included. Text that is
rendered already is recognized by its beginning and taken as it is, special tokens being tokens; where that is not
certain it is refused, and `rendered` says which it is. Prompts go through the tokenizer's whole pipeline, so that their
ids are those of `apply_chat_template(tokenize=True)`; responses are encoded byte by byte (`vocabulary.Encoder`).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from shared.dataset.records import Message
from shared.errors import ConfigError, PromptError, UserError
from shared.tokenizer.files import TokenizerFile, with_merges
from shared.tokenizer.template import ANSWER, BREAK, QUESTION, ChatTemplate, Specials
from shared.tokenizer.vocabulary import Encoder, Vocabulary

# Noncharacters of Unicode, as BREAK is one: around the id of a special token that the template wrote.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
# How an end of text is written where no setting of the tokenizer names it: it is then the response's end all the same.
_END_OF_TEXT = frozenset({"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"})
_CHOICE = "`rendered` beside it, or collect.rendered (--rendered or --no-rendered of import-json) for all"


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt in the teacher's own form: the template's text and int32 [P] token ids."""

    text: str
    ids: NDArray[np.int32]


class ChatEncoder:
    """One tokenizer with its chat template.

    Args:
        arguments: of the chat template.
        rendered: whether prompts are rendered text already; None recognizes those that are.
        now: stops the template's clock, where nothing that is rendered is kept.

    Attributes:
        template: None where the tokenizer has none.
        template_used: whether a prompt was rendered with it so far.
        vocabulary: of the tokenizer.
        roles: role → id of the special tokens.
        ends: ids of the special tokens that end a response.

    Raises:
        ConfigError: as `ChatTemplate`, or if there are arguments and no template.
    """

    def __init__(
        self,
        file: TokenizerFile,
        arguments: Mapping[str, Any] | None = None,
        rendered: bool | None = None,
        now: datetime.datetime | None = None,
    ) -> None:
        self.template, self.template_used = None, False
        if file.chat_template:
            self.template = ChatTemplate(file.chat_template, file.settings, arguments, now)
        elif arguments:
            raise ConfigError(f"{file.source} has no chat template to give {', '.join(arguments)} to; leave them out")
        self.vocabulary = Vocabulary.of_file(file)
        self.roles = self.vocabulary.roles
        self._file, self._rendered, self._specials = file, rendered, Specials(file)
        stops = file.settings.get("generation_eos_token_id")
        self.ends = self.vocabulary.end_ids.union(stops if isinstance(stops, list) else ())

    @cached_property
    def encoder(self) -> Encoder:
        """Of responses: byte-exact, special tokens in the text being text."""
        return Encoder(self._file, self.vocabulary)

    def prompt(self, messages: Sequence[Message], rendered: bool | None = None) -> RenderedPrompt:
        """The conversation up to and including the header of the assistant's turn.

        Args:
            rendered: of this one; None is what all are.

        Raises:
            PromptError: if the template refuses the conversation, or it may or may not be rendered already.
            ConfigError: if the template reads the clock.
        """
        text, marked = self.marked(messages, rendered)
        return RenderedPrompt(text, np.array(self._backend.encode(marked, add_special_tokens=False).ids, np.int32))

    def count_tokens(self, marked: Sequence[str]) -> list[int]:
        """Tokens of each of the second texts of `marked`, all cores sharing the batch."""
        return [len(encoding.ids) for encoding in self._backend.encode_batch_fast(marked, add_special_tokens=False)]

    def takes_as_rendered(self, messages: Sequence[Message], rendered: bool | None = None) -> bool:
        """Whether the conversation is text that is rendered already, in one turn.

        Raises:
            PromptError: if it may or may not be.
        """
        stated = self._rendered if rendered is None else rendered
        if stated is False:
            return False
        *before, last = messages
        if stated:
            if before:
                raise PromptError(
                    f"it has {len(messages)} turns, but rendered text is one; give it as `prompt`, without "
                    f"collect.system_prompt, or change {_CHOICE}"
                )
            return True
        if last.role != "user" or any(message.role != "system" for message in before):
            return False
        text = last.content.strip()
        if self.template is None:
            special = next((piece for piece in self._specials.split(text) if isinstance(piece, int)), None)
            if special is not None:
                self._refuse(f"it holds {self._text(special)} and the tokenizer has no chat template")
            return False
        found = re.search(self._opening, text) if self._opening else None
        if found and found.start() == 0:
            if before:
                self._refuse("it begins as rendered text does, but has a system turn before it")
            return True
        bos = self.roles.get("bos")
        for number, piece in enumerate(self._specials.split(text)):
            # A beginning of text in the middle is only text, unless a header is behind it: `<s>` is HTML too.
            alone = piece == bos and number > 0 and not found and bos != self.roles.get("start_header")
            if piece in self._structure and not alone:
                self._refuse(
                    f"it holds {self._text(piece)}, which the chat template writes, "
                    f"but does not begin as the template does{self._example}"
                )
        return False

    def cut(self, text: str, tokens: int) -> str:
        """`text`, in which special tokens are text, without its last `tokens` tokens."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        kept = len(encoding.ids) - tokens
        return text[: encoding.offsets[kept][0]] if 0 < kept < len(encoding.ids) else text if kept > 0 else ""

    def user_header(self, system_prompt: str | None = None) -> str:
        """What the template writes before the words of a conversation's first user turn; errors as `prompt`."""
        system = [] if system_prompt is None else [Message("system", system_prompt)]
        return self._render([*system, Message("user", QUESTION)]).partition(QUESTION)[0]

    def marked(self, messages: Sequence[Message], rendered: bool | None = None) -> tuple[str, str]:
        """The conversation's text, and the same as the tokenizer takes it: special tokens in a form no text can have.

        Args and errors as `prompt`.
        """
        said = "".join(message.role + message.content for message in messages)
        _check_characters(said)
        if self.takes_as_rendered(messages, rendered):
            return messages[-1].content, self._mark(messages[-1].content)
        text = self._render(messages)
        if self._specials.broken(said) == said:
            return text, self._mark(text)
        # Special tokens in the words are broken up before the template adds its own.
        broken = self._render([Message(*map(self._specials.broken, (m.role, m.content))) for m in messages])
        if broken.replace(BREAK, "") != text:
            raise PromptError(
                "the chat template itself looks for special tokens in what is said, so they cannot be taken as text; "
                f"take them out, or render the prompt yourself and set {_CHOICE}, to true"
            )
        return text, self._mark(broken)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids of rendered text: special tokens in it are tokens, none is added.

        Raises:
            PromptError: if it holds characters that no text has.
        """
        _check_characters(text)
        return np.array(self._backend.encode(self._mark(text), add_special_tokens=False).ids, np.int32)

    def response(
        self, text: str, finished: bool = True, rows: int | None = None, rendered: bool | None = None
    ) -> NDArray[np.int32]:
        """Ids of a response. A trailing end of turn or of text is its end; a finished one without gets one.

        Args:
            rows: tokens that the response must have; they say whether its end is among them.
            rendered: of this one; None is what all are.

        Raises:
            PromptError: if special tokens stand where a template would write them, or an end where there is none.
        """
        rendered = self._rendered if rendered is None else rendered
        pieces = self._specials.split(text)
        stripped = pieces[:-1] if pieces and str(pieces[-1]).isspace() else pieces
        end = self.roles.get("end_of_turn", self.roles.get("end_of_text"))
        last = stripped[-1] if stripped else ""
        if isinstance(last, int) and (last in self.ends or self._text(last) in _END_OF_TEXT):
            pieces, end = stripped[:-1], last if last in self.ends else end
            text = "".join(map(self._text, pieces))
            if not finished:
                raise PromptError(
                    f"finish_reason is length, but the response ends with {self._text(last)}; "
                    "take one of them out, or say stop"
                )
        if rendered:
            runs = [[p] if isinstance(p, int) else self.encoder.encode(p).tolist() for p in pieces]
            ids = np.array([index for run in runs for index in run], np.int32)
        else:
            found = next((piece for piece in (*pieces[:1], *pieces[-1:]) if isinstance(piece, int)), None)
            if found is not None and rendered is None:
                raise PromptError(
                    f"the response begins or ends with the special token {self._text(found)} beside its end; take it "
                    f"out, or set {_CHOICE}: true takes special tokens as tokens, false as text"
                )
            ids = self.encoder.encode(text)
        with_end = finished if rows is None else rows == len(ids) + 1
        return np.append(ids, np.int32(end)) if with_end and end is not None else ids

    def _refuse(self, what: str) -> NoReturn:
        raise PromptError(
            f"{what}: it may be rendered already, or somebody's words; set {_CHOICE}: true takes it as it is, "
            "false takes its special tokens as text"
        )

    @cached_property
    def _written(self) -> dict[str, str]:
        """Fixed conversations as the template writes them on some day: text is recognized whatever its date is."""
        return ChatTemplate(self._file.chat_template or "", self._file.settings, now=datetime.datetime.now()).probe

    @cached_property
    def _structure(self) -> set[int]:
        """Special tokens that the template writes around what is said, ends left out."""
        pieces = {piece for text in self._written.values() for piece in self._specials.split(text)}
        return {piece for piece in pieces if isinstance(piece, int)} - self.ends

    @cached_property
    def _opening(self) -> str | None:
        """A regular expression for how rendered text begins: the beginning of the text, then a turn's header."""
        text, turns = self._written["user"], self._written["turns"]
        between = turns.partition(ANSWER)[2].partition(QUESTION)[0]
        pieces = self._specials.split(between)
        while pieces and (pieces[0] in self.ends or str(pieces[0]).isspace()):
            pieces.pop(0)
        bos = self._text(self.roles["bos"]) if "bos" in self.roles else ""
        header = "".join(map(self._text, pieces))
        if not pieces or not isinstance(pieces[0], int):
            return None
        body = header.rstrip()
        if not isinstance(self._specials.split(body)[-1], int):
            body = header[: len(body) + 1]  # `user` alone could go on, `user` and a line's end could not
        start = bos if bos and text.startswith(bos) and not header.startswith(bos) else ""
        return re.escape(start) + r"\s*" + re.escape(body).replace("user", r"[\w-]+")

    @property
    def _example(self) -> str:
        opening = self._written["user"].partition(QUESTION)[0]
        return f" ({opening[:40]!r})" if opening else ""

    def _render(self, messages: Sequence[Message]) -> str:
        if self.template is None:
            return "".join(message.content for message in messages)
        self.template_used = True
        try:
            return self.template.render([{"role": m.role, "content": m.content} for m in messages], generate=True)
        except UserError:
            raise
        except Exception as error:  # templates raise what they like
            raise PromptError(f"the chat template refuses it: {error}") from error

    def _text(self, piece: int | str) -> str:
        return self._file.texts[piece] if isinstance(piece, int) else piece

    def _mark(self, text: str) -> str:
        if self._specials.pattern:
            text = self._specials.pattern.sub(lambda match: _marked(self._specials.ids[match[0]]), text)
        return text.replace(BREAK, "")

    @cached_property
    def _backend(self) -> Any:
        """The tokenizer itself, but its special tokens are written `_OPEN id _CLOSE`, so that text cannot name them."""
        from tokenizers import Tokenizer

        tree = with_merges(self._file.tree)
        model = tree["model"]
        special_ids = {entry["content"]: entry["id"] for entry in tree["added_tokens"] if entry["special"]}
        names = {text: _marked(index) for text, index in special_ids.items()}
        vocab = model["vocab"]
        renamed: Any
        if isinstance(vocab, dict):
            # A special token that is not in the vocabulary would get the next free id, whatever its own (tekken.json).
            renamed = {names.get(text, text): index for text, index in (vocab | special_ids).items()}
        else:
            renamed = [[names.get(text, text), score] for text, score in vocab]
        unknown = {"unk_token": names.get(model["unk_token"], model["unk_token"])} if model.get("unk_token") else {}
        tree = {
            **tree,
            "truncation": None,
            "padding": None,
            "post_processor": None,
            "added_tokens": [
                {**entry, "content": names[entry["content"]] if entry["special"] else entry["content"]}
                for entry in tree["added_tokens"]
            ],
            "model": {**model, "vocab": renamed, **unknown},
        }
        return Tokenizer.from_str(json.dumps(tree, ensure_ascii=False))


def _check_characters(text: str) -> None:
    strange = next((character for character in (_OPEN, _CLOSE, BREAK) if character in text), None)
    if strange is not None:
        raise PromptError(f"it holds U+{ord(strange):04X}, which is not a character of any text; take it out")


def _marked(index: int) -> str:
    return f"{_OPEN}{index}{_CLOSE}"
