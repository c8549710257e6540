"""What each block costs alone equals the naive scores; what is there is not measured again."""

from __future__ import annotations

import json
import math
import random

import pytest

from rayapp.data.lines import TokenizedLine
from rayapp.models.blocks import signature_of
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.evaluator.calibration import cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.naive import naive_scores
from rayapp.pruning.measures.influence import Influence, measure_influence
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.search.journal import journal_influence
from rayapp.pruning.search.sensitivity import (
    SENSITIVITY_FILE,
    Sensitivity,
    keep_influence,
    measure_sensitivity,
)
from rayapp.pruning.settings.objective import Objective
from rayapp.pruning.storage import Storage


class Counted(LocalCompute):
    """Counts the computed work; ``influences`` may get a value that is not finite."""

    def __init__(self, evaluator, *, broken: bool = False) -> None:
        super().__init__(evaluator)
        self.influences = self.candidates = 0
        self._broken = broken

    def run(self, work):
        self.candidates += sum(len(each.candidates) for each in work)
        return super().run(work)

    def measure(self, function, *arguments, **options):
        assert function is measure_influence
        self.influences += 1
        found = super().measure(function, *arguments, **options)
        return Influence((math.nan,), (), (), ()) if self._broken else found


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def calibration():
    rng = random.Random(0)
    lines = [
        TokenizedLine(
            tuple(rng.choices(range(256), k=7 + n)),
            tuple(rng.choices(range(256), k=3)),
            "ab"[n % 2],
        )
        for n in range(4)
    ]
    return cut(lines, chunk_tokens=32)


@pytest.fixture
def opened(model, calibration, tmp_path):
    """A function ``opened()`` with storage, scorer, compute, and the model's names."""
    names = {
        "weights": signature_of(model).weights_fingerprint,
        "num_blocks": signature_of(model).num_blocks,
    }

    def made(kind: str = "kl", **options):
        objective = Objective(kind=kind)
        compute = Counted(Evaluator(model, calibration, objective), **options)
        scorer = Scorer(calibration, objective, compute, weights=names["weights"])
        return Storage(tmp_path), scorer, compute, names

    return made


def test_singles_are_naive_scores(opened, model, calibration):
    storage, scorer, _, names = opened()
    seen = []
    found = measure_sensitivity(storage, scorer, on_progress=lambda *at: seen.append(at), **names)
    blocks = range(names["num_blocks"])
    asked = [
        DENSE,
        *(Candidate(prefill=(2 * b, 2 * b + 1)) for b in blocks),
        *(Candidate(decode=(2 * b, 2 * b + 1)) for b in blocks),
    ]
    naive = [s.value for s in naive_scores(model, calibration, scorer.objective, asked)]
    assert found.singles.dense == pytest.approx(naive[0], abs=1e-7)
    singles = [*found.singles.prefill, *found.singles.decode]
    assert singles == pytest.approx(naive[1:], rel=1e-5, abs=1e-7)
    assert min(singles) > 1e-6  # the model is not so redundant that any order would do
    assert found.influence == measure_influence(Evaluator(model, calibration, Objective()))
    assert found.num_lines == 4
    assert seen[-1] == (len(asked), len(asked))


def test_what_is_there_is_not_measured_again(opened):
    storage, scorer, _, names = opened()
    first = measure_sensitivity(storage, scorer, **names)
    storage, scorer, compute, names = opened()
    assert measure_sensitivity(storage, scorer, **names) == first
    assert (compute.influences, compute.candidates) == (0, 0)
    assert Sensitivity.parse(storage.read_bytes(SENSITIVITY_FILE)) == first
    storage, scorer, compute, names = opened("nll")
    other = measure_sensitivity(storage, scorer, **names)
    assert other.singles.dense > 0
    assert compute.influences == 0  # these are scores of the dense model, whatever the objective
    other_model = measure_sensitivity(storage, scorer, **{**names, "weights": "other"})
    assert compute.influences == 1
    assert other_model.weights == "other"


def test_a_search_that_has_the_influence_measures_nothing(opened):
    storage, scorer, compute, names = opened()
    line = {"kind": "influence", "prefill_blocks": [0.5], "prefill_parts": [0.5, 0.25]}
    line |= {"decode_blocks": [0.125], "decode_parts": [0.5, 0.5]}
    storage.write_bytes("journal.jsonl", b'{"kind": "header"}\n' + json.dumps(line).encode())
    keep_influence(storage, scorer, names["weights"])
    assert compute.influences == 0
    assert not storage.exists(SENSITIVITY_FILE)
    text = storage.read_text("journal.jsonl")
    assert journal_influence(text) == Influence((0.5,), (0.5, 0.25), (0.125,), (0.5, 0.5))
    storage.write_bytes("journal.jsonl", b'{"kind": "header"}\n')
    keep_influence(storage, scorer, names["weights"])
    keep_influence(storage, scorer, names["weights"])
    assert compute.influences == 1


def test_an_influence_that_is_not_finite_fails_no_search(opened):
    storage, scorer, _, names = opened(broken=True)
    keep_influence(storage, scorer, names["weights"])
    assert not storage.exists(SENSITIVITY_FILE)


def test_a_damaged_file_is_measured_anew(opened):
    storage, scorer, compute, names = opened()
    storage.write_bytes(SENSITIVITY_FILE, b"{")
    assert Sensitivity.parse(b"{") is None
    keep_influence(storage, scorer, names["weights"])
    assert compute.influences == 1
