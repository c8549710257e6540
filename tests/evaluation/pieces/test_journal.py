"""The diary of an evaluation: what was measured comes back bit for bit, and nothing else does."""

from __future__ import annotations

import json

import pytest

from rayapp.data.lines import TokenizedLine
from rayapp.errors import RayappError
from rayapp.evaluation import sides
from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.measures import likelihood as measure
from rayapp.evaluation.measures.choices import Question
from rayapp.evaluation.measures.likelihood import LineLikelihood, likelihoods
from rayapp.evaluation.measures.rollouts import Opening, Rollout
from rayapp.evaluation.pieces.journal import Journal
from rayapp.evaluation.pieces.piece import Done, Piece
from rayapp.evaluation.settings import EvaluationSettings

SETTINGS = EvaluationSettings(num_runs=0, num_resamples=100)
LINE = TokenizedLine((1, 2), (3, 4), "copy")
PIECES = {
    "likelihood": (LINE, LineLikelihood(0.1 + 0.2, 1 / 3, 1e-17, 2, True, False)),
    "dense choices": (Question((1,), ((2,), (3,)), (1, 1), 0, "t"), (-0.1, -1 / 3)),
    "plan choices": (Question((1,), ((2,), (3,)), (1, 1), 0, "t"), (-0.7, -2e-9)),
    "rollouts": (Opening((1, 2), "plain"), Rollout((3, 4), (3, 5), (0.1, 1 / 7), (True, False))),
}


@pytest.mark.parametrize("kind", PIECES)
def test_values_come_back_bit_for_bit(tmp_path, kind):
    example, value = PIECES[kind]
    piece = Piece(kind, (0,), (example,))
    Journal(tmp_path / "result.json", {"plan": "a"}).add(Done(piece, (value,), 0.5))
    assert Journal(tmp_path / "result.json", {"plan": "a"}).known(piece) == (value,)


def test_another_subject_begins_anew(tmp_path, caplog):
    example, value = PIECES["likelihood"]
    piece = Piece("likelihood", (0,), (example,))
    Journal(tmp_path / "result.json", {"plan": "a"}).add(Done(piece, (value,), 0.5))
    assert Journal(tmp_path / "result.json", {"plan": "b"}).known(piece) is None
    assert "begun anew" in caplog.text
    assert Journal(tmp_path / "result.json", {"plan": "b"}).known(piece) is None


def test_a_torn_line_is_measured_again(tmp_path):
    example, value = PIECES["likelihood"]
    first, second = (Piece("likelihood", (n,), (example,) * n) for n in (1, 2))
    journal = Journal(tmp_path / "result.json", {})
    journal.add(Done(first, (value,), 0.5))
    journal.add(Done(second, (value, value), 0.5))
    file = tmp_path / "result.json.journal"
    file.write_text(file.read_text()[:-9])
    journal = Journal(tmp_path / "result.json", {})
    assert journal.known(first) == (value,)
    assert journal.known(second) is None
    journal.add(Done(second, (value, value), 0.5))
    assert Journal(tmp_path / "result.json", {}).known(second) == (value, value)


def test_an_interrupted_evaluation_goes_on_to_the_same_result(tmp_path, save_tiny, monkeypatch):
    monkeypatch.setattr(measure, "BATCH_TOKENS", 30)  # lines 1 to 3 run together
    home = save_tiny(tmp_path / "model", "llama")
    data = tmp_path / "lines.jsonl"
    lines = [{"prompt": "abc" * n, "completion": "xy"} for n in range(1, 9)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = evaluate(home, None, [data], settings=SETTINGS, out=tmp_path / "whole.json")
    calls: list[int] = []

    def dying(dense, plan, some):
        calls.append(len(some))
        if len(calls) == 4:
            raise RayappError("the machine went away")
        return likelihoods(dense, plan, some)

    monkeypatch.setattr(sides, "likelihoods", dying)
    out = tmp_path / "part.json"
    with pytest.raises(RayappError, match="went away"):
        evaluate(home, None, [data], settings=SETTINGS, out=out)
    seen: list[tuple[str, int, int]] = []
    resumed = evaluate(
        home, None, [data], settings=SETTINGS, out=out, progress=lambda *told: seen.append(told)
    )
    assert seen[0] == ("examples: likelihood", 5, 8)
    assert len(calls) == 4 + 3
    assert resumed == whole
    assert not (tmp_path / "part.json.journal").exists()
