"""The scheduler's promises, over random states and over whole simulated runs, in milliseconds and without a model."""

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixellm.errors import ConfigError
from pixellm.model.engine.scheduler import (
    RunningRequest,
    SchedulerLimits,
    SchedulerState,
    WaitingRequest,
    next_deadline,
    plan_step,
)

LIMITS = st.builds(
    SchedulerLimits,
    max_batch_size=st.integers(1, 6),
    max_step_tokens=st.integers(1, 60),
    min_prefill_tokens=st.integers(1, 20),
    max_admissions=st.integers(1, 4),
    patience_s=st.sampled_from([0.0, 5.0, 1e9]),
)
DEADLINE = st.one_of(st.none(), st.floats(0, 100))
CLIENT = st.sampled_from("abc")


@st.composite
def states(draw: st.DrawFn) -> tuple[SchedulerState, SchedulerLimits]:
    limits = draw(LIMITS)
    count = draw(st.integers(0, limits.max_batch_size))
    running = [
        RunningRequest(i, draw(st.integers(0, 90)), draw(st.sampled_from([1, 6])), draw(CLIENT), draw(DEADLINE))
        for i in range(count)
    ]
    arrivals = sorted(draw(st.lists(st.floats(0, 50), max_size=8)))
    waiting = [WaitingRequest(100 + i, at, draw(CLIENT), draw(DEADLINE)) for i, at in enumerate(arrivals)]
    known = [r.request_id for r in (*running, *waiting)]
    cancelled = draw(st.sets(st.sampled_from([*known, 999]), max_size=3))
    return SchedulerState(tuple(waiting), tuple(running), frozenset(cancelled)), limits


@settings(max_examples=150, deadline=None)
@given(case=states(), now=st.floats(0, 100))
def test_a_plan_keeps_every_limit_and_never_runs_what_is_gone(
    case: tuple[SchedulerState, SchedulerLimits], now: float
) -> None:
    state, limits = case
    plan = plan_step(state, limits, now)
    running = {r.request_id: r for r in state.running}
    waiting = {r.request_id: r for r in state.waiting}
    known = running | waiting
    assert set(plan.drop) == state.cancelled & known.keys()
    late = {i for i, r in known.items() if r.deadline is not None and now >= r.deadline}
    assert set(plan.expire) == late - state.cancelled
    gone = {*plan.drop, *plan.expire}
    assert set(plan.decode) == {i for i, r in running.items() if r.prompt_left == 0} - gone
    assert set(plan.admit) <= waiting.keys() - gone
    assert len(running.keys() - gone) + len(plan.admit) <= limits.max_batch_size
    assert len(plan.admit) <= limits.max_admissions
    spent = sum(running[i].next_tokens for i in plan.decode)
    chunks = dict(plan.prefill)
    assert sum(chunks.values()) <= max(limits.max_step_tokens - spent, limits.min_prefill_tokens)
    assert all(0 < n <= running[i].prompt_left and i not in gone for i, n in chunks.items())


@settings(max_examples=150, deadline=None)
@given(case=states(), now=st.floats(0, 100))
def test_nothing_is_idle_while_something_could_run(case: tuple[SchedulerState, SchedulerLimits], now: float) -> None:
    state, limits = case
    plan = plan_step(state, limits, now)
    gone = {*plan.drop, *plan.expire}
    unfinished = [r.request_id for r in state.running if r.prompt_left and r.request_id not in gone]
    if unfinished:
        assert plan.prefill[0][0] == unfinished[0]
    free = limits.max_batch_size - len([r for r in state.running if r.request_id not in gone])
    candidates = [r for r in state.waiting if r.request_id not in gone]
    assert len(plan.admit) == min(free, limits.max_admissions, len(candidates))
    assert plan.is_idle == (not state.running and not state.waiting)


@settings(max_examples=50, deadline=None)
@given(case=states(), now=st.floats(0, 100))
def test_a_plan_is_a_pure_function(case: tuple[SchedulerState, SchedulerLimits], now: float) -> None:
    state, limits = case
    assert plan_step(state, limits, now) == plan_step(replace(state), replace(limits), now)


def test_a_client_with_a_long_queue_does_not_stand_in_front_of_another() -> None:
    waiting = (*(WaitingRequest(i, float(i), "greedy") for i in range(20)), WaitingRequest(99, 20.0, "modest"))
    running = (RunningRequest(200, client="greedy"),)
    plan = plan_step(SchedulerState(waiting, running), SchedulerLimits(max_batch_size=2, patience_s=60), now=21.0)
    assert plan.admit == (99,)


def test_patience_ends_fairness_so_that_nobody_waits_for_ever() -> None:
    waiting = (WaitingRequest(0, 0.0, "greedy"), WaitingRequest(1, 5.0, "modest"))
    running = (RunningRequest(200, client="greedy"),)
    limits = SchedulerLimits(max_batch_size=2, patience_s=10)
    assert plan_step(SchedulerState(waiting, running), limits, now=9.0).admit == (1,)
    assert plan_step(SchedulerState(waiting, running), limits, now=12.0).admit == (0,)


def test_a_cancelled_requests_slot_is_taken_in_the_same_step() -> None:
    state = SchedulerState((WaitingRequest(1, 0.0),), (RunningRequest(0),), frozenset({0}))
    plan = plan_step(state, SchedulerLimits(max_batch_size=1), now=1.0)
    assert (plan.drop, plan.admit, plan.decode) == ((0,), (1,), ())


def test_answers_advance_in_every_step_however_long_the_prompts_are() -> None:
    running = (RunningRequest(0, prompt_left=10_000), RunningRequest(1), RunningRequest(2, next_tokens=6))
    limits = SchedulerLimits(max_step_tokens=100, min_prefill_tokens=10)
    assert plan_step(SchedulerState((), running), limits, 0.0).decode == (1, 2)
    assert plan_step(SchedulerState((), running), limits, 0.0).prefill == ((0, 93),)


def test_the_next_deadline_is_the_earliest_of_all() -> None:
    state = SchedulerState(
        (WaitingRequest(0, 0.0, deadline=7.0),), (RunningRequest(1, deadline=3.0), RunningRequest(2))
    )
    assert next_deadline(state) == 3.0
    assert next_deadline(SchedulerState()) is None


@pytest.mark.parametrize("name", ["max_batch_size", "max_step_tokens", "min_prefill_tokens", "max_admissions"])
def test_limits_under_which_nothing_could_run_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        SchedulerLimits(**{name: 0})
    with pytest.raises(ConfigError, match="max_waiting"):
        SchedulerLimits(max_waiting=-1)


@dataclass
class Simulated:
    prompt_left: int
    answer_left: int
    client: str
    arrived_at: float
    admitted_at: float | None = None


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), limits=LIMITS)
def test_every_request_of_a_random_run_ends_and_none_starves(seed: int, limits: SchedulerLimits) -> None:
    rng = random.Random(seed)
    work = {
        i: Simulated(rng.randint(1, 80), rng.randint(1, 20), rng.choice("abc"), arrived_at=float(rng.randint(0, 30)))
        for i in range(25)
    }
    total = sum(-(-w.prompt_left // limits.min_prefill_tokens) + w.answer_left + 2 for w in work.values())
    waiting: list[int] = []
    running: list[int] = []
    now, done = 0.0, 0
    while done < len(work):
        waiting += [i for i, w in work.items() if w.arrived_at == now]
        state = SchedulerState(
            tuple(WaitingRequest(i, work[i].arrived_at, work[i].client) for i in waiting),
            tuple(RunningRequest(i, work[i].prompt_left, 1, work[i].client) for i in running),
        )
        plan = plan_step(state, limits, now)
        for i, count in plan.prefill:
            work[i].prompt_left -= count
        for i in plan.decode:
            work[i].answer_left -= 1
        finished = [i for i in running if work[i].answer_left == 0]
        done += len(finished)
        running = [i for i in running if i not in finished] + list(plan.admit)
        waiting = [i for i in waiting if i not in plan.admit]
        now += 1.0
        assert now < total + 40, "a request starves"
