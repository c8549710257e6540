"""The simulator against what can be computed by hand, and under the service's policy."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from rayapp.errors import InputError
from rayapp.scaling.admission import Room
from rayapp.scaling.costs import LinkCost
from rayapp.scaling.settings import ScalingSettings, Targets
from rayapp.simulation.policies import FixedPolicy, OwnPolicy
from rayapp.simulation.simulate import Deaf, Pools, simulate
from rayapp.simulation.stage_costs import StageCosts
from rayapp.simulation.traces import SHAPES, Arrival, at_rate, drawn, read_trace, scaled

COSTS = StageCosts.model_validate(
    {
        "prefill": {"step_s": 0.01, "token_s": 0.001},
        "decode": {"step_s": 0.02, "row_s": 0.001, "entry_s": 1e-6},
        "link": {"transfer_s": 0.005, "byte_s": 1e-9},
        "prompt_kv_bytes": 1e5,
        "max_num_seqs": 8,
        "max_entries": 100_000,
        "cold_start_s": 5.0,
    }
)
SETTINGS = ScalingSettings(targets=Targets(ttft_ms=12_000, tpot_ms=60), downscale_delay_s=60)
OPEN = Room(10**6)


def fixed(arrivals, costs=COSTS, prefill=1, decode=1):
    pools = Pools((prefill, prefill), (decode, decode))
    return simulate(arrivals, costs, pools, FixedPolicy(), settings=SETTINGS, room=OPEN)


def own(arrivals, most=12, settings=SETTINGS, **options):
    pools = Pools((1, most), (1, most))
    return simulate(
        arrivals, COSTS, pools, OwnPolicy(settings), settings=settings, room=OPEN, **options
    )


def test_one_request_alone():
    """Prefill 0.11 s, the link 0.015 s, then nine steps of one row whose entries grow."""
    outcome = fixed([Arrival(0.0, 100, 10)])
    (request,) = outcome.requests
    assert request.ttft_s == pytest.approx(0.11)
    steps_s = sum(0.021 + 1e-6 * (100 + n) for n in range(9))
    assert request.finished_s == pytest.approx(0.11 + 0.015 + steps_s)
    assert outcome.share_within() == 1.0
    assert outcome.total_replica_s == pytest.approx(2 * request.finished_s)


def test_what_is_beside_the_stages_delays_all_tokens_alike():
    late = COSTS.model_copy(update={"overhead_s": 0.5})
    (plain,), (request,) = (fixed([Arrival(0.0, 100, 10)], c).requests for c in (COSTS, late))
    assert request.ttft_s == pytest.approx(plain.ttft_s + 0.5)
    assert request.tpot_s == pytest.approx(plain.tpot_s)


def test_a_short_prompt_passes_a_long_one_as_in_the_service():
    outcome = fixed([Arrival(0.0, 5000, 1), Arrival(0.1, 10, 1)])
    long, short = outcome.requests
    assert short.ttft_s < 1.2  # the chunk that runs, and its own step
    assert long.ttft_s > 5.0


def test_rows_beyond_the_slots_wait():
    outcome = fixed([Arrival(0.0, 1, 100)] * 9)
    ends = sorted(request.finished_s for request in outcome.requests)
    assert ends[8] > ends[7] + 1.5
    assert ends[7] < 3.5


def test_steps_in_one_go_equal_steps_one_by_one():
    """Rows that join and leave at different moments, against a loop over single steps."""
    arrivals = [Arrival(0.013 * n, 20 + n, 3 + 5 * n) for n in range(6)]
    outcome = fixed(arrivals, COSTS.model_copy(update={"link": LinkCost()}))
    costs, requests = COSTS.decode, outcome.requests
    ready = sorted((request.first_s, number) for number, request in enumerate(requests))
    now, rows, ends = 0.0, {}, {}
    while ready or rows:
        if not rows:
            now = max(now, ready[0][0])
        while ready and ready[0][0] <= now + 1e-9:
            number = ready.pop(0)[1]
            rows[number] = [arrivals[number].num_prompt, arrivals[number].num_answer - 1]
        now += costs.seconds(len(rows), sum(entries for entries, _ in rows.values()))
        for number, row in list(rows.items()):
            row[0], row[1] = row[0] + 1, row[1] - 1
            if not row[1]:
                ends[number] = now
                del rows[number]
    assert [request.finished_s for request in outcome.requests] == pytest.approx(
        [ends[number] for number in range(6)], abs=1e-6
    )


def test_pages_that_run_out_put_the_youngest_aside_and_lose_nothing():
    costs = COSTS.model_copy(update={"max_entries": 260})
    outcome = fixed([Arrival(0.0, 60, 100)] * 3, costs)
    assert all(request.finished_s is not None for request in outcome.requests)
    assert all(request.num_left == 0 for request in outcome.requests)
    assert all(request.entries == 159 for request in outcome.requests)


def test_more_replicas_wait_less():
    arrivals = drawn("poisson", per_s=3.0, span_s=120, seed=0)
    late = [fixed(arrivals, prefill=n, decode=8).quantiles("ttft_s")[1] for n in (3, 4, 8)]
    assert late == sorted(late, reverse=True)


def test_admission_refuses_in_the_simulation_too():
    arrivals = [Arrival(0.0, 1000, 2)] * 20
    pools = Pools()
    outcome = simulate(
        arrivals, COSTS, pools, FixedPolicy(), settings=SETTINGS, room=Room(5, 120.0)
    )
    assert outcome.numbers()["refused"] == 15


@pytest.mark.parametrize("shape", ["burst", "ramp", "diurnal"])
def test_pools_follow_a_load_and_do_not_waver(shape):
    arrivals = drawn(shape, per_s=2.0, span_s=400, seed=1)
    outcome = own(arrivals)
    assert all(request.finished_s is not None for request in outcome.requests)
    assert outcome.share_within() > 0.9
    assert max(change.after for change in outcome.changes["prefill"]) >= 3
    most = fixed(arrivals, prefill=12, decode=12)
    assert outcome.total_replica_s < 0.7 * most.total_replica_s


def test_deaf_replicas_lose_no_request():
    arrivals = drawn("poisson", per_s=3.0, span_s=300, seed=2)
    outcome = own(arrivals, deaf=[Deaf("prefill", 80, 200), Deaf("decode", 100, 240, 0.5)])
    assert all(request.finished_s is not None for request in outcome.requests)
    assert not [c for c in outcome.changes["prefill"] if 100 < c.at_s < 200]


def test_traces(tmp_path):
    csv = tmp_path / "t.csv"
    csv.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,396,109\n"
    )
    first, second = read_trace(csv)
    assert (first.at_s, first.num_prompt, second.at_s) == (0.0, 374, pytest.approx(4.0))
    lines = tmp_path / "t.jsonl"
    lines.write_text(json.dumps({"timestamp": 500, "input_length": 7, "output_length": 3}) + "\n")
    assert read_trace(lines) == [Arrival(0.0, 7, 3)]
    assert scaled([Arrival(0.0, 800, 80)], 8, 64) == [Arrival(0.0, 54, 10)]
    assert at_rate([first, second], 0.5)[1].at_s == pytest.approx(2.0)
    with pytest.raises(InputError, match="2 arrivals, 3 are wanted"):
        read_trace(csv, 3)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="is no trace"):
        read_trace(tmp_path / "other.csv")
    with pytest.raises(InputError, match="there is none"):
        drawn("nothing", per_s=1.0, span_s=1.0, seed=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_loads_are_the_same_for_the_same_seed(shape):
    one, other = (drawn(shape, per_s=2.0, span_s=60, seed=3) for _ in range(2))
    assert one == other
    assert all(a.at_s <= b.at_s for a, b in pairwise(one))


def test_costs_are_a_file(tmp_path):
    path = tmp_path / "costs.json"
    COSTS.save(path)
    assert StageCosts.load(path) == COSTS
    path.write_text('{"prefill": {"token_s": -1}, "decode": {}}')
    with pytest.raises(InputError, match=r"prefill\.token_s"):
        StageCosts.load(path)
    with pytest.raises(InputError, match="no file of stage costs"):
        StageCosts.load(tmp_path / "missing.json")


def test_a_short_prompt_is_prefilled_by_decode_while_prefill_is_busy():
    """Decode is idle: the prompt takes a step of its own there, and no link."""
    arrivals = [Arrival(0.0, 5000, 1), Arrival(0.1, 10, 10)]
    pools, known = Pools(), {"settings": SETTINGS, "room": OPEN, "short_prompt_tokens": 20}
    _, short = simulate(arrivals, COSTS, pools, FixedPolicy(), **known).requests
    assert short.ttft_s == pytest.approx(0.01 + 0.01)
    steps_s = sum(0.021 + 1e-6 * (10 + n) for n in range(9))
    assert short.finished_s == pytest.approx(0.1 + 0.02 + steps_s)
    _, apart = fixed(arrivals).requests
    assert apart.ttft_s > short.ttft_s


def test_sequences_wait_for_a_short_prompt_and_then_go_on():
    arrivals = [Arrival(0.0, 100, 50), Arrival(0.5, 5000, 1), Arrival(0.6, 8, 3)]
    known = {"settings": SETTINGS, "room": OPEN, "short_prompt_tokens": 20}
    running, _, short = simulate(arrivals, COSTS, Pools(), FixedPolicy(), **known).requests
    alone, _ = fixed(arrivals[:2]).requests
    beside_s = 2 * 0.001  # two steps with a row more
    assert running.finished_s == pytest.approx(alone.finished_s + 0.018 + beside_s, abs=1e-4)
    assert short.finished_s is not None
    assert short.finished_s < running.finished_s
