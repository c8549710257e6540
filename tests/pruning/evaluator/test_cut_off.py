"""A search on completions that are cut off: fast and naive scores agree, even on single tokens."""

from __future__ import annotations

import json
import random

import pytest

from rayapp.models.loading import load_model
from rayapp.pruning.candidates.candidate import DENSE
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.calibration import load_calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.naive import naive_scores
from rayapp.pruning.evaluator.objective import combine
from rayapp.pruning.measures.influence import measure_influence
from rayapp.pruning.settings.objective import Objective


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_scores_equal_the_naive_ones(tmp_path, save_tiny, first_token):
    loaded = load_model(save_tiny(tmp_path, "llama"))
    rows = [
        {"prompt": "hello wor", "completion": "l", "ends": False},
        {"prompt": "ab" * 30, "completion": "cde", "ends": False},
        {"prompt": "ab" * 29, "completion": "c"},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibration = load_calibration(path, loaded.tokenizer, chunk_tokens=20)
    assert [len(line.continuation) for line in calibration.lines] == [1, 3, 2]
    objective = Objective(first_token=first_token)
    evaluator = Evaluator(loaded.model, calibration, objective)
    candidate = Space(loaded.signature.num_blocks, 1, 1).draw(random.Random(4))
    sums = {}
    for number, chunk in enumerate(calibration.chunks):
        (found,) = evaluator.line_sums([candidate], number)
        sums |= dict(zip(chunk.lines, found, strict=True))
    score = combine(objective, calibration, sums, name="drawn")
    (naive,) = naive_scores(loaded.model, calibration, objective, [candidate])
    assert score.value == pytest.approx(naive.value, rel=1e-5, abs=1e-7)
    assert candidate != DENSE
    measure_influence(evaluator)  # no block's influence is missing
