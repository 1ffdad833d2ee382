"""Rows of logits, as the legacy JSON layout has them, to distributions.

Rows of one width are checked and normalized together, as arrays. Numbers are numbers of JSON: text and booleans, which
numpy would turn into some, are refused. What is said twice must agree: `token` and `tokenID`, `tail` and the values,
`sampled` and the response token's own value, candidates named beside values over the whole vocabulary.

Legend: T response tokens, R rows of one width, W values of each, V tokens of the vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.commands.legacy_json.models import ENTRY_EXAMPLE, Entry
from shared.dataset.checks import MASS_TOLERANCE, SAMPLED_TOLERANCE
from shared.dataset.records import Distributions
from shared.errors import DatasetError
from shared.json_input import is_schematic
from shared.tokenizer.vocabulary import Vocabulary

_BLOCK_VALUES = 1 << 20
_SHIFTED = "the rows are shifted against the response, or belong to another one"


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows `first` to `first + R` of an entry, all of one width.

    Attributes:
        values: float64 [R, W]. ids: int64 [R, W], the candidate of each. response: int32 [R], the response's tokens.
        tail, sampled: float64 [R], as stated; NaN where they are not.
        states_tail: whether the entry has tails; NaN is an unknown one then.
    """

    where: str
    first: int
    values: NDArray[np.float64]
    ids: NDArray[np.int64]
    response: NDArray[np.int32]
    tail: NDArray[np.float64]
    sampled: NDArray[np.float64]
    states_tail: bool

    def at(self, row: int) -> str:
        return f"{self.where}, row {self.first + row}"


class RowReader:
    """Rows of entries to distributions over the tokens of `vocabulary`.

    Args:
        top_k: candidates kept of a row; what is cut off goes to the tail.
        values: what candidates' values are, where the entry states no tail: `logits`, of any offset, or `logprobs`.
    """

    def __init__(self, vocabulary: Vocabulary, top_k: int, values: Literal["logits", "logprobs"]) -> None:
        self._vocabulary, self._top_k, self._values = vocabulary, top_k, values
        self._texts_V = np.array([*vocabulary.texts, None], object)[:-1]  # of str, whatever their lengths
        self._ids_of_text = {text: i for i, text in reversed(list(enumerate(vocabulary.texts))) if text}

    def distributions(self, entry: Entry, response_ids: NDArray[np.int32], where: str) -> Distributions:
        """Those of an entry with `logits`, one row per token of `response_ids`.

        Raises:
            DatasetError: naming entry, row, position, value and fix.
        """
        assert entry.logits is not None
        count = len(entry.logits)
        stated_tail = _stated(entry.tail, "tail", count, where)
        stated_sampled = _stated(entry.sampled, "sampled", count, where)
        named = {key: _named(getattr(entry, key), key, count, where) for key in ("tokenID", "token")}
        for row, values in enumerate(entry.logits):
            if not isinstance(values, list):
                raise DatasetError(f"{where}, row {row} is {values!r:.60}, expected a list of numbers{_hint(values)}")
        lists = [entry.logits, *(rows for rows in named.values() if rows is not None)]
        parts = []
        for first, last in _runs([tuple(map(len, row)) for row in zip(*lists, strict=True)]):
            rows = slice(first, last)
            values_RxW = _numbers(entry.logits[rows], f"{where}, row ", first)
            ids_RxW = self._candidates(values_RxW, named, rows, response_ids[rows], where)
            stated = stated_tail[rows], stated_sampled[rows], entry.tail is not None
            block = _Block(where, first, values_RxW, ids_RxW, response_ids[rows], *stated)
            parts.append(self._normalized(block))
        ids, logprobs, tail, sampled, widths = zip(*parts, strict=True) if parts else ([],) * 5
        none = [np.zeros(0)]
        return Distributions(
            np.concatenate([[0], np.cumsum(np.concatenate([*widths, *none]))]).astype(np.int64),
            np.concatenate([*ids, *none]).astype(np.int32),
            np.concatenate([*logprobs, *none]).astype(np.float32),
            np.concatenate([*tail, *none]).astype(np.float32),
            np.concatenate([*sampled, *none]).astype(np.float32),
        )

    def _normalized(self, block: _Block) -> tuple[NDArray[Any], ...]:
        """Ids and logprobs of what is kept of the block's rows, flat; tail, sampled logprob and width of each row."""
        values_RxW, rows, width = block.values, len(block.values), block.values.shape[1]
        log_mass = _log_sums(values_RxW)
        mass = np.exp(np.minimum(log_mass, 700)) if width else np.zeros(rows)
        if width == len(self._vocabulary):
            tail = np.zeros(rows)
            _refuse(block, block.tail > MASS_TOLERANCE, "tail", block.tail, "0: the row has every token's value")
            if self._values == "logprobs":
                self._refuse_mass(block, np.abs(mass - 1) > MASS_TOLERANCE, mass)
        elif self._values == "logprobs" and not block.states_tail:
            tail = 1 - mass
            self._refuse_mass(block, tail < -MASS_TOLERANCE, mass)
            log_mass = np.zeros(rows)
        else:
            tail = block.tail
            log_mass = np.where(np.isnan(tail), log_mass, 0)
            self._refuse_mass(block, np.abs(np.where(np.isnan(tail), 1, mass + tail) - 1) > MASS_TOLERANCE, mass)
        logprobs_RxW = values_RxW - log_mass[:, None]
        own, column = np.nonzero(block.ids == block.response[:, None])
        sampled = block.sampled.copy()
        sampled[own] = logprobs_RxW[own, column]
        _refuse(
            block, np.abs(block.sampled - sampled) > SAMPLED_TOLERANCE, "sampled", block.sampled,
            "{}, which the row gives the response's token; " + _SHIFTED, sampled,
        )  # fmt: skip
        order = np.argsort(-logprobs_RxW, axis=1, kind="stable")
        kept = order[:, : self._top_k]
        tail = tail + np.exp(np.take_along_axis(logprobs_RxW, order[:, self._top_k :], 1)).sum(axis=1)
        return (
            np.take_along_axis(block.ids, kept, 1).ravel(),
            np.take_along_axis(logprobs_RxW, kept, 1).ravel(),
            tail,
            sampled,
            np.full(rows, kept.shape[1]),
        )

    def _refuse_mass(self, block: _Block, bad: NDArray[np.bool_], mass: NDArray[np.float64]) -> None:
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            tail = "" if math.isnan(block.tail[row]) else f" beside a tail of {block.tail[row]:.6f}"
            fix = "take out tail, or correct it" if tail else "import them with --values logits"
            raise DatasetError(
                f"{block.at(row)}: the candidates' probabilities add up to {mass[row]:.6f}{tail}, "
                f"{'more' if mass[row] > 1 else 'other'} than 1: these are not logprobs; {fix}"
            )

    def _candidates(
        self,
        values_RxW: NDArray[np.float64],
        named: dict[str, list[Any] | None],
        rows: slice,
        response: NDArray[np.int32],
        where: str,
    ) -> NDArray[np.int64]:
        """int64 [R, W], the candidate that each value is of."""
        count, width, size = *values_RxW.shape, len(self._vocabulary)
        of_key = {key: lists[rows] for key, lists in named.items() if lists is not None}
        at = f"{where}, row {rows.start}"
        if not of_key and width != size:
            raise DatasetError(
                f"{at}: {width} values without token or tokenID; expected the whole vocabulary of {size}, "
                "or candidates named in token or tokenID"
            )
        for key, lists in of_key.items():
            if len(lists[0]) != width != size:
                raise DatasetError(
                    f"{at}: {width} logits for {len(lists[0])} candidates in {key}; expected one for each"
                )
        ids_RxN = None
        if "tokenID" in of_key:
            ids_RxN = _ids(of_key["tokenID"], size, f"{where}, row ", rows.start, ": tokenID")
        if "token" in of_key:
            ids_RxN = self._of_names(of_key["token"], ids_RxN, where, rows.start)
        if ids_RxN is None:
            return np.tile(np.arange(size), (count, 1))
        _check_once(ids_RxN, self._vocabulary, where, rows.start)
        if ids_RxN.shape[1] == width:
            return ids_RxN
        # Values in order of id, and beside them the likeliest tokens, or the response's own.
        self._check_leaders(values_RxW, ids_RxN, response, where, rows.start)
        return np.tile(np.arange(size), (count, 1))

    def _of_names(
        self, names: list[list[Any]], ids_RxN: NDArray[np.int64] | None, where: str, first: int
    ) -> NDArray[Any]:
        """int64 [R, N], the ids of the tokens' names; where ids are given the names must be theirs."""
        flat = list(itertools.chain.from_iterable(names))
        if ids_RxN is None:
            ids = list(map(self._id_of, flat))
            if None not in ids:
                return np.array(ids, np.int64).reshape(len(names), -1)
            row, position = divmod(ids.index(None), len(names[0]))
            raise DatasetError(
                f"{where}, row {first + row}, position {position}: the tokenizer has no token {flat[ids.index(None)]!r}"
                f"{_hint(names[row][position])}; pass the teacher's tokenizer, or name candidates by id in tokenID"
            )
        if len(flat) != ids_RxN.size:
            raise DatasetError(
                f"{where}, row {first}: {len(names[0])} names in token for {ids_RxN.shape[1]} ids in tokenID; "
                "expected one name for each id"
            )
        own = self._texts_V[ids_RxN.ravel()].tolist()
        if flat != own:
            for place, (name, index) in enumerate(zip(flat, ids_RxN.ravel().tolist(), strict=True)):
                if name is not None and not self._is_name(name, index):
                    row, position = divmod(place, ids_RxN.shape[1])
                    raise DatasetError(
                        f"{where}, row {first + row}, position {position}: token is {name!r}, but tokenID {index} is "
                        f"{own[place]!r} in this tokenizer; pass the tokenizer that the rows were made with, or take "
                        "out the one that is wrong"
                    )
        return ids_RxN

    def _id_of(self, name: Any) -> int | None:
        """The tokenizer's own spelling first (`Ġthe`), else the text that the token stands for (` the`)."""
        if not isinstance(name, str):
            return None
        index = self._ids_of_text.get(name)
        return self._vocabulary.ids.get(name.encode("utf-8", "surrogatepass")) if index is None else index

    def _is_name(self, name: Any, index: int) -> bool:
        """Whether `name` is the token's spelling, or its text as tokenizers decode it alone."""
        spelling = self._vocabulary.texts[index]
        text = self._vocabulary.tokens[index].decode("utf-8", "replace")
        return name in (spelling, text) or (spelling.startswith("▁") and name == text.removeprefix(" "))

    def _check_leaders(
        self,
        values_RxV: NDArray[np.float64],
        ids_RxN: NDArray[np.int64],
        response: NDArray[np.int32],
        where: str,
        first: int,
    ) -> None:
        count = ids_RxN.shape[1]
        if not count:
            return
        least = np.partition(values_RxV, -count, axis=1)[:, -count]
        bad = np.take_along_axis(values_RxV, ids_RxN, 1) < least[:, None] - SAMPLED_TOLERANCE
        bad &= ids_RxN != response[:, None]
        if bad.any():
            row, position = np.argwhere(bad)[0]
            raise DatasetError(
                f"{where}, row {first + row}, position {position}: candidate {ids_RxN[row, position]} is not among the "
                f"{count} likeliest of the row's values, which are in order of id over the whole vocabulary; take out "
                "token and tokenID, or give the candidates' values alone"
            )


def token_ids(values: list[Any], size: int, at: str) -> NDArray[np.int32]:
    """A list of ids below `size`.

    Raises:
        DatasetError: naming `at`, the position and the value.
    """
    return _ids([values], size, at)[0].astype(np.int32)


def _ids(rows: list[list[Any]], size: int, at: str, first: int | None = None, what: str = "") -> NDArray[np.int64]:
    """int64 [R, N]; `at`, the row's number from `first` on, and `what` name the place."""
    flat = list(itertools.chain.from_iterable(rows))
    if set(map(type, flat)) <= {int} and (not flat or (min(flat) >= 0 and max(flat) < size)):
        return np.array(flat, np.int64).reshape(len(rows), -1 if flat else 0)
    place = next(i for i, value in enumerate(flat) if type(value) is not int or not 0 <= value < size)
    row, position = divmod(place, len(rows[0]))
    fix = "write it without quotes" if isinstance(flat[place], str) else "pass the tokenizer that the ids are of"
    raise DatasetError(
        f"{at}{'' if first is None else first + row}{what}, position {position}: id {flat[place]!r} is outside the "
        f"vocabulary, expected a whole number from 0 to {size - 1}{_hint(flat[place]) or f'; {fix}'}"
    )


def _numbers(rows: list[list[Any]], at: str, first: int) -> NDArray[np.float64]:
    """float64 [R, W]."""
    flat = list(itertools.chain.from_iterable(rows))
    if set(map(type, flat)) <= {float, int}:
        try:
            values = np.array(flat, np.float64)
        except OverflowError:  # a whole number beyond float64
            values = np.array([float(v) if abs(v) < 1e308 else math.inf for v in flat])
        bad = ~np.isfinite(values)
        if not bad.any():
            return values.reshape(len(rows), -1 if flat else 0)
        place = int(np.flatnonzero(bad)[0])
        row, position = divmod(place, len(rows[0]))
        raise DatasetError(
            f"{at}{first + row}, position {position}: logit {values[place]}, expected a finite number; leave out "
            "tokens of probability 0 (write -1e9 in a row over the whole vocabulary), and collect again what is NaN"
        )
    place = next(i for i, value in enumerate(flat) if type(value) not in (float, int))
    row, position = divmod(place, len(rows[0]))
    fix = ", without quotes" if isinstance(flat[place], str) else ""
    raise DatasetError(
        f"{at}{first + row}, position {position}: {flat[place]!r:.60} is not a number; expected a logit{fix}"
        f"{_hint(flat[place])}"
    )


def _stated(values: Sequence[float | None] | None, key: str, count: int, where: str) -> NDArray[np.float64]:
    """float64 [T], NaN where a value is not stated."""
    if values is None:
        return np.full(count, np.nan)
    if len(values) != count:
        raise DatasetError(f"{where}: {key} has {len(values)} values, logits has {count} rows; expected one per row")
    return np.array(values, np.float64)  # None becomes NaN


def _named(rows: list[Any] | None, key: str, count: int, where: str) -> list[Any] | None:
    if rows is not None and (len(rows) != count or not all(isinstance(row, list) for row in rows)):
        wrong = next((f", {row!r:.60} among them" for row in rows if not isinstance(row, list)), "")
        raise DatasetError(
            f"{where}: {key} has {len(rows)} rows{wrong}, logits has {count}; expected one list per row of logits"
        )
    return rows


def _runs(widths: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """First and last row of each run of rows of the same widths, of bounded size."""
    first = 0
    for key, run in itertools.groupby(widths):
        last = first + sum(1 for _ in run)
        step = max(1, _BLOCK_VALUES // max(1, *key))
        yield from ((start, min(start + step, last)) for start in range(first, last, step))
        first = last


def _check_once(ids_RxN: NDArray[np.int64], vocabulary: Vocabulary, where: str, first: int) -> None:
    ordered = np.sort(ids_RxN, axis=1)
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    if len(twice):
        row, place = twice[0]
        index = ordered[row, place]
        one, other, *_ = np.flatnonzero(ids_RxN[row] == index)
        raise DatasetError(
            f"{where}, row {first + row}, position {other}: candidate {index} ({vocabulary.texts[index]!r}) stands at "
            f"position {one} already; drop one of the two"
        )


def _refuse(
    block: _Block, bad: NDArray[np.bool_], key: str, stated: NDArray[np.float64], expected: str, other: Any = None
) -> None:
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        found = expected if other is None else expected.format(f"{other[row]:.4f}")
        raise DatasetError(f"{block.at(row)}: {key} is {stated[row]:.4f}, expected {found}")


def _log_sums(values_RxW: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [R], log of the sum of exp; 0 for rows of no values, whose mass counts as nothing."""
    if not values_RxW.shape[1]:
        return np.zeros(len(values_RxW))
    top = values_RxW.max(axis=1)
    return top + np.log(np.exp(values_RxW - top[:, None]).sum(axis=1))


def _hint(value: object) -> str:
    return f": dots stand for values in a schematic example; expected {ENTRY_EXAMPLE}" if is_schematic(value) else ""
