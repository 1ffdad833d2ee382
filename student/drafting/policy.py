"""When to draft, for which requests and how far: the plan with the most expected tokens a second.

A step of the target emits one token for each of its R requests, and one more for each accepted drafted token. With S_k
the chance that the first k drafted tokens of a request are accepted, a plan that drafts d_r tokens for request r emits

    tokens per second = (R + Σ_r Σ_{k ≤ d_r} S_rk) / (step(R, D) + draft),    D = Σ_r d_r

`step(R, D)` is the time of a target step over R requests and D drafted tokens, `draft` that of making the draft; zero
drafted tokens are a plan like any other. Tokens are taken in order of S, so that the best of all D is found in one
sort. All times are measured while serving (`measured_time.py`), all S come from what was accepted lately
(`acceptance.py`), and the same measurements give the same plan. What the lookup found is compared with what the target
said next whether it was drafted or not, so its S cost nothing to know; LLaDA's S and times take drafts.

Once LLaDA has drafted, its confidence in each token says more than the past: S is then the product of calibrated
chances (`confidence.py`), the draft is paid for, and the same formula says which of its tokens are worth verifying.
What a draft is worth where some of its tokens are left out is planned from the confidence of the last drafts.

What is not tried is not known, so a draft that is not expected to pay is made now and then, from a budget: `EXPLORED`
of the measured time. After some plain steps and drafts at the start (`FIRST_PLAIN`, `FIRST_DRAFTS`) the policy loses
that much against never drafting, and what its estimates are wrong by: 3 % in all the tests. Ranks need not agree, since
vLLM takes the drafts of one. What a seeded request samples depends on where it was drafted for, and so on these times:
its distribution does not.

Letters: R requests (rows of the batch), K most tokens of a draft, M the two makers of drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student.drafting.acceptance import LLADA, LOOKUP, MAKERS, Acceptance, Floats, Ints
from student.drafting.confidence import Calibration
from student.drafting.measured_time import WINDOW, Fit

EXPLORED = 0.015
"""Share of the time that may be spent on what is not expected to pay."""
FIRST_PLAIN = 3
"""Steps without a draft at the start: what a draft has to beat."""
FIRST_DRAFTS = 4
"""Drafts after these, each for one request: what a draft costs and how it does."""
WORTHWHILE = 1.02
"""A plan is followed if it is expected to be so many times as fast as a plain step: it is the best of many estimates,
so an optimistic one. In simulation, 1.05 gives up to three hundredths less with one request, and no more with eight."""
CLEAR = 1.5
"""A plan this many times as fast as a plain step needs no plain step to be measured again."""
PLAIN_EVERY = 16
"""Steps after which a plain step is measured again, where drafting is not clearly faster."""
HORIZON = 32
"""Drafts over which the reading of a context that the drafter has not seen yet is spread."""
_TAIL = 4  # last tokens that tell a request from another of its length


@dataclass(frozen=True)
class Plan:
    """What to draft in this step.

    Attributes:
        maker_R: of each row's draft, an index of `MAKERS`. tokens_R: its length; 0 drafts nothing.
        reason: why nothing more is drafted: `policy`, or `measuring` for a plain step that is to be measured.
        explores: it is paid from the budget.
    """

    maker_R: Ints
    tokens_R: Ints
    reason: str = "policy"
    explores: bool = False

    @property
    def llada_rows(self) -> Ints:
        return np.flatnonzero((self.tokens_R > 0) & (self.maker_R == LLADA))


def best_lengths(survival_RxK: Floats, going: int, step: Floats, draft: float) -> tuple[Ints, float]:
    """How many tokens of each row's draft to verify.

    Args:
        survival_RxK: not increasing along K; 0 where there is no token. going: requests that a step serves.
        step: [at least the number of positive entries + 1] seconds of a step with 0, 1, 2 … drafted tokens.
        draft: seconds of making the draft.

    Returns:
        [R] lengths, and the tokens a second that they are expected to give.
    """
    rows = len(survival_RxK)
    if not survival_RxK[:, 0].any():
        return np.zeros(rows, np.int64), going / float(step[0] + draft)
    flat = survival_RxK.T.ravel()  # by depth first: of equal chances the one of lower depth comes first
    order = np.argsort(-flat, kind="stable")[: int((flat > 0).sum())]
    emitted = going + np.concatenate([[0.0], flat[order].cumsum()])
    rates = emitted / (step[: len(emitted)] + draft)
    best = int(rates.argmax())
    return np.bincount(order[:best] % rows, minlength=rows), float(rates[best])


class Policy:
    """Follows the batch from step to step and plans the next draft.

    Args:
        rows: of the largest batch. draft_tokens: K.
        enabled: False plans a whole draft for every request, and only chooses its maker.
        chances: that LLaDA's tokens start with, by confidence (`Calibration`).
    """

    def __init__(
        self,
        rows: int,
        draft_tokens: int,
        *,
        enabled: bool = True,
        chances: Sequence[float | None] | None = None,
    ) -> None:
        self.draft_tokens, self.enabled = draft_tokens, enabled
        self.calibration = Calibration(chances)
        self.acceptance = Acceptance(rows, draft_tokens)
        self.step, self.draft = Fit(3, signed=2, groups=3), Fit(2)
        """Seconds by (tokens, some drafts of which not all are whole, whole drafts for all), by (tokens read, rows)."""
        self.refused_R = np.zeros(rows, bool)
        """Requests for which drafting failed; set by the caller, kept here because rows move."""
        self._length_R = np.zeros(rows, np.int64)
        self._tail_Rx4 = np.zeros((rows, _TAIL), np.int64)
        self._read_R = np.zeros(rows, np.int64)
        """Tokens of the context that LLaDA has read."""
        self._asked_R, self._given_R, self._maker_R = np.zeros((3, rows), np.int64)
        self._found_RxK = np.full((rows, draft_tokens), -1, np.int64)
        self._confidence_RxK = np.zeros((rows, draft_tokens))
        """Of LLaDA's tokens that are being verified; 0 elsewhere."""
        self._recent_WxK = np.zeros((0, draft_tokens))
        """LLaDA's confidence in its last drafts."""
        self._survival_RxMxK = np.zeros((0, len(MAKERS), draft_tokens))
        """Of the last plan."""
        self._step_seconds_D = np.zeros(0)
        """Of the last plan: expected time of the next step with 0, 1, 2 … drafted tokens."""
        self._rows, self._going = 0, 0
        self._budget, self._explored = 0.0, 0
        self._plain, self._since_plain = 0, 0

    def after(self, other: Policy) -> Policy:
        """Take over the batch and its refused requests, and nothing that `other` has measured; returns this one."""
        self.refused_R, self._rows = other.refused_R, other._rows
        self._length_R, self._tail_Rx4 = other._length_R, other._tail_Rx4
        return self

    # --- what happened ----------------------------------------------------------------------------------

    def observe(self, seconds: float, new: Sequence[int], lengths: NDArray[Any], tokens_RxL: NDArray[Any]) -> Ints:
        """A step of the target: who is in the batch, what was accepted, how long it took.

        Args:
            seconds: between the end of the last draft and now.
            new: tokens of each row that this step added; 0 while a prompt is being read.
            lengths: tokens of each row, the new ones included.
            tokens_RxL: the batch's token ids.

        Returns:
            [R, 2]: (maker, accepted tokens) of the drafts that were verified; (−1, 0) for rows without one.
        """
        new_R = np.fromiter(new, np.int64, len(new))
        rows = len(new_R)
        lengths_R = np.asarray(lengths[:rows], np.int64)
        source_R = self._follow(lengths_R - new_R, tokens_RxL)
        self._move(source_R)
        verified = np.flatnonzero((self._given_R[:rows] > 0) & (new_R > 0))
        accepted_R = np.minimum(new_R - 1, self._given_R[:rows])
        result = np.full((rows, 2), (-1, 0))
        result[verified] = np.stack([self._maker_R[verified], accepted_R[verified]], 1)
        asked = np.flatnonzero((self._asked_R[:rows] > 0) & (new_R > 0) & (self._maker_R[:rows] == LLADA))
        if len(asked):
            # A token that was asked for and not given counts as one that was not accepted: it was paid for.
            self.acceptance.record(asked, LLADA, self._asked_R[asked], accepted_R[asked])
        sure = verified[self._confidence_RxK[verified, 0] > 0]
        if len(sure):
            self.calibration.record(self._confidence_RxK[sure], accepted_R[sure])
        self._compare_found(new_R, lengths_R, tokens_RxL)
        if rows and (source_R >= 0).all() and (new_R > 0).all():  # nothing but decoding
            drafted = int(self._given_R[:rows].sum())
            kind = self._kind(drafted, rows)
            self.step.record(seconds, rows + drafted, float(kind == 1), float(kind == 2), group=int(kind))
            self._plain += not drafted
            self._since_plain = self._since_plain + 1 if drafted else 0
            self._budget += EXPLORED * seconds
        self._length_R[:rows] = lengths_R
        self._tail_Rx4[:rows] = _tails(lengths_R, tokens_RxL)
        self._asked_R[:], self._given_R[:], self._confidence_RxK[:] = 0, 0, 0
        self._rows = rows
        return result

    def _compare_found(self, new_R: Ints, lengths_R: Ints, tokens_RxL: NDArray[Any]) -> None:
        """What the lookup had found against the tokens that came; the found ones beyond these remain unknown."""
        rows = np.flatnonzero((self._found_RxK[: len(new_R), 0] >= 0) & (new_R > 0))
        if not len(rows):
            return
        depths_K = np.arange(self.draft_tokens)
        columns = np.minimum((lengths_R - new_R)[rows, None] + depths_K, tokens_RxL.shape[1] - 1)
        known = (depths_K < new_R[rows, None]) & (self._found_RxK[rows] >= 0)
        same = known & (tokens_RxL[rows[:, None], columns] == self._found_RxK[rows])
        self.acceptance.record(rows, LOOKUP, known.sum(1), same.cumprod(1).sum(1))

    def _follow(self, before_R: Ints, tokens_RxL: NDArray[Any]) -> Ints:
        """The row that each request had in the last step, or −1. Rows move where requests come and go; one that is
        taken for another of its length and last tokens costs an estimate, nothing else."""
        rows = len(before_R)
        tails = _tails(before_R, tokens_RxL)
        stayed = (np.arange(rows) < self._rows) & (before_R == self._length_R[:rows])
        stayed &= (tails == self._tail_Rx4[:rows]).all(1)
        source_R = np.where(stayed, np.arange(rows), -1)
        free = set(range(self._rows)) - set(np.flatnonzero(stayed).tolist())
        for row in np.flatnonzero(~stayed).tolist():
            for candidate in sorted(free):
                if self._length_R[candidate] == before_R[row] and (self._tail_Rx4[candidate] == tails[row]).all():
                    source_R[row] = candidate
                    free.remove(candidate)
                    break
        return source_R

    def _move(self, source_R: Ints) -> None:
        rows, known = len(source_R), source_R >= 0
        if rows == self._rows and (source_R == np.arange(rows)).all():
            return
        self.acceptance.move(source_R)
        for state in (self._read_R, self._asked_R, self._given_R, self._maker_R, self.refused_R):
            state[:rows] = np.where(known, state[source_R], 0)
            state[rows:] = 0
        self._found_RxK[:rows] = np.where(known[:, None], self._found_RxK[source_R], -1)
        self._confidence_RxK[:rows] = np.where(known[:, None], self._confidence_RxK[source_R], 0)

    def drafted(self, plan: Plan, given_R: Ints, rows: Ints, seconds: float, confidence_RxK: Floats) -> None:
        """What came of a plan.

        Args:
            given_R: tokens of each row's draft. rows: for which LLaDA ran. seconds: that it took.
            confidence_RxK: in all tokens of LLaDA's drafts; 0 where there is none.
        """
        given = np.arange(self.draft_tokens) < given_R[:, None]
        self._confidence_RxK[: len(given_R)] = np.where(given, confidence_RxK, 0)
        drafted = confidence_RxK[confidence_RxK[:, 0] > 0]
        self._recent_WxK = np.concatenate([self._recent_WxK, drafted])[-WINDOW:]
        if len(rows):
            self.draft.record(seconds, float(self._unread(rows).sum()), float(len(rows)))
            self._read_R[rows] = self._length_R[rows]
        if plan.explores:
            self._budget -= seconds + self._added_seconds(int(given_R.sum()))
        self._given_R[: len(given_R)] = given_R
        self._asked_R[: len(given_R)] = plan.tokens_R
        self._asked_R[rows] = self.draft_tokens  # what is not worth verifying was paid for, too
        self._maker_R[: len(given_R)] = plan.maker_R

    # --- what to do ---------------------------------------------------------------------------------------

    def plan(self, going: int, open_R: NDArray[np.bool_], found_RxK: Ints) -> Plan:
        """What to draft for the batch that was last observed.

        Args:
            going: rows that go on. open_R: those of them that LLaDA may draft for.
            found_RxK: tokens that the lookup has for each row, then −1.
        """
        rows = self._rows
        self._going = going
        self._found_RxK[:rows] = found_RxK
        found_R = (found_RxK >= 0).sum(1)
        survival_RxMxK = self.acceptance.survival(rows)
        survival_RxMxK[:, LOOKUP][found_RxK < 0] = 0
        survival_RxMxK[:, LLADA][~open_R] = 0
        self._survival_RxMxK = survival_RxMxK
        expected_RxM = survival_RxMxK.sum(2)
        longer_R = expected_RxM.argmax(1)  # LLaDA where both are equal
        if not self.enabled:
            lengths = np.where(longer_R == LOOKUP, found_R, np.where(open_R, self.draft_tokens, 0))
            return Plan(longer_R, lengths)
        measuring = Plan(longer_R, np.zeros(rows, np.int64), "measuring")
        if self._plain < FIRST_PLAIN or not going:
            return measuring
        if self.acceptance.tries(LLADA) < FIRST_DRAFTS and open_R.any():
            return self._with_whole_draft(measuring, open_R)
        self._step_seconds_D = self._step_seconds(np.arange(rows * self.draft_tokens + 1))
        plan, rate = self._best(survival_RxMxK, expected_RxM)
        plain = going / self._step_seconds_D[0]
        if rate < WORTHWHILE * plain:
            plan = Plan(longer_R, np.zeros(rows, np.int64))
        elif plan.tokens_R.any() and rate < CLEAR * plain and self._since_plain >= PLAIN_EVERY:
            lost = (rate / plain - 1) * going / plain
            if self._budget >= lost:
                self._budget -= lost
                return measuring
        return self._exploring(plan, open_R) or plan

    def worth_verifying(self, plan: Plan, confidence_RxK: Floats) -> Ints:
        """How many tokens of each row's draft to hand on, now that LLaDA's confidence in its own is known.

        Args:
            confidence_RxK: of LLaDA's draft in each token; 0 where there is none.
        """
        if not self.enabled or plan.explores or plan.reason == "measuring" or not confidence_RxK.any():
            return plan.tokens_R
        survival_RxK = np.where((plan.maker_R == LOOKUP)[:, None], self._survival_RxMxK[:, LOOKUP], 0)
        survival_RxK[np.arange(self.draft_tokens) >= plan.tokens_R[:, None]] = 0
        drafted_R = confidence_RxK[:, 0] > 0
        chances_RxK = np.where(confidence_RxK > 0, self.calibration(confidence_RxK), 0)
        survival_RxK[drafted_R] = chances_RxK[drafted_R].cumprod(1)
        return best_lengths(survival_RxK, self._going, self._step_seconds_D, 0.0)[0]

    def _best(self, survival_RxMxK: Floats, expected_RxM: Floats) -> tuple[Plan, float]:
        """The fastest of: the lookup alone, and with it LLaDA for the rows where it is expected to gain most."""
        rows = len(survival_RxMxK)
        lookup_RxK = survival_RxMxK[:, LOOKUP]
        lengths, rate = best_lengths(lookup_RxK, self._going, self._step_seconds_D, 0.0)
        plan = Plan(np.full(rows, LOOKUP), lengths)
        gain_R = expected_RxM[:, LLADA] - expected_RxM[:, LOOKUP]
        by_gain = np.argsort(-gain_R, kind="stable")[: int((gain_R > 0).sum())]
        chosen_lately = self._chosen_lately() if len(by_gain) and len(self._recent_WxK) else None
        while len(by_gain):
            draft = self._draft_seconds(by_gain)
            survival_RxK = lookup_RxK.copy()
            survival_RxK[by_gain] = survival_RxMxK[by_gain, LLADA]
            lengths, found = best_lengths(survival_RxK, self._going, self._step_seconds_D, draft)
            if chosen_lately is not None:
                expected = float(expected_RxM[by_gain, LLADA].sum())
                chosen, chosen_rate = self._choosing(by_gain, lookup_RxK, expected, chosen_lately, draft)
                if chosen_rate > found:
                    lengths, found = chosen, chosen_rate
            if found > rate and lengths[by_gain].any():
                maker_R = np.full(rows, LOOKUP)
                maker_R[by_gain] = LLADA
                plan, rate = Plan(maker_R, lengths), found
            by_gain = by_gain[: len(by_gain) // 4]
        return plan, rate

    def _choosing(
        self, drafting: Ints, lookup_RxK: Floats, expected: float, chosen_lately: tuple[float, float], draft: float
    ) -> tuple[Ints, float]:
        """As `best_lengths`, where LLaDA drafts whole for some rows and only what is worth it is verified.

        Args:
            expected: accepted tokens of all these rows' whole drafts. chosen_lately: `_chosen_lately`.
        """
        others_RxK = lookup_RxK.copy()
        others_RxK[drafting] = 0
        lengths, _ = best_lengths(others_RxK, self._going, self._step_seconds_D, draft)
        share, verified_each = chosen_lately
        emitted = share * expected + others_RxK[np.arange(self.draft_tokens) < lengths[:, None]].sum()
        verified = verified_each * len(drafting) + lengths.sum()  # which are zero for those that draft
        lengths[drafting] = self.draft_tokens
        return lengths, float((self._going + emitted) / (self._step_seconds(verified) + draft))

    def _chosen_lately(self) -> tuple[float, float]:
        """Had only what is worth it been verified of LLaDA's last drafts: the accepted tokens, as a share of what a
        usual draft has, and the verified tokens of one."""
        step = self._step_seconds_D
        survival_WxK = self.calibration(self._recent_WxK).cumprod(1)
        price = self._going / step[0] * (step[2] - step[1]) if len(step) > 2 else 0.0  # in tokens, of verifying one
        worth_WxK = (self._recent_WxK > 0) & (survival_WxK > price)
        usual = max(float(self.acceptance.overall(LLADA).sum()), 1e-9)
        return float((survival_WxK * worth_WxK).sum(1).mean()) / usual, float(worth_WxK.sum(1).mean())

    def _exploring(self, plan: Plan, open_R: NDArray[np.bool_]) -> Plan | None:
        """The plan with a whole draft of LLaDA, if the budget has it and no draft of LLaDA in it is whole. Every fourth
        is for all requests, which costs more and tells what only such a step can."""
        if not open_R.any() or (plan.tokens_R[plan.llada_rows] == self.draft_tokens).any():
            return None
        if self._explored % 4 == 3:
            tried = Plan(np.full(len(open_R), LLADA), np.where(open_R, self.draft_tokens, 0), plan.reason, True)
        else:
            tried = self._with_whole_draft(plan, open_R, explores=True)
        whole = self._added_seconds(int(tried.tokens_R.sum())) + self._draft_seconds(tried.llada_rows, HORIZON)
        # Not what is saved up while nothing could be tried: one try, and then the next from new savings.
        self._budget = min(self._budget, 2 * whole)
        if self._budget < whole:
            return None
        self._explored += 1
        return tried

    def _with_whole_draft(self, plan: Plan, open_R: NDArray[np.bool_], *, explores: bool = False) -> Plan:
        """The plan with a whole draft of LLaDA for the row whose context it has read farthest."""
        rows = np.flatnonzero(open_R)
        row = rows[self._unread(rows).argmin()]
        tokens_R, maker_R = plan.tokens_R.copy(), plan.maker_R.copy()
        tokens_R[row], maker_R[row] = self.draft_tokens, LLADA
        return Plan(maker_R, tokens_R, plan.reason, explores)

    def _kind(self, drafted: Any, rows: int) -> Any:
        """Of a step with so many drafted tokens: 0 none, 1 some, 2 whole drafts for all (a CUDA graph may exist)."""
        return np.where(drafted == 0, 0, np.where(drafted < rows * self.draft_tokens, 1, 2))

    def _step_seconds(self, drafted: Any) -> Any:
        """Expected time of the next step with so many drafted tokens."""
        kind = self._kind(drafted, self._going)
        some, whole = self.step.counts[1:]
        if not some or not whole:  # what was not measured is like the other
            kind = np.where(kind == 0, 0, 1 if some else 2)
        return self.step(self._going + drafted, (kind == 1).astype(float), (kind == 2).astype(float))

    def _added_seconds(self, tokens: int) -> float:
        """That so many drafted tokens add to the next step."""
        return float(self._step_seconds_D[tokens] - self._step_seconds_D[0])

    def _unread(self, rows: Ints) -> Ints:
        unread: Ints = self._length_R[rows] - self._read_R[rows]
        return unread

    def _draft_seconds(self, rows: Ints, horizon: int = 1) -> float:
        """Expected time of a draft for these rows. Long unread contexts count for a part: the next drafts need them
        too. Before any draft was measured it is taken for the time of a plain step.

        Args:
            horizon: `HORIZON` counts the contexts whole.
        """
        if not len(self.draft):
            return float(self._step_seconds_D[0])
        unread = self._unread(rows)
        usual = np.minimum(unread, self.draft_tokens + 1)
        tokens = usual + (unread - usual) * horizon / HORIZON
        return float(self.draft(float(tokens.sum()), float(len(rows))))


def _tails(lengths_R: Ints, tokens_RxL: NDArray[Any]) -> Ints:
    """[R, 4]: the last tokens of each row."""
    columns = np.maximum(lengths_R[:, None] - 1 - np.arange(_TAIL), 0)
    tails: Ints = tokens_RxL[np.arange(len(lengths_R))[:, None], columns].astype(np.int64)
    return tails
