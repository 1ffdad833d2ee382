"""The legacy JSON layout of this project's users: one entry to one record, and back.

An entry has `prompt` (text, or a list of messages), `response`, and `logits`, one row per response token: the whole
vocabulary, or one value per candidate with the candidates' ids in `tokenID` or their strings in `token`. Entries with
`messages` and no logits are plain conversations: their last turn is the response. A row over the whole vocabulary
gives logprobs with their true normalizer and a known tail. Values of candidates alone are normalized over them, and
the tail is recorded as unknown (NaN), unless the entry states `tail`: such values are logprobs as they stand.

What an entry says twice must agree, or it is refused. `to_entry` writes further keys that make the way back exact:
ids, tail, the sampled token's logprob, sampling.
"""

from __future__ import annotations

import hashlib
import logging
import math
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from shared.commands.legacy_json.models import ENTRY_EXAMPLE, Entry
from shared.commands.legacy_json.rows import RowReader, token_ids
from shared.dataset.records import UNKNOWN_SAMPLING, Message, Record, Sampling
from shared.dataset.split import held_out
from shared.errors import ConfigError, DatasetError, PromptError
from shared.json_models import checked, to_messages
from shared.tokenizer.chat import ChatEncoder
from shared.tokenizer.files import read_tokenizer_file
from shared.tokenizer.template import ChatTemplate
from shared.tokenizer.vocabulary import Vocabulary, first_difference

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """What the entries do not say.

    Attributes:
        top_k: candidates kept of a row; what is cut off goes to the tail.
        values: what candidate-only rows hold: `logits`, of any offset, or `logprobs`, which leave a known tail.
        sampling: how the responses were decoded, where the entry has no `sampling`.
        held_out: share of the prompts that training never sees (`shared.dataset.split`).
        rendered: whether prompts are rendered text already; None recognizes those that are.
        template_arguments: of the tokenizer's chat template.
        teacher: the name of whose rows these are, for the provenance; None takes the file's.
    """

    top_k: int = 64
    values: Literal["logits", "logprobs"] = "logits"
    sampling: Sampling = UNKNOWN_SAMPLING
    held_out: float = 0.1
    rendered: bool | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.held_out <= 1:
            raise ConfigError(f"--held-out is {self.held_out}, expected a share from 0 to 1")
        if not 0 <= self.sampling.temperature < math.inf:
            raise ConfigError(f"--temperature is {self.sampling.temperature}, expected a finite number, 0 or more")


class EntryReader:
    """Entries to records, with the tokenizer that the rows were made with.

    Raises:
        VocabularyError: if the tokenizer cannot be read.
    """

    def __init__(self, tokenizer_dir: Path, settings: ImportSettings) -> None:
        self._chat = ChatEncoder(read_tokenizer_file(tokenizer_dir), settings.template_arguments, settings.rendered)
        self.vocabulary = self._chat.vocabulary
        self._settings = settings
        self._rows = RowReader(self.vocabulary, settings.top_k, settings.values)
        self._foreign: set[str] = set()
        self._stated: dict[str, tuple[str, str]] = {}  # conversation → the split that an entry states, and where
        self._skills: dict[str, str] = {}  # of conversations whose split no entry before has stated
        self._held_out: set[str] = set()

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template, if prompts were rendered with it so far."""
        return self._chat.template if self._chat.template_used else None

    def record(self, entry: Any, where: str, number: int) -> Record:
        """The record of one entry.

        Args:
            where: file and entry, for messages. number: of the entry, for its id where it has none.

        Raises:
            DatasetError: naming file, row, position, value and fix.
        """
        given = checked(Entry, entry, where, DatasetError, ENTRY_EXAMPLE)
        self._warn_of_foreign(entry, where)
        messages, response = _conversation(given, where)
        beside = ("tokenID", "token", "tail", "sampled")
        if given.logits is None and (idle := [key for key in beside if getattr(given, key) is not None]):
            raise DatasetError(f"{where}: {idle[0]} without logits; give the rows that it belongs to, or take it out")
        response_ids = self._response_ids(given, response, where)
        prompt_text, prompt_ids = self._prompt(given, messages, where)
        self._check_texts(given, prompt_text, prompt_ids, response_ids, where)
        said = "\0".join(f"{m.role}\n{m.content}" for m in messages)
        conversation = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        prompt_id = given.prompt_id or conversation
        return Record(
            sample_id=given.id or f"{prompt_id}/{number}",
            prompt_id=prompt_id,
            split=self._split(given, conversation, messages[-1].content, where),
            skill=given.skill,
            messages=messages,
            prompt_text=prompt_text,
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            response_bytes=self.vocabulary.decode(response_ids),
            finish_reason=given.finish_reason,
            sampling=self._sampling(given, len(response_ids), where),
            distributions=None if given.logits is None else self._rows.distributions(given, response_ids, where),
        )

    def choose_held_out(self) -> None:
        """Choose the splits of the prompts read so far whose entries state none; those read again have them then."""
        unstated = {key: skill for key, skill in self._skills.items() if key not in self._stated}
        self._held_out = held_out(unstated, self._settings.held_out)

    def _split(self, entry: Entry, conversation: str, said: str, where: str) -> str:
        if entry.split is None:
            self._skills.setdefault(conversation, entry.skill)
            default = "held_out" if conversation in self._held_out else "train"
            return self._stated.get(conversation, (default, ""))[0]
        split, place = self._stated.setdefault(conversation, (entry.split, where))
        if split != entry.split:
            raise DatasetError(
                f"{where}: the prompt {said[:60]!r} is also in {place}, in the split {split}, not {entry.split}; "
                "one prompt is in one split"
            )
        return split

    def _response_ids(self, entry: Entry, response: str, where: str) -> NDArray[np.int32]:
        """The response's tokens; with rows, as many as there are rows."""
        count = None if entry.logits is None else len(entry.logits)
        if entry.response_ids is not None:
            ids = self._ids(entry.response_ids, f"{where}: response_ids")
        else:
            try:
                ids = self._chat.response(response, entry.finish_reason != "length", count, entry.rendered)
            except PromptError as error:
                raise DatasetError(f"{where}: {error}") from error
        if count not in (None, len(ids)):
            raise DatasetError(
                f"{where}: {count} rows of logits for a response of {len(ids)} tokens; the rows belong to another "
                "tokenization: pass the teacher's tokenizer, or give the entry its response_ids"
            )
        return ids

    def _ids(self, values: list[Any], at: str) -> NDArray[np.int32]:
        return token_ids(values, len(self.vocabulary), at).astype(np.int32)

    def _prompt(self, entry: Entry, messages: tuple[Message, ...], where: str) -> tuple[str, NDArray[np.int32]]:
        """The rendered prompt and its ids, as far as the entry does not state them."""
        text, ids = entry.prompt_text, None
        try:
            if text is None:
                rendered = self._chat.prompt(messages, entry.rendered)
                text, ids = rendered.text, rendered.ids
            if entry.prompt_ids is not None:
                ids = self._ids(entry.prompt_ids, f"{where}: prompt_ids")
            return text, self._chat.encode(text) if ids is None else ids
        except PromptError as error:
            raise DatasetError(f"{where}: {error}") from error

    def _check_texts(
        self, entry: Entry, prompt: str, prompt_ids: NDArray[np.int32], response_ids: NDArray[np.int32], where: str
    ) -> None:
        """Raise where ids that are stated are of another text than the one that is stated."""
        if entry.prompt_ids is not None:
            bos = self.vocabulary.roles.get("bos")
            text = self._text_of(prompt_ids)
            short = self._text_of(prompt_ids[1:]) if len(prompt_ids) and prompt_ids[0] == bos else text
            if not _is_same(text, prompt) and not _is_same(short, prompt):
                _differ(where, "prompt_ids", text, "prompt_text" if entry.prompt_text else "prompt", prompt)
        if entry.response_ids is not None and entry.response is not None:
            plain = self.vocabulary.decode(response_ids).decode("utf-8", "replace")
            if not _is_same(plain, entry.response) and not _is_same(self._text_of(response_ids), entry.response):
                _differ(where, "response_ids", plain, "response", entry.response)
        if entry.finish_reason == "length" and len(response_ids) and response_ids[-1] in self.vocabulary.end_ids:
            raise DatasetError(
                f"{where}: finish_reason is length, but the response's last token is its end, "
                f"{self.vocabulary.texts[response_ids[-1]]!r}; say stop, or take the token and its row out"
            )

    def _text_of(self, ids: NDArray[np.int32]) -> str:
        """The text of `ids`, special tokens included."""
        special, vocabulary = self.vocabulary.is_special, self.vocabulary
        pieces = (vocabulary.texts[i].encode() if special[i] else vocabulary.tokens[i] for i in ids.tolist())
        return b"".join(pieces).decode("utf-8", "replace")

    def _sampling(self, entry: Entry, tokens: int, where: str) -> Sampling:
        if entry.sampling is None:
            return self._settings.sampling
        stated, asked = Sampling(**entry.sampling.model_dump()), self._settings.sampling
        if asked != UNKNOWN_SAMPLING and stated.temperature != asked.temperature:
            raise DatasetError(
                f"{where}: sampling.temperature is {stated.temperature:g}, --temperature is {asked.temperature:g}; "
                "leave out --temperature, which is for entries without sampling"
            )
        if 0 < stated.max_tokens < tokens:
            raise DatasetError(
                f"{where}: sampling.max_tokens is {stated.max_tokens}, but the response has {tokens} tokens; correct "
                "one, or pass the tokenizer that the response was written with"
            )
        return stated

    def _warn_of_foreign(self, entry: dict[str, Any], where: str) -> None:
        foreign = entry.keys() - Entry.model_fields.keys() - self._foreign
        if foreign:
            self._foreign |= foreign
            log.warning("%s: not of the layout, and left out here and below: %s", where, ", ".join(sorted(foreign)))


def to_entry(record: Record, vocabulary: Vocabulary) -> dict[str, Any]:
    """The entry of one record: the legacy JSON's keys, and those that make the way back exact."""
    entry: dict[str, Any] = {
        "id": record.sample_id,
        "prompt_id": record.prompt_id,
        "split": record.split,
        "skill": record.skill,
        "prompt": [{"role": m.role, "content": m.content} for m in record.messages],
        "prompt_text": record.prompt_text,
        "prompt_ids": record.prompt_ids.tolist(),
        "response": record.response_bytes.decode("utf-8", "replace"),
        "response_ids": record.response_ids.tolist(),
        "finish_reason": record.finish_reason,
        "sampling": {name: getattr(record.sampling, name) for name in Sampling.__slots__},
    }
    d = record.distributions
    if d is not None:
        rows = [d.row(position) for position in range(len(d))]
        entry["logits"] = [_floats(logprobs) for _, logprobs in rows]
        entry["tokenID"] = [ids.tolist() for ids, _ in rows]
        entry["token"] = [[vocabulary.texts[i] for i in ids] for ids, _ in rows]
        entry["tail"] = _floats(d.tail)
        entry["sampled"] = _floats(d.sampled)
    return entry


def _conversation(entry: Entry, where: str) -> tuple[tuple[Message, ...], str]:
    """The messages before the response, and the response's text."""
    turns, response = to_messages(entry.messages or []), entry.response
    if response is None:
        if entry.logits is not None or not turns:
            raise DatasetError(
                f"{where} has no response; expected prompt and response, or messages that end with an assistant's turn"
            )
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise DatasetError(f"{where}: messages end with {turns[-1].role!r}, expected a prompt and then an "
                               "assistant's turn")  # fmt: skip
        response, turns = turns[-1].content, turns[:-1]
    elif turns and turns[-1].role == "assistant":
        if turns[-1].content != response:
            _differ(where, "response", response, "messages' last turn", turns[-1].content)
        turns = turns[:-1]
    prompt = to_messages(entry.prompt or [])
    if not prompt and not turns:
        raise DatasetError(f"{where}: prompt is missing, expected text or a list of {{role, content}}")
    if prompt and turns and prompt != turns:
        # Text alone leaves out the system's turn.
        if len(prompt) > 1 or prompt != tuple(turn for turn in turns if turn.role != "system"):
            said, other = (" / ".join(turn.content for turn in each) for each in (prompt, turns))
            _differ(where, "prompt", said, "messages", other)
        prompt = turns
    return prompt or turns, response


def _differ(where: str, one: str, said: str, other: str, said_there: str) -> NoReturn:
    at = first_difference(said, said_there)
    start = max(at - 10, 0)
    raise DatasetError(
        f"{where}: {one} and {other} differ at character {at}: {said[start : at + 20]!r} against "
        f"{said_there[start : at + 20]!r}; they belong to different texts, or to another tokenizer: correct one, or "
        "take it out"
    )


def _is_same(text: str, other: str) -> bool:
    """Whether the texts are equal but for what tokenizers do to text: white space, Unicode's forms, case."""
    return text == other or _normalized(text) == _normalized(other)


def _normalized(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _floats(values: NDArray[np.float32]) -> list[float | None]:
    """Shortest decimals that give the same float32 back; null for NaN, which JSON does not have."""
    return [None if math.isnan(value) else float(str(value)) for value in values]
