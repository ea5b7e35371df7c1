"""The scheduling policy, as pure functions: against its documentation, and in plain simulations of many turns."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.backends import Piece, Row
from mlx_diffgemma.prompts import CHUNK
from mlx_diffgemma.scheduler.device import Call
from mlx_diffgemma.scheduler.policy import next_admitted, next_pass
from support.fake import FakeCache

CLIENTS = "abcd"
CACHE = FakeCache()


@dataclass(frozen=True)
class Asking:
    """A waiting request."""

    client: str
    idle: bool = False


def pieces(*lengths: int, method: str = "encode") -> Call:
    return Call(method, [Piece(np.zeros(length, np.int32), CACHE) for length in lengths])


def rows(*lengths: int, method: str = "denoise") -> Call:
    return Call(method, [Row(np.zeros(length, np.int32), CACHE, 1.0) for length in lengths])


_LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=3)
_CALLS = st.one_of(
    st.builds(lambda method, lengths: pieces(*lengths, method=method), st.sampled_from(["encode", "score"]), _LENGTHS),
    st.builds(lambda method, lengths: rows(*lengths, method=method), st.sampled_from(["denoise", "score_canvas"]), _LENGTHS),
)
_ASKING = st.builds(Asking, st.sampled_from(CLIENTS), st.booleans())
_SERVED = st.permutations(range(len(CLIENTS))).map(lambda turns: dict(zip(CLIENTS, turns, strict=True)))
_LIMITS = st.fixed_dictionaries({"max_batch": st.integers(1, 5), "max_tokens": st.integers(1, 20)})


# ---- Single decisions


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(_ASKING, _CALLS), min_size=1, max_size=10), _SERVED, _LIMITS)
def test_a_pass_is_what_the_words_say(calls: list[tuple[Asking, Call]], served: dict[str, int], limits: dict[str, int]) -> None:
    chosen = next_pass(calls, served, **limits)
    asking, performed = [calls[index][0] for index in chosen], [calls[index][1] for index in chosen]

    def behind(index: int) -> tuple[bool, int, int]:
        request = calls[index][0]
        return request.idle, served[request.client], index

    order = sorted(range(len(calls)), key=behind)
    assert chosen[0] == order[0], "whose turn it is"
    assert chosen == sorted(set(chosen), key=behind), "and those beside it in the same order"
    assert len({each.idle for each in asking}) == 1
    assert len({call.method for call in performed}) == 1
    parts, tokens = sum(len(call.parts) for call in performed), sum(call.tokens for call in performed)
    if len(chosen) > 1:
        assert parts <= limits["max_batch"]
        assert tokens <= limits["max_tokens"]
    for index in set(range(len(calls))) - set(chosen):
        request, call = calls[index]
        if request.idle == asking[0].idle and call.method == performed[0].method:
            assert parts + len(call.parts) > limits["max_batch"] or tokens + call.tokens > limits["max_tokens"], "room is left"


def test_rows_of_all_kinds_are_one_pass() -> None:
    one = np.zeros(3, np.int32)
    kinds = [Row(one, CACHE, 0.5), Row(one[:1], FakeCache([1, 2]), 0.7, 9, ("any", "thing"), one[:1]), Row(one[:2], CACHE, 1.0)]
    calls = [(Asking("a"), Call("denoise", [row])) for row in kinds]
    assert next_pass(calls, {"a": 0}, max_batch=3) == [0, 1, 2]
    assert next_pass(calls, {"a": 0}, max_batch=2) == [0, 1]
    assert next_pass(calls, {"a": 0}, max_batch=1) == [0]


def test_a_call_too_large_for_any_pass_is_performed_alone() -> None:
    calls = [(Asking("a"), rows(1, 1, 1)), (Asking("a"), rows(1))]
    assert next_pass(calls, {"a": 0}, max_batch=2) == [0]
    calls = [(Asking("a"), pieces(2 * CHUNK)), (Asking("a"), pieces(1))]
    assert next_pass(calls, {"a": 0}, max_batch=2) == [0]
    assert next_pass(calls[::-1], {"a": 0}, max_batch=2) == [0]
    calls = [(Asking("a"), pieces(CHUNK - 1)), (Asking("a"), pieces(2)), (Asking("b"), pieces(1))]
    assert next_pass(calls, {"a": 0, "b": 1}, max_batch=8) == [0, 2], "a piece of full length is as much as a pass takes"


def test_tokens_of_canvases_do_not_count() -> None:
    calls = [(Asking("a"), rows(10)) for _ in range(4)]
    assert next_pass(calls, {"a": 0}, max_batch=8, max_tokens=1) == [0, 1, 2, 3]


@settings(max_examples=300, deadline=None)
@given(st.lists(_ASKING, min_size=1, max_size=8), st.lists(_ASKING, max_size=8), _SERVED)
def test_who_begins_next(waiting: list[Asking], running: list[Asking], served: dict[str, int]) -> None:
    chosen = waiting[next_admitted(waiting, running, served)].client
    assert next_admitted(waiting, running, served) == [each.client for each in waiting].index(chosen), "its oldest"
    share = Counter(each.client for each in running)
    for other in {each.client for each in waiting} - {chosen}:
        assert share[chosen] <= share[other]
        assert share[chosen] < share[other] or served[chosen] < served[other]


# ---- Many turns


@dataclass
class Job:
    """A request in a simulation: its calls, in order, starting in the turn in which it arrives."""

    client: str
    arrives: int
    calls: list[Call]
    idle: bool = False
    waits: list[int] = field(default_factory=list)  # the turns that each call waited


@dataclass
class Simulation:
    """Clients whose jobs all take part at once. A turn takes one unit of time.

    Attributes:
        passes: the jobs in each pass.
        unserved: for each client, the longest time in which it had waiting calls of requests and none was performed.
    """

    jobs: Sequence[Job]
    max_batch: int
    passes: list[list[Job]] = field(default_factory=list)
    unserved: Counter[str] = field(default_factory=Counter)

    def run(self) -> "Simulation":
        served: dict[str, int] = {}
        pending: list[Job] = []  # in the order of their calls' arrival
        since, done, ready = {}, Counter[int](), Counter[str]()
        coming = sorted(self.jobs, key=lambda job: job.arrives)
        turn = 0
        while coming or pending:
            while coming and coming[0].arrives <= turn:
                job = coming.pop(0)
                served.setdefault(job.client, 2 * turn - 1)
                pending += [job] if job.calls else []
                since[id(job)] = turn
            turn += 1
            if not pending:
                continue
            calls = [(job, job.calls[done[id(job)]]) for job in pending]
            chosen = [pending[index] for index in next_pass(calls, served, max_batch=self.max_batch)]
            self.passes.append(chosen)
            self._count_waiting(ready, pending, chosen)
            for job in chosen:
                pending.remove(job)
                job.waits.append(turn - 1 - since[id(job)])
                done[id(job)] += 1
                if not job.idle:
                    served[job.client] = 2 * turn
            for job in chosen:
                if done[id(job)] < len(job.calls):
                    pending.append(job)
                    since[id(job)] = turn
        return self

    def _count_waiting(self, ready: Counter[str], pending: Sequence[Job], chosen: Sequence[Job]) -> None:
        asking = {job.client for job in pending if not job.idle}
        for client in asking:
            ready[client] = 0 if client in {job.client for job in chosen} else ready[client] + 1
            self.unserved[client] = max(self.unserved[client], ready[client])


_SMALL = st.one_of(st.integers(1, 12).map(pieces), st.integers(1, 12).map(rows), st.just(rows(2, 3)))
_JOBS = st.lists(
    st.builds(Job, st.sampled_from(CLIENTS), st.integers(0, 12), st.lists(_SMALL, min_size=1, max_size=6), st.booleans()),
    min_size=1,
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(_JOBS, st.integers(1, 4))
def test_no_client_waits_for_more_turns_than_there_are_others(jobs: list[Job], max_batch: int) -> None:
    simulation = Simulation(jobs, max_batch).run()
    others = len({job.client for job in jobs if not job.idle}) - 1
    assert all(turns <= others for turns in simulation.unserved.values()), simulation.unserved
    assert [len(job.waits) for job in jobs] == [len(job.calls) for job in jobs], "all is performed in the end"


@settings(max_examples=300, deadline=None)
@given(_JOBS, st.integers(1, 4))
def test_idle_work_delays_nobody(jobs: list[Job], max_batch: int) -> None:
    """Requests wait as long as without idle work. Idle work only keeps its client's place while there is some."""
    simulation = Simulation(jobs, max_batch).run()
    for chosen in simulation.passes:
        assert len({job.idle for job in chosen}) == 1
    alone = [Job(job.client, job.arrives, [] if job.idle else job.calls) for job in jobs]
    Simulation(alone, max_batch).run()
    for job, same in zip(jobs, alone, strict=True):
        assert job.idle or job.waits == same.waits


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.data())
def test_equal_requests_take_as_few_passes_as_there_can_be(
    clients: int, each: int, count: int, max_batch: int, data: Any
) -> None:
    """The canvases may have different lengths."""
    lengths = st.integers(1, 9)
    jobs = [Job(CLIENTS[index % clients], 0, [rows(data.draw(lengths)) for _ in range(count)]) for index in range(clients * each)]
    passes = Simulation(jobs, max_batch).run().passes
    assert len(passes) == max(count, ceil(len(jobs) * count / max_batch))
