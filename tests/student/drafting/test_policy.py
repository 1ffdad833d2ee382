"""The policy on a simulated engine whose times and acceptance are known: it never loses much, and wins where it can."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from student.drafting.acceptance import LLADA, LOOKUP, Acceptance
from student.drafting.measured_time import Fit
from student.drafting.policy import CLEAR, Plan, Policy, best_lengths

K = 4
LENGTH = 400


@dataclass
class Engine:
    """A target whose step takes `fixed + token · tokens` seconds, `graph` more with a draft, `piecewise` more where
    there are not whole drafts for all; and drafters.

    Attributes:
        right: chance that a token of LLaDA is right. spread: each is likelier or less likely by this than `right`, and
            LLaDA's confidence says which, or not, as `tells` has it. draft: seconds of (a call, a row, a token that is
            read).
        found: chance that the lookup finds something. found_right: that a token of it is right.
        answer: tokens of each response. noise: relative deviation of every time. drift: the deviation of a factor of
            all times that wanders over some twenty steps; it is in what the policy sees, and left out of the speed.
    """

    rows: int = 8
    right: float = 0.5
    spread: float = 0.0
    tells: bool = True
    fixed: float = 0.05
    token: float = 0.001
    graph: float = 0.0
    piecewise: float = 0.0
    draft: tuple[float, float, float] = (0.01, 0.001, 0.0002)
    found: float = 0.0
    found_right: float = 0.0
    answer: int = 60
    noise: float = 0.0
    drift: float = 0.0
    prompt: int = 40
    seed: int = 0
    plans: list[Plan] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    """Of each step: every request that goes on is drafted for by LLaDA."""

    def run(self, policy: Policy | None, steps: int) -> float:
        """Tokens a second over this many steps; without a policy nothing is drafted."""
        rng = np.random.default_rng(self.seed)
        emitted = seconds = wandering = 0.0
        drifting = np.random.default_rng([self.seed, 1])
        tokens = rng.integers(0, 50, (self.rows, LENGTH))
        lengths = np.full(self.rows, self.prompt)
        read, new = np.zeros(self.rows, int), [1] * self.rows
        given = np.zeros(self.rows, int)
        maker = np.zeros(self.rows, int)
        chances = np.zeros((self.rows, K))
        found = np.full((self.rows, K), -1)
        for _ in range(steps):
            drafted = int(given.sum())
            step = self.fixed + self.token * (self.rows + drafted) + self.graph * (drafted > 0)
            step += self.piecewise * (drafted < self.rows * K)
            step *= 1 + self.noise * rng.standard_normal() if self.noise else 1
            wandering = 0.95 * wandering + (1 - 0.95**2) ** 0.5 * drifting.standard_normal()
            level = float(np.exp(self.drift * wandering))
            for row in range(self.rows):
                chance = chances[row] if maker[row] == LLADA else np.full(K, self.found_right)
                accepted = next((k for k in range(given[row]) if rng.random() >= chance[k]), int(given[row]))
                new[row] = accepted + 1
                start = lengths[row]
                if maker[row] == LOOKUP or found[row, 0] >= 0:  # what comes next agrees with what was found, or not
                    agreed = accepted if maker[row] == LOOKUP and given[row] else 0
                    for k in range(agreed):
                        tokens[row, start + k] = found[row, k]
                    if agreed < K and found[row, agreed] >= 0:
                        right = not (maker[row] == LOOKUP and given[row]) and rng.random() < self.found_right
                        tokens[row, start + agreed] = found[row, agreed] if right else 60
                lengths[row] += new[row]
            seconds += step
            emitted += sum(new)
            ended = lengths >= self.prompt + self.answer
            if policy is not None:
                policy.observe(level * step, new, lengths, tokens)
                find = (rng.random(self.rows) < self.found) & ~ended
                found = np.where(find[:, None], rng.integers(0, 50, (self.rows, K)), -1)
                plan = policy.plan(int((~ended).sum()), ~ended, found)
                self.plans.append(plan)
                self.whole.append(bool(((plan.tokens_R > 0) & (plan.maker_R == LLADA) | ended).all()))
                maker = plan.maker_R
                drafted_for = (maker == LLADA) & (plan.tokens_R > 0)
                chances = np.clip(self.right + self.spread * rng.choice([-1, 1], (self.rows, K)), 0, 1)
                confidence = np.maximum(np.where(self.tells, chances, self.right), 1e-9) * drafted_for[:, None]
                given = policy.worth_verifying(plan, confidence)
                rows = plan.llada_rows
                cost = 0.0
                if len(rows):
                    a_call, a_row, a_token = self.draft
                    cost = a_call + a_row * len(rows) + a_token * (lengths[rows] - read[rows]).sum()
                    read[rows] = lengths[rows]
                seconds += cost
                policy.drafted(plan, given, rows, level * cost, confidence)
            for row in np.flatnonzero(ended):  # another request in its place
                tokens[row] = rng.integers(0, 50, LENGTH)
                lengths[row], read[row], given[row], found[row] = self.prompt, 0, 0, -1
        return emitted / seconds


def ratio(steps: int = 600, **engine: Any) -> tuple[float, Engine]:
    """Speed with the policy, once it has started, over the speed without a draft."""
    policy, with_policy = Policy(64, K), Engine(**engine)
    Engine(**engine | {"seed": 1}).run(policy, 20)
    speed = with_policy.run(policy, steps)
    return speed / Engine(**engine).run(None, steps), with_policy


def share_drafted(engine: Engine, after: int = 100) -> float:
    return float(np.mean([len(plan.llada_rows) > 0 for plan in engine.plans[after:]]))


CHEAP, DEAR = (0.01, 0.001, 0.0002), (0.05, 0.005, 0.001)


@pytest.mark.parametrize(
    ("rows", "noise", "draft"),
    [(1, 0.1, CHEAP), (1, 0.0, DEAR), (8, 0.0, CHEAP), (8, 0.1, DEAR), (32, 0.1, CHEAP), (32, 0.0, DEAR)],
)
def test_a_student_that_is_always_wrong_costs_three_percent_at_most(
    rows: int, noise: float, draft: tuple[float, float, float]
) -> None:
    speed, engine = ratio(rows=rows, right=0.0, noise=noise, draft=draft)
    assert speed > 0.97
    assert any(plan.explores for plan in engine.plans)


@pytest.mark.parametrize(("rows", "right"), [(1, 0.0), (8, 0.0), (8, 0.4), (8, 0.5), (32, 0.5)])
def test_a_machine_whose_speed_drifts_does_not_make_drafts_look_cheap(rows: int, right: float) -> None:
    """Drafts that about pay, or do not, while a step takes from half to twice its usual time for seconds on end."""
    shape: dict[str, Any] = {"rows": rows, "right": right, "token": 0.004, "noise": 0.1, "drift": 0.3}
    speeds = [ratio(seed=seed, found=0.2, found_right=0.4, **shape)[0] for seed in range(4)]
    assert np.mean(speeds) > 0.97


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_a_student_that_is_always_right_drafts_every_time(rows: int) -> None:
    speed, engine = ratio(rows=rows, right=1.0, noise=0.05, token=0.0005, draft=(0.01, 0.0005, 0.0001))
    assert speed > CLEAR
    assert all(engine.whole)


@pytest.mark.parametrize(
    ("right", "rows", "token"), [(0.2, 1, 0.0005), (0.2, 8, 0.004), (0.6, 1, 0.004), (0.6, 8, 0.0005)]
)
def test_it_is_as_good_as_the_better_of_always_and_never(right: float, rows: int, token: float) -> None:
    shape = {"right": right, "rows": rows, "token": token, "noise": 0.03}
    always = Engine(**shape)  # type: ignore[arg-type]
    speed = always.run(Policy(64, K, enabled=False), 600) / Engine(**shape).run(None, 600)  # type: ignore[arg-type]
    found, _ = ratio(**shape)
    assert found > max(0.94 * speed, 0.97)


def test_only_tokens_that_are_likely_right_are_verified_where_verifying_costs() -> None:
    """Eight requests, every token of which takes a twentieth of the step: the student's confidence says which pay."""
    shape: dict[str, Any] = {"right": 0.5, "spread": 0.4, "fixed": 0.04, "token": 0.003, "draft": (0.005, 0.0005, 0.0)}
    knowing, _ = ratio(1200, **shape)
    guessing, _ = ratio(1200, **shape, tells=False)
    assert knowing > 1.05 * guessing
    assert knowing > 1.05
    # Where verifying is free all is verified, whatever the confidence.
    policy, free = Policy(64, K), Engine(spread=0.4, rows=1, token=0.0)
    free.run(policy, 400)
    assert (policy.worth_verifying(free.plans[-1], np.full((1, K), 0.1)) == K).all()


def test_a_lost_graph_is_part_of_a_drafts_cost() -> None:
    """Where any drafted token costs a CUDA graph, a fair student does not pay, and is not used."""
    speed, engine = ratio(1200, right=0.5, graph=0.06)
    assert speed > 0.97
    assert share_drafted(engine) < 0.2


def test_whole_drafts_are_made_where_only_they_have_a_graph() -> None:
    """A fair student pays where all drafts are whole, and no shorter ones do."""
    speed, engine = ratio(rows=4, right=0.6, piecewise=0.03)
    assert speed > 1.3
    assert np.mean(engine.whole) > 0.9
    late = [plan.tokens_R for plan in engine.plans[100:]]
    assert np.mean([set(tokens.tolist()) <= {0, K} for tokens in late]) > 0.9


def test_it_finds_its_way_back() -> None:
    policy, engine = Policy(64, K), Engine(right=0.0)
    engine.run(policy, 500)
    assert share_drafted(engine) < 0.2
    better = Engine(right=0.9)
    better.run(policy, 1000)
    assert np.mean([len(plan.llada_rows) > 0 for plan in better.plans[-200:]]) > 0.9


def test_many_requests_leave_no_room_for_drafts_and_few_do() -> None:
    """Verification is nearly free for one request and expensive for many: the same student pays or does not."""
    policy = Policy(64, K)
    many = Engine(rows=32, right=0.4, token=0.005, fixed=0.02)
    many.run(policy, 600)
    assert share_drafted(many, 300) < 0.3
    one = Engine(rows=1, right=0.4, token=0.001, fixed=0.06)
    one.run(policy, 600)
    assert share_drafted(one, 300) > 0.7


def test_the_lookup_drafts_where_it_is_right_and_llada_elsewhere() -> None:
    speed, engine = ratio(rows=1, right=0.6, found=0.5, found_right=0.95)
    alone, _ = ratio(rows=1, right=0.6)
    assert speed > alone
    late = engine.plans[300:]
    assert {int(plan.maker_R[0]) for plan in late if plan.tokens_R[0]} == {LLADA, LOOKUP}
    _, engine = ratio(rows=1, right=0.6, found=0.5, found_right=0.05)
    used = [plan for plan in engine.plans[300:] if plan.maker_R[0] == LOOKUP and plan.tokens_R[0]]
    assert len(used) < 0.02 * len(engine.plans)


def test_the_same_measurements_give_the_same_plans() -> None:
    runs = [ratio(steps=300, right=0.4, found=0.3, found_right=0.5, noise=0.1)[1].plans for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert (first.tokens_R == second.tokens_R).all()
        assert (first.maker_R == second.maker_R).all()


def test_switched_off_it_drafts_whole_drafts_for_all() -> None:
    engine = Engine(right=0.0)
    engine.run(Policy(64, K, enabled=False), 200)
    assert all(engine.whole)
    assert {length for plan in engine.plans for length in plan.tokens_R} == {0, K}


def test_best_lengths_are_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        survival = rng.random((3, 3)).cumprod(1)
        step = 1 + np.cumsum(np.concatenate([[0], rng.random(9) * 0.4]))
        draft = float(rng.random() * 0.5)

        def rate(lengths: tuple[int, ...], survival: Any = survival, step: Any = step, draft: float = draft) -> float:
            gained = sum(survival[row, :length].sum() for row, length in enumerate(lengths))
            return float((3 + gained) / (step[sum(lengths)] + draft))

        lengths, found = best_lengths(survival, 3, step, draft)
        assert found == pytest.approx(rate(tuple(lengths)))
        assert found == pytest.approx(max(rate(choice) for choice in itertools.product(range(4), repeat=3)))


def test_acceptance_is_the_share_of_tries() -> None:
    acceptance = Acceptance(4, K)
    for _ in range(200):
        acceptance.record(np.array([0]), LLADA, np.array([K]), np.array([1]))
    certain, unknown = acceptance.survival(2)[:, LLADA]
    assert certain == pytest.approx([1, 0, 0, 0], abs=0.05)
    assert unknown == pytest.approx([1, 0, 0, 0], abs=0.05)  # a new request is taken to be like the others
    acceptance.move(np.array([-1, 0]))
    for _ in range(30):
        acceptance.record(np.array([1]), LLADA, np.array([K]), np.array([0]))
    assert acceptance.survival(2)[1, LLADA, 0] < 0.3 < acceptance.survival(2)[0, LLADA, 0]


def test_times_are_fitted_and_outliers_move_little() -> None:
    fit = Fit(2, signed=1, groups=2)
    for tokens in (1, 4, 8, 32) * 10:
        fit.record(0.05 + 0.002 * tokens, tokens, float(tokens > 1), group=int(tokens > 1))
    assert fit(16, 1.0) == pytest.approx(0.082, rel=0.02)
    fit.record(3.0, 1, 0.0)
    assert fit(1, 0.0) == pytest.approx(0.052, rel=0.2)
    flat = Fit(2)
    flat.record(0.05, 8, 0.0)
    assert flat(32, 1.0) == pytest.approx(0.05)


def test_a_fit_is_made_anew_after_an_eighth_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever groups were never measured, such as whole drafts for all of many requests."""
    made = []
    solve = Fit._solve
    monkeypatch.setattr(Fit, "_solve", lambda fit: made.append(fit) or solve(fit))
    fit = Fit(1, groups=3)
    for tokens in range(80):
        fit.record(0.05, tokens)
        fit(1)
        if tokens == 63:
            made.clear()
    assert len(made) == 2


def test_requests_are_followed_when_rows_move() -> None:
    policy = Policy(4, K)
    tokens = np.arange(4 * 50).reshape(4, 50)
    policy.observe(0.1, [1, 1, 1], np.array([10, 12, 14]), tokens)
    policy.refused_R[:3] = [False, True, False]
    # The first request has ended; the last row fills its place, then a new one comes.
    tokens[0], new = tokens[2], [1, 1, 0]
    policy.observe(0.1, new, np.array([15, 13, 20]), tokens)
    assert policy.refused_R.tolist() == [False, True, False, False]
    policy.observe(0.1, [1, 1], np.array([14, 16]), tokens[[1, 0]])
    assert policy.refused_R.tolist() == [True, False, False, False]
