"""Other searches' journals, settings against a rule and broken numbers: one clear error each."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rayapp.errors import InputError, SearchError
from rayapp.pruning.preparation import prepare
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.search.run import run_search
from tests.told import Told


def test_a_journal_is_not_overwritten(settings, undisturbed, search):
    with pytest.raises(InputError, match="go on with --resume"):
        search(settings)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "settings.seed: journal 0, now 1"),
        ({"objective": "nll"}, "settings.objective: journal 'kl', now 'nll'"),
        ({"decode_remove": 1.0}, "settings.decode_remove: journal 2.0, now 1.0"),
    ],
)
def test_a_journal_of_other_settings_is_refused(
    tmp_path, settings, undisturbed, changes, named, search, elsewhere
):
    (tmp_path / "journal.jsonl").write_bytes((settings.out / "journal.jsonl").read_bytes())
    with pytest.raises(InputError) as error:
        search(elsewhere(settings, tmp_path, resume=True, **changes))
    assert named in str(error.value)


def test_a_journal_of_other_data_is_refused(
    tmp_path, settings, undisturbed, write_calibration, search, elsewhere
):
    (tmp_path / "journal.jsonl").write_bytes((settings.out / "journal.jsonl").read_bytes())
    other = str(write_calibration(tmp_path / "other.jsonl", seed=1))
    with pytest.raises(InputError, match="calibration: journal"):
        search(elsewhere(settings, tmp_path, resume=True, calibration=other))


def test_an_edited_journal_is_refused(tmp_path, settings, undisturbed, search, elsewhere, journal):
    lines = journal(settings.out)
    lines[4]["trials"][0]["decode"] = [8, 9]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "journal.jsonl").write_text(text)
    with pytest.raises(SearchError, match="the journal was edited"):
        search(elsewhere(settings, tmp_path, resume=True))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"prefill_remove": 6.0}, "the model has 5 blocks"),
        ({"prefill_remove": 3.0, "kv_modes": False}, "prefill removes only what decode removes"),
        ({"prefill_remove": 0.5}, "whole blocks are removed"),
        ({"prefill_remove": 0.0, "decode_remove": 0.0}, "nothing to search"),
    ],
)
def test_sizes_that_contradict_a_rule(tmp_path, settings, changes, rule, elsewhere):
    with pytest.raises(InputError, match=rule):
        prepare(*elsewhere(settings, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_bad_settings_are_one_line_each():
    with pytest.raises(InputError) as error:
        Told.of(model="m", calibration="c", out="o", method="magic", evaluations=0)
    assert "method='magic'" in str(error.value)
    assert "evaluations=0" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_score_that_is_not_finite_ends_the_search_and_keeps_the_journal(
    tmp_path, settings, evaluator, elsewhere, journal
):
    class Broken(LocalCompute):
        def run(self, work):
            for done in super().run(work):
                bad = any(c.removed("decode") == 2 and c.prefill for c in done.work.candidates)
                sums = [tuple(float("nan") for _ in row) for row in done.sums]
                yield replace(done, sums=tuple(sums)) if bad else done

    prepared = prepare(*settings)
    scorer = Scorer(prepared.calibration, settings.score.scoring(), Broken(evaluator), weights="w")
    with pytest.raises(SearchError, match="scores nan"):
        run_search(settings.score, elsewhere(settings, tmp_path).search, scorer, prepared.signature)
    assert sum(len(line.get("trials", [])) for line in journal(tmp_path)) > 4


def test_a_model_that_is_not_finite_is_one_clear_error(
    tmp_path, settings, evaluator, elsewhere, journal
):
    class Broken(LocalCompute):
        def measure(self, function, *arguments, **options):
            found = super().measure(function, *arguments, **options)
            return replace(found, decode_blocks=(float("nan"), *found.decode_blocks[1:]))

    prepared = prepare(*settings)
    scorer = Scorer(prepared.calibration, settings.score.scoring(), Broken(evaluator), weights="w")
    with pytest.raises(SearchError, match=r"influence decode_blocks\[0\] is nan"):
        run_search(settings.score, elsewhere(settings, tmp_path).search, scorer, prepared.signature)
    assert [line["kind"] for line in journal(tmp_path)] == ["header"]
