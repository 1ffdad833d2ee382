"""The older JSON layout of this project's users: one entry to one record, and back.

An entry has `prompt` (text, or a list of messages), `response`, and `logits`, one row per response token: the whole
vocabulary, or one value per candidate with the candidates' ids in `tokenID` or their strings in `token`. Entries with
`messages` and no logits are plain conversations: their last turn is the response. A row over the whole vocabulary
gives logprobs with their true normaliser and a known tail. Values of candidates alone are normalised over them, and
the tail is recorded as unknown (NaN), unless the entry states `tail`: such values are logprobs as they stand.

`to_entry` writes further keys that make the way back exact: ids, tail, the sampled token's logprob, sampling.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from shared.chat import ChatEncoder, RenderedPrompt
from shared.errors import DatasetError, PromptError
from shared.records import Distributions, FinishReason, Message, Record, Sampling
from shared.template import ChatTemplate
from shared.tokenizer_files import read_tokenizer_file
from shared.vocabulary import Vocabulary

UNKNOWN_FILTER = -1
"""`Sampling.top_k` of responses decoded nobody says how: their rule is `filtered`, which claims least."""


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """What the entries do not say.

    Attributes:
        top_k: candidates kept of a row; what is cut off goes to the tail.
        values: what candidate-only rows hold: `logits`, of any offset, or `logprobs`, which leave a known tail.
        sampling: how the responses were decoded, where the entry has no `sampling`.
        held_out: share of the prompts that training never sees, chosen by their hash.
        rendered: whether prompts are rendered text already; None recognizes those that are.
        template_arguments: of the tokenizer's chat template.
    """

    top_k: int = 64
    values: Literal["logits", "logprobs"] = "logits"
    sampling: Sampling = field(default_factory=lambda: Sampling(1.0, 1.0, UNKNOWN_FILTER, 0, None))
    held_out: float = 0.1
    rendered: bool | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)


class EntryReader:
    """Entries to records, with the tokenizer that the rows were made with.

    Raises:
        VocabularyError: if the tokenizer cannot be read.
    """

    def __init__(self, tokenizer_dir: Path, settings: ImportSettings) -> None:
        self._chat = ChatEncoder(read_tokenizer_file(tokenizer_dir), settings.template_arguments, settings.rendered)
        self.vocabulary, self._encoder = self._chat.vocabulary, self._chat.encoder
        self._settings = settings
        self._ids_of_text = {text: i for i, text in reversed(list(enumerate(self.vocabulary.texts))) if text}

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
        if not isinstance(entry, dict):
            raise DatasetError(
                f"{where} is {type(entry).__name__}, expected an object with prompt and response, or messages"
            )
        messages, response = _conversation(entry, where)
        rows = entry.get("logits")
        response_ids = self._response_ids(entry, response, rows, where)
        response_bytes = self.vocabulary.decode(response_ids)
        prompt_text, prompt_ids = self._prompt(entry, messages, where)
        prompt_id = str(entry.get("prompt_id") or _digest(*(f"{m.role}\n{m.content}" for m in messages)))
        return Record(
            sample_id=str(entry.get("id", f"{prompt_id}/{number}")),
            prompt_id=prompt_id,
            split=str(entry.get("split") or self._split(prompt_id)),
            skill=str(entry.get("skill", "")),
            messages=messages,
            prompt_text=prompt_text,
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            response_bytes=response_bytes,
            finish_reason=_finish_reason(entry, where),
            sampling=_sampling(entry, self._settings.sampling, where),
            distributions=None if rows is None else self._distributions(entry, rows, response_ids, where),
        )

    def _response_ids(self, entry: dict[str, Any], response: str, rows: Any, where: str) -> NDArray[np.int32]:
        """The response's tokens; with rows, as many as there are rows."""
        if rows is not None and not isinstance(rows, list):
            raise DatasetError(f"{where}: logits is {type(rows).__name__}, expected a list with one row per token")
        if "response_ids" in entry:
            ids = self._ids(entry["response_ids"], f"{where}: response_ids")
        else:
            finished = _finish_reason(entry, where) != "length"
            try:
                ids = self._chat.response(response, finished, None if rows is None else len(rows))
            except PromptError as error:
                raise DatasetError(f"{where}: {error}") from error
        if rows is not None and len(rows) != len(ids):
            raise DatasetError(
                f"{where}: {len(rows)} rows of logits for a response of {len(ids)} tokens; the rows belong to another "
                "tokenization: pass the teacher's tokenizer, or give the entry its response_ids"
            )
        return ids

    def _distributions(
        self, entry: dict[str, Any], rows: list[Any], response_ids: NDArray[np.int32], where: str
    ) -> Distributions:
        ids_of_rows = self._candidates(entry, len(rows), where)
        stated_tail = _numbers(entry, "tail", len(rows), where)
        stated_sampled = _numbers(entry, "sampled", len(rows), where)
        all_ids, all_logprobs, tail, sampled = [], [], [], []
        for position, row in enumerate(rows):
            at = f"{where}, row {position}"
            values = _row(row, at)
            ids = None if ids_of_rows is None else ids_of_rows[position]
            if ids is None or (len(values) == len(self.vocabulary) != len(ids)):
                if len(values) != len(self.vocabulary):
                    raise DatasetError(
                        f"{at}: {len(values)} values without token or tokenID; expected the whole vocabulary of "
                        f"{len(self.vocabulary)}, or candidates named in token or tokenID"
                    )
                ids, logprobs, rest = np.arange(len(values)), values - _log_sum(values), 0.0
            else:
                self._check_candidates(ids, values, at)
                if stated_tail is not None and not math.isnan(stated_tail[position]):
                    logprobs, rest = values, float(stated_tail[position])
                elif self._settings.values == "logprobs" and stated_tail is None:
                    rest = -math.expm1(_log_sum(values)) if len(values) else 1.0
                    logprobs = values
                    if rest < -1e-3:
                        raise DatasetError(
                            f"{at}: the candidates' probabilities add up to {1 - rest:.6f}, more than 1: these are not "
                            "logprobs; import them with --values logits"
                        )
                else:
                    logprobs, rest = values - _log_sum(values), math.nan
            order = np.argsort(-logprobs, kind="stable")
            kept = order[: self._settings.top_k]
            own = np.flatnonzero(ids == response_ids[position])
            sampled.append(logprobs[own[0]] if len(own) else math.nan)
            rest += float(np.exp(logprobs[order[self._settings.top_k :]]).sum())
            all_ids.append(ids[kept])
            all_logprobs.append(logprobs[kept])
            tail.append(rest)
        own_logprobs = np.array(sampled, np.float32)
        if stated_sampled is not None:
            own_logprobs = np.where(np.isnan(own_logprobs), stated_sampled, own_logprobs).astype(np.float32)
        widths = [len(ids) for ids in all_ids]
        return Distributions(
            np.concatenate([[0], np.cumsum(widths)]).astype(np.int64),
            np.concatenate([*all_ids, np.zeros(0)]).astype(np.int32),
            np.concatenate([*all_logprobs, np.zeros(0)]).astype(np.float32),
            np.array(tail, np.float32),
            own_logprobs,
        )

    def _candidates(self, entry: dict[str, Any], count: int, where: str) -> list[NDArray[np.int64]] | None:
        """Candidate ids of every row, from `tokenID` or else `token`."""
        for key in ("tokenID", "token"):
            named = entry.get(key)
            if named is None:
                continue
            if not isinstance(named, list) or len(named) != count or not all(isinstance(row, list) for row in named):
                rows = len(named) if isinstance(named, list) else type(named).__name__
                raise DatasetError(
                    f"{where}: {key} has {rows} rows, logits has {count}; expected one list per row of logits"
                )
            return [
                self._named(row, f"{where}, row {position}") if key == "token"
                else self._ids(row, f"{where}, row {position}: tokenID").astype(np.int64)
                for position, row in enumerate(named)
            ]  # fmt: skip
        return None

    def _named(self, texts: Sequence[Any], at: str) -> NDArray[np.int64]:
        ids = []
        for position, text in enumerate(texts):
            # The tokenizer's own spelling first (`Ġthe`), else the text that the token stands for (` the`).
            index = self._ids_of_text.get(text) if isinstance(text, str) else None
            if index is None and isinstance(text, str):
                index = self.vocabulary.ids.get(text.encode("utf-8", "surrogatepass"))
            if index is None:
                raise DatasetError(
                    f"{at}, position {position}: the tokenizer has no token {text!r}; "
                    "pass the teacher's tokenizer, or name candidates by id in tokenID"
                )
            ids.append(index)
        return np.array(ids, np.int64)

    def _check_candidates(self, ids: NDArray[np.int64], values: NDArray[np.float64], at: str) -> None:
        if len(ids) != len(values):
            raise DatasetError(
                f"{at}: {len(values)} logits for {len(ids)} candidates; expected one value per candidate"
            )
        seen: dict[int, int] = {}
        for position, index in enumerate(ids.tolist()):
            if index in seen:
                raise DatasetError(
                    f"{at}, position {position}: candidate {index} ({self.vocabulary.texts[index]!r}) stands at "
                    f"position {seen[index]} already; drop one of the two"
                )
            seen[index] = position

    def _ids(self, values: Any, at: str) -> NDArray[np.int32]:
        if not isinstance(values, list):
            raise DatasetError(f"{at} is {type(values).__name__}, expected a list of token ids")
        for position, value in enumerate(values):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(self.vocabulary):
                raise DatasetError(
                    f"{at}, position {position}: id {value!r} is outside the vocabulary, expected a whole number "
                    f"from 0 to {len(self.vocabulary) - 1}; pass the tokenizer that the ids are of"
                )
        return np.array(values, np.int32)

    def _prompt(
        self, entry: Mapping[str, Any], messages: tuple[Message, ...], where: str
    ) -> tuple[str, NDArray[np.int32]]:
        """The rendered prompt and its ids, as far as the entry does not state them."""
        text = None if entry.get("prompt_text") is None else str(entry["prompt_text"])
        try:
            rendered = self._chat.prompt(messages) if text is None else RenderedPrompt(text, self._chat.encode(text))
        except PromptError as error:
            raise DatasetError(f"{where}: {error}") from error
        if "prompt_ids" in entry:
            return rendered.text, self._ids(entry["prompt_ids"], f"{where}: prompt_ids")
        return rendered.text, rendered.ids

    def _split(self, prompt_id: str) -> str:
        share = int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8]) / 2**64
        return "held_out" if share < self._settings.held_out else "train"


def to_entry(record: Record, vocabulary: Vocabulary) -> dict[str, Any]:
    """The entry of one record: the older layout's keys, and those that make the way back exact."""
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


def _conversation(entry: Mapping[str, Any], where: str) -> tuple[tuple[Message, ...], str]:
    """The messages before the response, and the response's text."""
    if "response" in entry:
        prompt, response = entry.get("prompt", entry.get("messages")), entry["response"]
        if not isinstance(response, str):
            raise DatasetError(f"{where}: response is {type(response).__name__}, expected text")
        if isinstance(prompt, str):
            return (Message("user", prompt),), response
        return _messages(prompt, "prompt", where), response
    turns = _messages(entry.get("messages"), "messages", where)
    if entry.get("logits") is not None:
        raise DatasetError(f"{where} has logits but no response; give the text that the rows belong to as response")
    if len(turns) < 2 or turns[-1].role != "assistant":
        last = turns[-1].role if turns else "nothing"
        raise DatasetError(f"{where}: messages end with {last!r}, expected a prompt and then an assistant's turn")
    return turns[:-1], turns[-1].content


def _messages(value: Any, key: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        _malformed(value, key, where)
    for turn in value:
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            _malformed(turn, key, where)
    return tuple(Message(turn["role"], turn["content"]) for turn in value)


def _malformed(value: Any, key: str, where: str) -> NoReturn:
    seen = "missing" if value is None else repr(value)[:60]
    raise DatasetError(f"{where}: {key} is {seen}, expected text or a list of {{role, content}}")


def _row(row: Any, at: str) -> NDArray[np.float64]:
    if not isinstance(row, list):
        raise DatasetError(f"{at} is {type(row).__name__}, expected a list of numbers")
    try:
        values = np.array(row, np.float64)
    except (ValueError, TypeError):
        values = np.zeros((0, 0))
    if values.ndim != 1:
        bad = next((i for i, v in enumerate(row) if not isinstance(v, int | float)), 0)
        raise DatasetError(f"{at}, position {bad}: {row[bad]!r} is not a number")
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise DatasetError(
            f"{at}, position {wrong[0]}: logit {values[wrong[0]]}, expected a finite number; leave out tokens of "
            "probability 0, and collect again what came out as NaN"
        )
    return values


def _numbers(entry: Mapping[str, Any], key: str, count: int, where: str) -> NDArray[np.float64] | None:
    """A list of numbers per row, null standing for unknown; None where the entry does not have it."""
    if key not in entry:
        return None
    values = entry[key]
    if not isinstance(values, list) or len(values) != count:
        found = len(values) if isinstance(values, list) else type(values).__name__
        raise DatasetError(f"{where}: {key} has {found} values, logits has {count} rows; expected one per row")
    for position, value in enumerate(values):
        if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
            raise DatasetError(
                f"{where}, row {position}: {key} {value!r}, expected a finite number, or null for unknown"
            )
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _finish_reason(entry: Mapping[str, Any], where: str) -> FinishReason:
    value = entry.get("finish_reason", "unknown")
    if value not in ("stop", "length", "unknown"):
        raise DatasetError(f"{where}: finish_reason {value!r}, expected stop, length or unknown")
    return cast(FinishReason, value)


def _sampling(entry: Mapping[str, Any], default: Sampling, where: str) -> Sampling:
    if "sampling" not in entry:
        return default
    try:
        return Sampling(**entry["sampling"])
    except TypeError as error:
        raise DatasetError(
            f"{where}: sampling {entry['sampling']!r}: {error}; expected {Sampling.__slots__}"
        ) from error


def _floats(values: NDArray[np.float32]) -> list[float | None]:
    """Shortest decimals that give the same float32 back; null for NaN, which JSON does not have."""
    return [None if math.isnan(value) else float(str(value)) for value in values]


def _log_sum(values: NDArray[np.float64]) -> float:
    if not len(values):
        return 0.0
    top = values.max()
    return float(top + np.log(np.exp(values - top).sum()))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
