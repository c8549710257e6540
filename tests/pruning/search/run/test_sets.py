"""Searches within a set: one for both stages, or the blocks that alone do little."""

from __future__ import annotations

import pytest

from rayapp.errors import InputError
from rayapp.pruning.candidates.candidate import Candidate


def test_one_set_for_both_stages(tmp_path, settings, search, elsewhere):
    sizes = {"prefill_remove": 2.0, "decode_remove": 2.0, "shared": True}
    whole = {"method": "exhaustive", "evaluations": None}
    result, _ = search(elsewhere(settings, tmp_path, **sizes, **whole))
    assert len(result.trials) == 1 + 10
    assert all(trial.candidate.prefill == trial.candidate.decode for trial in result.trials)
    best = min(result.trials[1:], key=lambda trial: trial.score.value).candidate
    assert Candidate.from_plan(result.plan) == best
    annealed, _ = search(elsewhere(settings, tmp_path / "a", **sizes, evaluations=10))
    assert annealed.plan.fingerprint == result.plan.fingerprint


def test_only_the_pruning_set_is_removed(
    tmp_path, settings, undisturbed, search, elsewhere, journal
):
    influence = next(line for line in journal(settings.out) if line["kind"] == "influence")
    stages = (influence["prefill_blocks"], influence["decode_blocks"])
    threshold = 1 - max(sorted(values)[2] for values in stages)  # at least three blocks each
    sets = [{b for b, v in enumerate(values) if 1 - v >= threshold} for values in stages]
    assert min(map(len, sets)) < 5
    changes = {"pruning_set": True, "distillation_threshold": threshold}
    result, _ = search(elsewhere(settings, tmp_path, **changes))
    for trial in result.trials:
        prefill, decode = trial.candidate.labels("prefill"), trial.candidate.labels("decode")
        assert {int(b) for b in prefill} <= sets[0]
        assert {int(b) for b in decode} <= sets[1]
    with pytest.raises(InputError, match="only 0 blocks of prefill may be removed"):
        search(elsewhere(settings, tmp_path / "b", pruning_set=True, distillation_threshold=1.0))
