"""Rows of logits, as the legacy JSON layout has them, to distributions.

Numbers are numbers of JSON: text and booleans, which numpy would turn into some, are refused. What is said twice must
agree: `token` and `tokenID`, `tail` and the values, `sampled` and the response token's own value, candidates named
beside values over the whole vocabulary. Costs some 50 µs a row of 64 candidates.

Legend: W values of a row, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.commands.legacy_json.models import ENTRY_EXAMPLE, Entry
from shared.dataset.checks import MASS_TOLERANCE, SAMPLED_TOLERANCE, SHIFTED
from shared.dataset.records import Distributions, offsets_of
from shared.errors import DatasetError
from shared.json_input import is_schematic
from shared.tokenizer.vocabulary import Vocabulary


class RowReader:
    """Rows of entries to distributions over the tokens of `vocabulary`.

    Args:
        top_k: candidates kept of a row; what is cut off goes to the tail.
        values: what candidates' values are, where the entry states no tail: `logits`, of any offset, or `logprobs`.
    """

    def __init__(self, vocabulary: Vocabulary, top_k: int, values: Literal["logits", "logprobs"]) -> None:
        self._vocabulary, self._top_k, self._values = vocabulary, top_k, values
        self._ids_of_text = {text: i for i, text in reversed(list(enumerate(vocabulary.texts))) if text}

    def distributions(self, entry: Entry, response_ids: NDArray[np.int32], where: str) -> Distributions:
        """Those of an entry with `logits`, one row per token of `response_ids`.

        Raises:
            DatasetError: naming entry, row, position, value and fix.
        """
        assert entry.logits is not None
        count = len(entry.logits)
        stated = {key: _stated(getattr(entry, key), key, count, where) for key in ("tail", "sampled")}
        named = {key: _named(getattr(entry, key), key, count, where) for key in ("tokenID", "token")}
        found = []
        for row, (values, own) in enumerate(zip(entry.logits, response_ids.tolist(), strict=True)):
            at = f"{where}, row {row}"
            if not isinstance(values, list):
                raise DatasetError(f"{at} is {values!r:.60}, expected a list of numbers{_hint(values)}")
            values_W = _numbers(values, at)
            names = {key: rows[row] for key, rows in named.items() if rows is not None}
            ids_W = self._candidates(values_W, names, own, at)
            tail, sampled = float(stated["tail"][row]), float(stated["sampled"][row])
            if entry.tail is None and self._values == "logprobs":
                tail = math.inf  # whatever the candidates leave
            found.append(self._normalized(values_W, ids_W, own, tail, sampled, at))
        ids, logprobs, tails, sampleds = zip(*found, strict=True) if found else ((), (), (), ())
        return Distributions(
            offsets_of([len(row) for row in ids]),
            np.concatenate([np.zeros(0), *ids]).astype(np.int32),
            np.concatenate([np.zeros(0), *logprobs]).astype(np.float32),
            np.array(tails, np.float32),
            np.array(sampleds, np.float32),
        )

    def _normalized(
        self, values_W: NDArray[np.float64], ids_W: NDArray[np.int64], own: int, tail: float, sampled: float, at: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], float, float]:
        """Ids and logprobs of what is kept of a row, its tail, and the sampled token's logprob.

        Args:
            own: the response's token. tail: as stated; NaN is unknown, infinity is what the candidates leave.
            sampled: as stated, or NaN.
        """
        log_mass = _log_sum(values_W)
        mass = math.exp(min(log_mass, 700.0)) if len(values_W) else 0.0
        given = tail if math.isfinite(tail) else None
        if len(values_W) == len(self._vocabulary):
            if given is not None and given > MASS_TOLERANCE:
                raise DatasetError(f"{at}: tail is {given:.4f}, expected 0: the row has every token's value")
            wrong = self._values == "logprobs" and abs(mass - 1) > MASS_TOLERANCE
            tail = 0.0
        elif math.isinf(tail):
            tail, log_mass = 1 - mass, 0.0
            wrong = tail < -MASS_TOLERANCE
        else:
            wrong = given is not None and abs(mass + given - 1) > MASS_TOLERANCE
            log_mass = log_mass if given is None else 0.0
        if wrong:
            beside = "" if given is None else f" beside a tail of {given:.6f}"
            fix = "take out tail, or correct it" if beside else "import them with --values logits"
            raise DatasetError(
                f"{at}: the candidates' probabilities add up to {mass:.6f}{beside}, {'more' if mass > 1 else 'other'} "
                f"than 1: these are not logprobs; {fix}"
            )
        logprobs_W = values_W - log_mass
        for place in np.flatnonzero(ids_W == own):
            if abs(sampled - logprobs_W[place]) > SAMPLED_TOLERANCE:
                raise DatasetError(
                    f"{at}: sampled is {sampled:.4f}, expected {logprobs_W[place]:.4f}, which the row gives the "
                    f"response's token; {SHIFTED}"
                )
            sampled = float(logprobs_W[place])
        order = np.argsort(-logprobs_W, kind="stable")
        kept, cut = order[: self._top_k], order[self._top_k :]
        return ids_W[kept], logprobs_W[kept], tail + float(np.exp(logprobs_W[cut]).sum()), sampled

    def _candidates(
        self, values_W: NDArray[np.float64], named: dict[str, list[Any]], own: int, at: str
    ) -> NDArray[np.int64]:
        """int64 [W], the candidate that each value is of; `named` are those of `tokenID` and `token`."""
        width, size = len(values_W), len(self._vocabulary)
        if not named and width != size:
            raise DatasetError(
                f"{at}: {width} values without token or tokenID; expected the whole vocabulary of {size}, "
                "or candidates named in token or tokenID"
            )
        for key, names in named.items():
            if len(names) != width != size:
                raise DatasetError(f"{at}: {width} logits for {len(names)} candidates in {key}; expected one for each")
        ids = token_ids(named["tokenID"], size, f"{at}: tokenID") if "tokenID" in named else None
        if "token" in named:
            ids = self._of_names(named["token"], ids, at)
        if ids is None:
            return np.arange(size)
        seen: dict[int, int] = {}
        for position, index in enumerate(ids.tolist()):
            if seen.setdefault(index, position) != position:
                raise DatasetError(
                    f"{at}, position {position}: candidate {index} ({self._vocabulary.texts[index]!r}) stands at "
                    f"position {seen[index]} already; drop one of the two"
                )
        if len(ids) == width:
            return ids
        # Values in order of id, and beside them the likeliest tokens, or the response's own.
        least = np.partition(values_W, -len(ids))[-len(ids)] if len(ids) else 0.0
        for position in np.flatnonzero((values_W[ids] < least - SAMPLED_TOLERANCE) & (ids != own)):
            raise DatasetError(
                f"{at}, position {position}: candidate {ids[position]} is not among the {len(ids)} likeliest of the "
                "row's values, which are in order of id over the whole vocabulary; take out token and tokenID, or give "
                "the candidates' values alone"
            )
        return np.arange(size)

    def _of_names(self, names: list[Any], ids: NDArray[np.int64] | None, at: str) -> NDArray[np.int64]:
        """The ids of the tokens' names; where ids are given the names must be theirs."""
        if ids is None:
            found = list(map(self._id_of, names))
            if None in found:
                position = found.index(None)
                raise DatasetError(
                    f"{at}, position {position}: the tokenizer has no token {names[position]!r}"
                    f"{_hint(names[position])}; pass the teacher's tokenizer, or name candidates by id in tokenID"
                )
            return np.array(found, np.int64)
        if len(names) != len(ids):
            raise DatasetError(
                f"{at}: {len(names)} names in token for {len(ids)} ids in tokenID; expected one name for each id"
            )
        for position, (name, index) in enumerate(zip(names, ids.tolist(), strict=True)):
            if name is not None and not self._is_name(name, index):
                raise DatasetError(
                    f"{at}, position {position}: token is {name!r}, but tokenID {index} is "
                    f"{self._vocabulary.texts[index]!r} in this tokenizer; pass the tokenizer that the rows were made "
                    "with, or take out the one that is wrong"
                )
        return ids

    def _id_of(self, name: Any) -> int | None:
        """The tokenizer's own string first (`Ġthe`), else the text that the token stands for (` the`)."""
        if not isinstance(name, str):
            return None
        index = self._ids_of_text.get(name)
        return self._vocabulary.ids.get(name.encode("utf-8", "surrogatepass")) if index is None else index

    def _is_name(self, name: Any, index: int) -> bool:
        """Whether `name` is the token's string, or its text as tokenizers decode it alone."""
        string = self._vocabulary.texts[index]
        if name == string:
            return True
        text = self._vocabulary.tokens[index].decode("utf-8", "replace")
        return bool(name == text or (string.startswith("▁") and name == text.removeprefix(" ")))


def token_ids(values: list[Any], size: int, at: str) -> NDArray[np.int64]:
    """A list of ids below `size`.

    Raises:
        DatasetError: naming `at`, the position and the value.
    """
    if set(map(type, values)) <= {int} and (not values or (min(values) >= 0 and max(values) < size)):
        return np.array(values, np.int64)
    position = next(i for i, value in enumerate(values) if type(value) is not int or not 0 <= value < size)
    value = values[position]
    fix = "write it without quotes" if isinstance(value, str) else "pass the tokenizer that the ids are of"
    raise DatasetError(
        f"{at}, position {position}: id {value!r} is outside the vocabulary, expected a whole number from 0 to "
        f"{size - 1}{_hint(value) or f'; {fix}'}"
    )


def _numbers(values: list[Any], at: str) -> NDArray[np.float64]:
    """float64 [W]."""
    if set(map(type, values)) <= {float, int}:
        try:
            numbers = np.array(values, np.float64)
        except OverflowError:  # a whole number beyond float64
            numbers = np.array([float(v) if abs(v) < 1e308 else math.inf for v in values])
        for position in np.flatnonzero(~np.isfinite(numbers)):
            raise DatasetError(
                f"{at}, position {position}: logit {numbers[position]}, expected a finite number; leave out tokens of "
                "probability 0 (write -1e9 in a row over the whole vocabulary), and collect again what is NaN"
            )
        return numbers
    position, value = next((i, value) for i, value in enumerate(values) if type(value) not in (float, int))
    fix = ", without quotes" if isinstance(value, str) else ""
    raise DatasetError(f"{at}, position {position}: {value!r:.60} is not a number; expected a logit{fix}{_hint(value)}")


def _stated(values: list[float | None] | None, key: str, count: int, where: str) -> NDArray[np.float64]:
    """One value per row, NaN where it is not stated."""
    if values is None:
        return np.full(count, np.nan)
    if len(values) != count:
        raise DatasetError(f"{where}: {key} has {len(values)} values, logits has {count} rows; expected one per row")
    return np.array(values, np.float64)  # None becomes NaN


def _named(rows: list[Any] | None, key: str, count: int, where: str) -> list[list[Any]] | None:
    if rows is not None and (len(rows) != count or not all(isinstance(row, list) for row in rows)):
        wrong = next((f", {row!r:.60} among them" for row in rows if not isinstance(row, list)), "")
        raise DatasetError(
            f"{where}: {key} has {len(rows)} rows{wrong}, logits has {count}; expected one list per row of logits"
        )
    return rows


def _log_sum(values: NDArray[np.float64]) -> float:
    """Log of the sum of exp; 0 for a row of no values, whose mass counts as nothing."""
    if not len(values):
        return 0.0
    top = values.max()
    return float(top + np.log(np.exp(values - top).sum()))


def _hint(value: object) -> str:
    return f": dots stand for values in a schematic example; expected {ENTRY_EXAMPLE}" if is_schematic(value) else ""
