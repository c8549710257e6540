from __future__ import annotations

from dataclasses import replace

import pytest

from rayapp.errors import InputError
from rayapp.plan import KVTransfer
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.measures.costs import Costs, measure_costs
from rayapp.pruning.search.sizes import kept_costs, sizes_for
from rayapp.pruning.settings.objective import Objective
from rayapp.pruning.settings.search import SearchSettings
from rayapp.pruning.storage import Storage

COSTS = Costs(
    prompt_tokens=10,
    answer_tokens=5,
    prefill_parts=(4.0, 2.0) * 4,
    prefill_kv=(1.0,) * 4,
    decode_parts=(0.5, 1.0) * 4,
    prefill_rest=2.0,
    decode_rest=0.25,
    kv_bytes=(80,) * 4,
    sent_bytes=(80, 40, 80, 80),
)


def settings(**changes: object) -> SearchSettings:
    return SearchSettings.checked(out="o", **changes)


def test_costs_add_up_by_part_and_stage():
    assert COSTS.total_s(DENSE) == 26.0 + 4 * 6.25
    candidate = Candidate((0, 2, 3), (0, 7))  # prefill: attention 0, block 1; decode: 0.att, 3.mlp
    assert COSTS.prefill_s(candidate) == 26 - 4 - 6 + 1  # decode needs the KV of block 1, not 0
    assert COSTS.decode_s(candidate) == 6.25 - 0.5 - 1.0
    assert COSTS.bytes_sent(candidate) == 40 + 80 + 80
    assert COSTS.total_s(candidate) == 17 + 4 * 4.75


def test_expected_seconds_are_those_of_blocks_whose_kv_is_needed():
    wanted = COSTS.total_s(Candidate((0, 1), (2, 3, 4, 5)))
    assert COSTS.expected_s(1, 2, kv_modes=True) == pytest.approx(wanted)
    subset = COSTS.total_s(Candidate((2, 3), (2, 3)))
    assert COSTS.expected_s(1, 1, kv_modes=False) == pytest.approx(subset)


def test_bridges_cost_what_they_take():
    bridged = replace(COSTS, prefill_bridge=0.5, decode_bridge=0.125)
    gone = Candidate((0, 1), (2, 3, 4, 5))
    assert bridged.prefill_s(gone, 1) == COSTS.prefill_s(gone) + 0.5
    assert bridged.decode_s(gone, 2) == COSTS.decode_s(gone) + 0.25
    expected = bridged.expected_s(1, 2, kv_modes=True, bridged=True)
    assert expected == pytest.approx(COSTS.expected_s(1, 2, kv_modes=True) + 0.5 + 4 * 2 * 0.125)


@pytest.mark.parametrize(
    ("target", "changes", "sizes"),
    [
        (1.05, {}, (1, 0)),  # 5 of 51 s saved by a block of prefill, 6 by one of decode
        (1.05, {"kv_modes": False}, (0, 1)),
        (1.05, {"shared": True}, (1, 1)),
        (1.25, {}, (1, 1)),
        (1.25, {"unit": "part"}, (1.0, 1.0)),
        (1.05, {"unit": "part"}, (0.5, 0.0)),
    ],
)
def test_the_fewest_blocks_that_reach_the_target(target, changes, sizes):
    found = sizes_for(settings(**changes), COSTS, target)
    assert sum(found) == sum(sizes)
    assert abs(found[0] - found[1]) == abs(sizes[0] - sizes[1])
    kv_modes = not changes.get("shared") and changes.get("kv_modes", True)
    assert COSTS.total_s(DENSE) / COSTS.expected_s(*found, kv_modes=kv_modes) >= target


def test_a_target_out_of_reach_is_named():
    with pytest.raises(InputError, match=r"target_speedup=50 cannot be reached: .* to give 2\.83"):
        sizes_for(settings(), COSTS, 50.0)


def test_a_target_beside_sizes_is_refused():
    with pytest.raises(InputError, match="leave out one or the other"):
        settings(target_speedup=1.2, decode_remove=1).check(4)
    settings(target_speedup=1.2).check(4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_measured_costs(tiny_model, calibration, family):
    rules = {1: KVTransfer(first=1, last=2), 2: KVTransfer(encoding="int8")}
    evaluator = Evaluator(tiny_model(family), calibration, Objective(kv_transfer=rules))
    costs = measure_costs(evaluator)
    assert costs.num_blocks == 5
    assert len(costs.prefill_parts) == len(costs.decode_parts) == 10
    assert min(*costs.prefill_parts, *costs.decode_parts, *costs.prefill_kv) > 0
    assert len(set(costs.prefill_parts)) == 2  # blocks of one window share their cost
    entries = costs.prompt_tokens if family == "llama" else min(11, costs.prompt_tokens)
    assert costs.kv_bytes == (2 * 2 * 16 * 4 * entries,) * 5
    assert costs.sent_bytes[1] == 2 * 2 * 16 * 4 * 3
    assert costs.sent_bytes[2] < costs.sent_bytes[3] == costs.kv_bytes[3]
    assert Costs.loads(costs.dumps()) == costs


def test_a_search_that_goes_on_keeps_its_costs(tmp_path):
    class Compute:
        def measure(self, function):
            assert function is measure_costs
            return COSTS

    storage = Storage(tmp_path)
    assert kept_costs(storage, Compute(), begun=False) == COSTS
    assert kept_costs(storage, None, begun=True) == COSTS
