"""Blocks that sleep stand in for blocks that compute, and real pools follow a load with them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.prefill import PrefillEngine
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan
from rayapp.scaling.costs import DecodeCost, PrefillCost
from rayapp.scaling.settings import Targets
from rayapp.simulation.requests import Request
from rayapp.simulation.traces import Arrival

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def test_blocks_that_sleep_take_their_time_and_run_the_engines_as_they_are(tiny_model):
    """The next token depends on the last one alone: on what the head makes of its embedding."""
    from serving.sleeping import SleepingPrompts, SleepingTokens

    model, plan = tiny_model("llama"), PruningPlan()
    stacks = [BlockStack(model, plan, stage) for stage in ("prefill", "decode")]
    prefill = PrefillEngine(stacks[0], plan, max_model_len=64)
    decode = DecodeEngine(stacks[1], plan, max_num_seqs=2, max_model_len=64)
    prefill.blocks = SleepingPrompts(stacks[0], PrefillCost(step_s=0.01, pair_s=0.001))
    decode.blocks = SleepingTokens(DecodeCost(step_s=0.01, entry_s=0.001))
    request = GenerationRequest("it", (5, 6, 7), SamplingParams(max_tokens=4, ignore_eos=True))
    began_s = time.monotonic()
    output = prefill.run(request)
    assert time.monotonic() - began_s >= 0.013  # a step, and the pairs of three tokens
    decode.admit(request, output.segment, output.first)
    tokens = list(output.first.token_ids)
    while decode.num_running:
        began_s, position = time.monotonic(), len(tokens) + 2
        tokens += [token for batch in decode.step() for token in batch.token_ids]
        assert time.monotonic() - began_s >= 0.01 + 0.001 * position
    expected, last = [], 7
    with torch.inference_mode():
        for _ in range(4):
            hidden = stacks[0].embed(torch.tensor([[last]]))
            last = int(stacks[0].logits(hidden)[0, 0].argmax())
            expected.append(last)
    assert tokens == expected
    assert all(not block.keys_HND.any() for block in output.segment.blocks)


def test_what_is_seen_becomes_an_outcome():
    from serving.watch import Sight, cold_start_s, seen_outcome

    one, two = frozenset("a"), frozenset("ab")

    def sight(at_s, running, held, wanted, nodes=0):
        pools = ("prefill", "decode")
        fixed = {"prefill": one, "decode": running}, {"prefill": one, "decode": held}
        numbers = {"prefill": 1, "decode": wanted}
        return Sight(100.0 + at_s, *fixed, numbers, dict.fromkeys(pools, nodes))

    sights = [
        sight(0.0, one, one, 1),
        sight(1.0, one, two, 2),
        sight(3.0, two, two, 2, nodes=2),
        sight(4.0, one, one, 1),
    ]
    request = Request("it", Arrival(0.5, 10, 3), first_s=1.5, finished_s=3.5)
    outcome = seen_outcome(sights, 100.0, [request], Targets())
    assert outcome.replica_s == {"prefill": 4.0, "decode": 1.0 + 2 * 2.0 + 2 * 1.0}
    assert [(c.at_s, c.before, c.after) for c in outcome.changes["decode"]] == [
        (1.0, 1, 2), (4.0, 2, 1),
    ]  # fmt: skip
    assert outcome.num_turns("decode") == 1
    seen = [(m.num_decode, m.num_prompts, m.num_sequences) for m in outcome.moments]
    assert seen == [(1, 0, 0), (1, 1, 0), (2, 0, 1), (1, 0, 0)]
    assert outcome.moments[2].num_decode_nodes == 2
    assert cold_start_s(sights) == 2.0
    assert cold_start_s(sights[:2]) is None


def record_of(out, *arguments):
    """Run the benchmark in a process of its own, with a load that lasts a minute.

    A busy machine takes its time to start replicas and nodes: the load needs two of each stage
    beyond doubt, and pools that have grown stay so for longer than that.
    """
    load = ("--load", "burst", "--span", "60", "--rate", "1.2", "--divisor", "2", "--most", "2")
    short = (*load, "--delay", "80", "--rest", "300")
    words = [str(BENCHMARKS / "live_pools.py"), *short, *arguments, "--out", str(out)]
    ended = subprocess.run(
        [sys.executable, *words], check=False, timeout=840, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (found,) = out.glob("*.json")
    assert "none was lost" in found.with_suffix(".md").read_text()
    return json.loads(found.read_text())["results"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_pools_grow_and_shrink_and_lose_nothing(tmp_path):
    """The nodes hold whatever the pools ask for, so only the policy decides."""
    found = record_of(tmp_path)
    assert found["failed"] == []
    assert set(found["real"]["most"].values()) == {2}, found["decisions"]
    at_s, *at_the_end = found["real"]["moments"][-1]
    assert at_the_end == [1, 1, 0, 0, 0, 0], at_s
    assert any(text.startswith("decode 1 -> ") for text in found["decisions"])
    assert found["simulated"]["requests"] == found["requests"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_that_do_not_fit_make_nodes_of_their_type_appear(tmp_path):
    """Every node has room for one replica, and a label for one stage."""
    found = record_of(tmp_path, "--nodes")
    assert found["failed"] == []
    moments = found["real"]["moments"]
    for stage in (0, 1):
        replicas, nodes = ([moment[place + stage] for moment in moments] for place in (1, 5))
        assert max(replicas) == max(nodes) == 2, found["decisions"]
        assert (replicas[-1], nodes[-1]) == (1, 1), found["decisions"]
