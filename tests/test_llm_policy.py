"""Policies keep their guarantees, tested with a fake engine and a fake clock, without a model."""

from __future__ import annotations

import itertools
import random
import statistics
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosd.llm.policy import NAMES, Fair, Fifo, Mlfq, Priority, Quantum, RoundRobin, fair, make, mlfq
from aiosd.llm.policy.contract import ANY_TURN, LONGER
from aiosd.llm.policy.priority import AGEING_S
from tests.fakeengine import ENDLESS, PROMPT_S, ROW_S, STEP_S, SWITCH_S, Call, FakeEngine, Turn, crowd

Q = Quantum(tokens=16, seconds=5.0)

# ── guarantees of all policies, which the fake engine checks in every step ────────────────────────────────

turns = st.lists(
    st.builds(
        Turn,
        think=st.sampled_from([0.0, 0.01, 0.3, 2.0]),
        prompt=st.sampled_from([0, 1, 40, 2000]),
        generate=st.integers(1, 80),
    ),
    min_size=1,
    max_size=5,
)
agents = st.lists(st.tuples(turns, st.integers(-20, 19), st.sampled_from(["", "a", "b"])), min_size=1, max_size=12)


@pytest.mark.parametrize("name", NAMES)
@given(agents=agents, slots=st.integers(1, 8), seed=st.integers(0, 1 << 16))
@settings(max_examples=60, deadline=None)
def test_any_crowd_is_served_and_every_answer_is_sound(
    name: str, agents: list[tuple[list[Turn], int, str]], slots: int, seed: int
) -> None:
    """Agents of all kinds, some with several calls, are parked, cancelled and reniced at random moments. All calls end,
    and after every step the guarantees of `contract.py` hold (see `FakeEngine`)."""
    engine = FakeEngine(make(name, Q, {"a": 1.0, "b": 3.5}), slots)
    for peer, (script, nice, group) in enumerate(agents, 1):
        engine.agent(peer, script, nice, group)
    chance = random.Random(seed)
    for _ in range(chance.randrange(200)):
        engine.step()
        disturb(engine, chance)
    for call in engine.open_calls:
        engine.park(call, False)
    engine.finish_all()
    switches, tokens = len(engine.evictions), sum(agent.service for agent in engine.agents.values())
    assert switches <= engine.num_arrived + tokens / Q.tokens + engine.now / Q.seconds * slots, "switches not paid for"


def disturb(engine: FakeEngine, chance: random.Random) -> None:
    if not engine.open_calls:
        return
    call, agent = chance.choice(engine.open_calls), chance.choice(list(engine.agents.values()))
    match chance.randrange(40):
        case 0:
            engine.park(call, not call.parked)
        case 1:
            engine.cancel(call)
        case 2:
            engine.renice(agent, chance.randint(-20, 19))
        case 3 | 4:
            engine.call(agent, chance.randint(1, 60), chance.choice([0, 30]))


@pytest.mark.parametrize(("name", "times"), [("rr", 2), ("mlfq", 1), ("fair", 2)])
def test_where_states_are_large_turns_are_longer(name: str, times: int) -> None:
    """But at most LONGER quanta, so that the wait of other calls is bounded."""
    evictions = []
    for least in (ANY_TURN, Quantum(3 * Q.tokens, 0.0), Quantum(1 << 30, 1e9)):
        engine = FakeEngine(make(name, Q), 2)
        for peer in range(1, 6):
            engine.agent(peer, [Turn(0.0, 0, 600)])
        while engine.open_calls or not engine.now:
            for call in engine.open_calls:
                call.least_turn = least
            engine.step()
        evictions.append(len(engine.evictions))
    assert evictions[0] > times * evictions[1]
    assert evictions[1] >= times * evictions[2] > 0


def test_a_quantum_grows_with_the_state_up_to_a_limit() -> None:
    call = Call(1, 1)
    assert Q.of(call) is Q
    call.least_turn = Quantum(20, 1.0)
    assert Q.of(call) == Quantum(20, Q.seconds)
    call.least_turn = Quantum(1 << 30, 1e9)
    assert Q.of(call) == Quantum(LONGER * Q.tokens, LONGER * Q.seconds)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_kept_of_ended_agents(name: str) -> None:
    policy = make(name, Q, {"a": 2.0})
    engine = FakeEngine(policy, 4)
    for peer in range(1, 3 * fair.REMEMBER):
        engine.agents[peer] = agent = engine.agent(peer, [], group="a" if peer % 2 else "")
        engine.call(agent, 1)
        engine.step()
    engine.now += max(mlfq.BOOST_S, fair.REMEMBER_S) + 1
    engine.call(agent, 1)
    engine.step()
    assert things(policy) < 50


def things(thing: object, seen: set[int] | None = None) -> int:
    """The number of items in all containers that are reachable from this object."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (str, type)):
        return 0
    seen.add(id(thing))
    if isinstance(thing, dict):
        return len(thing) + sum(things(value, seen) for value in thing.values())
    if isinstance(thing, (list, tuple, set)):
        return len(thing) + sum(things(value, seen) for value in thing)
    names = list(getattr(thing, "__dict__", ())) + list(getattr(thing, "__slots__", ()))
    return sum(things(getattr(thing, name, None), seen) for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_that_takes_over_goes_on_with_what_runs(name: str) -> None:
    engine = FakeEngine(make("fifo"), 3)
    for peer in range(1, 9):
        engine.agent(peer, [Turn(0.0, 10, 50)])
    for _ in range(30):
        engine.step()
    engine.policy = make(name, Q)
    for call in engine.open_calls:
        engine.policy.arrive(call, engine.now)
    engine.finish_all()


def test_the_charge_of_a_step_is_cheap() -> None:
    """The aim is 0.2 µs a call (measured: 0.11). The bound here is higher, for slow and busy machines."""
    policy, calls = make("fair"), [Call(peer, peer) for peer in range(64)]
    for call in calls:
        policy.arrive(call, 0.0)
    best = min(_timed(policy, calls) for _ in range(20))
    assert best / 64 < 2e-6


def _timed(policy: object, calls: list[Call]) -> float:
    began = time.perf_counter()
    policy.select(calls, 0.0)  # type: ignore[attr-defined]
    policy.charge(calls, 1, 0.0)  # type: ignore[attr-defined]
    return time.perf_counter() - began


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="'lifo' is none of fifo, rr, priority, mlfq, fair"):
        make("lifo")


# ── fifo ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(min_value=0, max_value=1000), unique=True), st.integers(min_value=-1, max_value=40))
def test_fifo_the_first_come_get_the_slots(orders: list[int], free: int) -> None:
    admitted = Fifo().admit([Call(1, order) for order in orders], [], free, now=0.0)
    assert [call.order for call in admitted] == sorted(orders)[: max(free, 0)]


@given(agents=agents, slots=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_fifo_no_call_is_overtaken_or_interrupted(agents: list[tuple[list[Turn], int, str]], slots: int) -> None:
    engine = FakeEngine(make("fifo"), slots)
    for peer, (script, nice, group) in enumerate(agents, 1):
        engine.agent(peer, script, nice, group)
    engine.finish_all()
    assert [call.order for call in engine.admissions] == list(range(1, engine.num_arrived + 1))
    assert engine.evictions == []


def test_fifo_prompts_are_computed_in_the_order_of_arrival() -> None:
    assert [call.order for call in Fifo().order([Call(1, 3), Call(1, 1), Call(1, 2)], 0.0)] == [1, 2, 3]


# ── rr ────────────────────────────────────────────────────────────────────────────────────────────────────


@given(count=st.integers(2, 20), slots=st.integers(1, 6), tokens=st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_rr_between_two_turns_of_an_agent_all_others_have_one(count: int, slots: int, tokens: int) -> None:
    engine = FakeEngine(RoundRobin(Quantum(tokens, 1e9)), slots)
    for peer in range(1, count + 1):
        engine.agent(peer, [Turn(0.0, 0, ENDLESS)])
    turns = -(-count // slots)
    for _ in range(tokens * (turns + 1) * 3):
        engine.step()
        had = [call.num_generated for call in every_call(engine)]
        assert max(had) - min(had) <= tokens, "an agent had two turns between two of another"
    if slots == 1:
        order = [call.order for call in engine.admissions]
        assert order == [i % count + 1 for i in range(len(order))]
    if count <= slots:
        assert engine.evictions == []
        return
    longest = turns * (tokens * (STEP_S + ROW_S * slots) + SWITCH_S * slots)
    for call in engine.open_calls:
        assert max(until - since for since, until in call.waits) <= longest + 1e-6
    assert len(engine.evictions) <= sum(call.num_generated for call in every_call(engine)) / tokens


def test_rr_the_quantum_in_seconds_ends_a_turn_too() -> None:
    engine = FakeEngine(RoundRobin(Quantum(10**9, 1.0)), 1)
    for peer in (1, 2):
        engine.agent(peer, [Turn(0.0, 0, ENDLESS)])
    engine.run(10.0)
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(engine.evictions)]
    assert 8 <= len(engine.evictions) <= 10
    assert all(1.0 <= gap < 1.0 + 4 * (STEP_S + ROW_S + SWITCH_S) for gap in gaps)


def test_rr_turns_go_round_agents_not_calls() -> None:
    """One agent with ten calls and three with one each, on four slots, get the same."""
    engine = FakeEngine(RoundRobin(Q), 4)
    greedy, *others = [engine.agent(peer, []) for peer in (1, 2, 3, 4)]
    for _ in range(10):
        engine.call(greedy)
    for _ in range(20):
        engine.step()
    for agent in others:
        engine.call(agent)
    had = [agent.service for agent in engine.agents.values()]
    for _ in range(400):
        engine.step()
    gained = [agent.service - before for agent, before in zip(engine.agents.values(), had, strict=True)]
    assert max(gained) - min(gained) <= 4 * Q.tokens
    assert min(call.num_generated for call in greedy.calls) > 0, "each of its calls has had turns"


# ── priority ──────────────────────────────────────────────────────────────────────────────────────────────


@given(
    nices=st.lists(st.integers(-20, 19), min_size=2, max_size=10),
    slots=st.integers(1, 3),
    pauses=st.lists(st.floats(0, 20), min_size=10, max_size=10),
)
@settings(max_examples=20, deadline=None)
def test_priority_a_wait_is_overtaken_only_within_the_ageing_limit(
    nices: list[int], slots: int, pauses: list[float]
) -> None:
    policy = Priority(Q)
    engine = FakeEngine(policy, slots)
    waits: list[tuple[float, float, float, int]] = []  # counted from, waited from, until, nice

    def admit(waiting: list[Call], running: list[Call], free: int, now: float) -> list[Call]:
        admitted = Priority.admit(policy, waiting, running, free, now)
        waits.extend((policy._since[call.order], call.since, now, call.nice) for call in admitted)
        return admitted

    policy.admit = admit  # type: ignore[assignment,method-assign]
    for peer, nice in enumerate(nices, 1):
        engine.agent(peer, [Turn(pauses[peer % 10], 0, 200), Turn(pauses[peer % 7], 0, ENDLESS)], nice)
    engine.run(90.0)
    for counts, since, until, nice in waits:
        for other, _, at, other_nice in waits:
            if since <= at < until:  # a call that got a slot meanwhile was more urgent, by nice value and wait
                assert other - counts <= (nice - other_nice) * AGEING_S + 1e-6
    longest = max((engine.now - call.since for call in engine.waiting), default=0.0)
    assert longest <= 39 * AGEING_S + len(nices) * (Q.seconds + AGEING_S), "an agent starves"


def every_call(engine: FakeEngine) -> list[Call]:
    return [call for agent in engine.agents.values() for call in agent.calls]


def test_priority_the_more_urgent_gets_the_slot_at_once() -> None:
    engine = FakeEngine(Priority(Q), 1)
    engine.agent(1, [Turn(0.0, 0, ENDLESS)], nice=5)
    urgent = engine.agent(2, [Turn(0.1, 0, 10)], nice=4)
    engine.run(1.0)
    assert urgent.calls[0].waits[0][1] - urgent.calls[0].waits[0][0] < 0.02
    assert urgent.calls[0].finished is not None


def test_priority_of_equals_the_first_come_runs_and_gives_way_in_time() -> None:
    engine = FakeEngine(Priority(Q), 1)
    for peer in (1, 2):
        engine.agent(peer, [Turn(0.0, 0, ENDLESS)])
    engine.run(AGEING_S - 0.1)
    assert engine.evictions == []
    engine.run(20 * AGEING_S)
    assert abs(engine.agents[1].service - engine.agents[2].service) <= 2 * AGEING_S / (STEP_S + ROW_S)


def test_priority_what_was_gained_by_waiting_outlasts_an_interruption() -> None:
    engine = FakeEngine(Priority(Q), 1)
    engine.agent(1, [Turn(0.0, 0, ENDLESS)], nice=0)
    aged = engine.agent(2, [Turn(0.0, 0, ENDLESS)], nice=3)
    engine.step()
    while not aged.calls[0].num_generated:
        engine.step()
    engine.agent(3, [Turn(0.0, 0, 5)], nice=-20)
    while not engine.agents[3].calls or engine.agents[3].calls[0].finished is None:
        engine.step()
    engine.step()
    assert aged.calls[0] in engine.running


# ── mlfq ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_mlfq_a_short_question_passes_a_crowd_of_long_answers() -> None:
    engine = FakeEngine(Mlfq(Q), 4)
    for peer in range(1, 17):
        engine.agent(peer, [Turn(0.0, 0, ENDLESS)])
    asker = engine.agent(99, [Turn(5.0, 8, 16)] * 5)
    engine.run(60.0)
    assert len(asker.calls) == 5
    assert all(call.waits[0][1] - call.waits[0][0] < 0.05 for call in asker.calls)
    assert all(len(call.waits) == 1 for call in asker.calls), "and is not interrupted"


def test_mlfq_counts_the_service_of_agents_not_of_calls() -> None:
    """An agent that makes short calls without a pause is demoted like one with a single long answer: a newcomer passes
    both, and neither of both passes the other for ever."""
    engine = FakeEngine(Mlfq(Quantum(16, 1e9)), 1)
    engine.agent(1, itertools.repeat(Turn(0.0, 0, 8)))
    engine.agent(2, [Turn(0.0, 0, 96)])
    while engine.agents[1].service + engine.agents[2].service < 192:
        engine.step()
    assert engine.agents[1].service >= 64, "while it has had less, it goes first"
    assert engine.agents[2].service >= 64, "and not for longer"


def test_mlfq_the_service_of_an_idle_agent_is_reset() -> None:
    policy = Mlfq(Q)
    call = Call(1, 1)
    policy.arrive(call, 0.0)
    policy.charge([call], 100 * Q.tokens, 0.0)
    policy.leave(call, 0.0)
    policy.arrive(call, mlfq.HALF_LIFE_S)
    assert policy._agents[1].attained == 50 * Q.tokens


@given(count=st.integers(2, 16), slots=st.integers(1, 4), newcomers=st.floats(0.2, 2.0))
@settings(max_examples=15, deadline=None)
def test_mlfq_no_agent_starves(count: int, slots: int, newcomers: float) -> None:
    """Long calls compete with a stream of new agents, which all begin at a higher level. The boost bounds the wait."""
    engine = FakeEngine(Mlfq(Q), slots)
    for peer in range(1, count + 1):
        engine.agent(peer, [Turn(0.0, 0, ENDLESS)])
    horizon = 3 * mlfq.BOOST_S
    for number in range(int(horizon / newcomers)):
        engine.agent(100 + number, [Turn(number * newcomers, 0, 12)])
    engine.run(horizon)
    step = STEP_S + ROW_S * slots + SWITCH_S * slots
    new = 12 * step * (mlfq.BOOST_S / newcomers + 1)  # service of newcomers in that time, on one slot each
    bound = mlfq.BOOST_S + -(-count // slots) * (Q.tokens + 1) * step + new
    for call in every_call(engine):
        ended = [until - since for since, until in call.waits]
        still = [engine.now - call.since] if call in engine.waiting else []
        assert max(ended + still) <= bound
    assert all(agent.service > 0 for agent in engine.agents.values() if agent.peer <= count)


def test_mlfq_the_boost_reaches_one_that_newcomers_keep_down() -> None:
    """There are always more new agents than the slot can serve, and all begin at a higher level than a long call."""
    engine = FakeEngine(Mlfq(Q), 1)
    long = engine.agent(1, [Turn(0.0, 0, ENDLESS)])
    engine.run(5.0)
    for number in range(1000):
        engine.agent(100 + number, [Turn(number * 0.1, 0, 30)])
    for _ in range(3):
        before = long.service
        engine.run(mlfq.BOOST_S)
        assert long.service > before


# ── fair ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    nices=st.lists(st.integers(-5, 10), min_size=2, max_size=12),
    slots=st.integers(1, 12),
    prompts=st.lists(st.sampled_from([0, 64, 700]), min_size=12, max_size=12),
    sleepers=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_fair_service_of_backlogged_agents_differs_by_a_bound(
    nices: list[int], slots: int, prompts: list[int], sleepers: int
) -> None:
    """In any interval of time, whatever other agents begin and end."""
    policy = Fair(Q)
    engine = FakeEngine(policy, slots)
    for peer, nice in enumerate(nices, 1):
        engine.agent(peer, itertools.repeat(Turn(0.0, prompts[peer - 1], 300)), nice)
    for number in range(sleepers):
        engine.agent(100 + number, itertools.repeat(Turn(0.3 * (number + 1), 64, 32)))
    backlogged = [engine.agents[peer] for peer in range(1, len(nices) + 1)]
    weigh = [fair.NICE_0 / fair.WEIGHTS[nice + 20] for nice in nices]
    reach = [policy.reach(nice, 1, 700) for nice in nices]
    least = [[0.0] * len(nices) for _ in nices]
    most = [[0.0] * len(nices) for _ in nices]
    for _ in range(1500):
        engine.step()
        virtual = [agent.service * cost for agent, cost in zip(backlogged, weigh, strict=True)]
        for i, j in itertools.combinations(range(len(nices)), 2):
            ahead = virtual[i] - virtual[j]
            least[i][j], most[i][j] = min(least[i][j], ahead), max(most[i][j], ahead)
    for i, j in itertools.combinations(range(len(nices)), 2):
        assert most[i][j] <= reach[i]
        assert least[i][j] >= -reach[j]
        assert most[i][j] - least[i][j] <= reach[i] + reach[j]


@pytest.mark.parametrize(("count", "slots"), [(16, 8), (64, 8), (100, 64), (8, 16)])
def test_fair_classes_get_tokens_in_the_ratio_of_their_weights(count: int, slots: int) -> None:
    engine = FakeEngine(Fair(Quantum()), slots)
    for peer in range(1, count + 1):
        engine.agent(peer, [Turn(0.0, 64, ENDLESS)], nice=5 if peer % 2 else 0)
    engine.run(60.0)
    before = [agent.service for agent in engine.agents.values()]
    engine.run(600.0 * count / 64)
    gained = [agent.service - had for agent, had in zip(engine.agents.values(), before, strict=True)]
    ratio = sum(gained[1::2]) / sum(gained[0::2])
    assert ratio == pytest.approx(1024 / 335, rel=0.05)
    assert statistics.mean(chosen for _, chosen in engine.steps) >= 0.97 * min(slots, count) or count <= slots


@pytest.mark.parametrize("slots", [33, 8])
def test_fair_an_interactive_agent_among_32_that_generate_without_end(slots: int) -> None:
    script = [Turn(1.0, 64, 32)] * 30
    idle = FakeEngine(Fair(Quantum()), slots)
    alone = latencies(idle, script)
    busy = FakeEngine(Fair(Quantum()), slots)
    for peer in range(1, 33):
        busy.agent(peer, [Turn(0.0, 64, ENDLESS)])
    busy.run(20.0)
    among = latencies(busy, script)
    assert p90(among) <= 2.5 * p90(alone)
    assert among[0] <= 2.5 * alone[0], "the first one too"
    others = [agent.service for agent in busy.agents.values() if agent.peer <= 32]
    assert max(others) - min(others) <= 2 * 64 + 8
    assert statistics.mean(chosen for _, chosen in busy.steps) > 0, "and they do get on"


@pytest.mark.parametrize("slots", [33, 8])
def test_fair_agents_that_all_pause_for_a_moment_get_no_allowance(slots: int) -> None:
    """All of them end a long answer at about the same time, and make the next call after a moment."""
    script = [Turn(1.0, 64, 32)] * 40
    alone = latencies(FakeEngine(Fair(Quantum()), slots), script)
    busy = FakeEngine(Fair(Quantum()), slots)
    for peer in range(1, 33):
        busy.agent(peer, [Turn(0.3, 64, 300) for _ in range(200)])
    busy.run(10.0)
    assert p90(latencies(busy, script)) <= 2.5 * p90(alone)


def latencies(engine: FakeEngine, script: list[Turn]) -> list[float]:
    asker = engine.agent(1000, script)
    while len(asker.calls) < len(script) or asker.calls[-1].finished is None:
        engine.step()
    return [(call.finished or 0.0) - call.arrived for call in asker.calls]


def p90(values: list[float]) -> float:
    return sorted(values)[int(0.9 * len(values))]


@pytest.mark.parametrize("shared", [0, 512, 2048])
@pytest.mark.parametrize("gap", [0.001, 0.5])
def test_fair_a_crowd_of_equals_decodes_in_one_batch(shared: int, gap: float) -> None:
    engine = FakeEngine(Fair(Quantum()), 64)
    crowd(engine, 64, shared, gap=gap)
    engine.finish_all()
    ready, chosen = (sum(column) for column in zip(*engine.steps, strict=True))
    assert chosen >= 0.97 * ready
    fifo = FakeEngine(make("fifo"), 64)
    crowd(fifo, 64, shared, gap=gap)
    fifo.finish_all()
    assert engine.now <= 1.03 * fifo.now


def test_fair_a_crowd_that_uses_tools_decodes_in_one_batch_too() -> None:
    """Their pauses differ, so some have larger allowances, but no call is held out for another."""
    took = {}
    for name in ("fair", "fifo"):
        engine = FakeEngine(make(name), 64)
        chance = random.Random(7)
        for peer in range(1, 65):
            engine.agent(peer, [Turn(chance.uniform(0, 3), 64, 32) for _ in range(6)])
        engine.finish_all()
        took[name] = engine.now
        ready, chosen = (sum(column) for column in zip(*engine.steps, strict=True))
        assert chosen >= 0.97 * ready
    assert took["fair"] <= 1.03 * took["fifo"]


def test_fair_a_stopped_agent_saves_up_no_service() -> None:
    engine = FakeEngine(Fair(Quantum()), 1)
    one, two = engine.agent(1), engine.agent(2)
    engine.step()
    engine.park(one.calls[0], True)
    engine.run(60.0)
    engine.park(one.calls[0], False)
    before = two.service
    engine.run(20.0)
    assert two.service - before > 0.35 * 20.0 / (STEP_S + ROW_S)


def test_fair_a_newcomer_owes_nothing_and_is_owed_nothing() -> None:
    engine = FakeEngine(Fair(Quantum()), 2)
    old = [engine.agent(peer) for peer in (1, 2)]
    engine.run(30.0)
    new = engine.agent(3)
    had = [agent.service for agent in old]
    engine.run(30.0)
    gained = [agent.service - before for agent, before in zip(old, had, strict=True)]
    assert new.service == pytest.approx(statistics.mean(gained), rel=0.05)


def test_fair_cancelling_and_calling_again_gains_nothing() -> None:
    """An agent that cancels and calls again all the time gets no more than one that does not."""
    engine = FakeEngine(Fair(Quantum()), 1)
    engine.agent(1, itertools.repeat(Turn(0.0, 0, 10)))
    engine.agent(2)
    engine.run(60.0)
    one, two = (agent.service for agent in engine.agents.values())
    assert one / two == pytest.approx(1.0, rel=0.05)


def test_fair_further_calls_are_no_larger_share() -> None:
    engine = FakeEngine(Fair(Quantum()), 4)
    greedy = engine.agent(1, [])
    for _ in range(10):
        engine.call(greedy)
    for peer in range(2, 9):
        engine.agent(peer, [Turn(0.0, 0, ENDLESS)])
    engine.run(60.0)
    others = [agent.service for agent in engine.agents.values() if agent.peer > 1]
    assert greedy.service == pytest.approx(statistics.mean(others), rel=0.1)
    engine.run(150.0)
    assert min(call.num_generated for call in greedy.calls) > 0, "each of its calls has had something"


@pytest.mark.parametrize("slots", [4, 64])
def test_fair_a_group_with_a_share_gets_it_however_many_they_are(slots: int) -> None:
    engine = FakeEngine(Fair(Quantum(), {"many": 2.0}), slots)
    for peer in range(1, 21):
        engine.agent(peer, [Turn(0.0, 0, ENDLESS)], group="many")
    for peer in range(21, 25):
        engine.agent(peer, [Turn(0.0, 0, ENDLESS)])
    engine.run(50.0)
    before = {peer: agent.service for peer, agent in engine.agents.items()}
    engine.run(600.0)
    gained = {peer: agent.service - before[peer] for peer, agent in engine.agents.items()}
    many, alone = sum(gained[p] for p in range(1, 21)), sum(gained[p] for p in range(21, 25))
    assert many / alone == pytest.approx(2 / 4, rel=0.05)


@pytest.mark.parametrize("slots", [4, 32])
def test_fair_a_swarm_of_sleepers_starves_no_agent(slots: int) -> None:
    """Sixteen agents make a call twice a second, so that one of them always runs ahead. Eight generate without end."""
    engine = FakeEngine(Fair(Quantum()), slots)
    for peer in range(1, 17):
        engine.agent(peer, itertools.repeat(Turn(0.5, 64, 32)))
    long = [engine.agent(peer) for peer in range(101, 109)]
    gaps, last = [], {agent.peer: (0.0, 0.0) for agent in long}
    while engine.now < 120.0:
        engine.step()
        for agent in long:
            had, at = last[agent.peer]
            if agent.service > had:
                gaps.append(engine.now - at)
                last[agent.peer] = (agent.service, engine.now)
    once_round = (24 * 64 / slots) * (STEP_S + ROW_S * slots) + 16 * 64 * PROMPT_S
    assert max(gaps) <= fair.RATION_S + 2 * once_round
    most = max(agent.service for agent in engine.agents.values())
    assert min(agent.service for agent in long) >= 0.25 * most


def test_fair_nice_values_count_with_slots_for_all() -> None:
    engine = FakeEngine(Fair(Quantum()), 8)
    for peer, nice in enumerate((0, 0, 0, 0, 5, 5, 5, 5), 1):
        engine.agent(peer, [Turn(0.0, 0, ENDLESS)], nice)
    engine.run(60.0)
    service = [agent.service for agent in engine.agents.values()]
    assert sum(service[:4]) / sum(service[4:]) == pytest.approx(1024 / 335, rel=0.05)
    for agent in list(engine.agents.values())[4:]:
        engine.renice(agent, 0)
    before = [agent.service for agent in engine.agents.values()]
    engine.run(60.0)
    gained = [agent.service - had for agent, had in zip(engine.agents.values(), before, strict=True)]
    assert sum(gained[:4]) / sum(gained[4:]) == pytest.approx(1.0, rel=0.05)


def test_fair_the_quantum_in_seconds_counts_too() -> None:
    """With a slow model a quantum in tokens would take minutes."""
    engine = FakeEngine(Fair(Quantum(10**6, 1.0)), 1)
    for peer in (1, 2, 3):
        engine.agent(peer)
    engine.run(30.0)
    assert 20 <= len(engine.evictions) <= 31
