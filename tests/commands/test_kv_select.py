"""The selection of KV turns a plan into one with transfer rules, or refuses its input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import InputError, PlanError
from rayapp.evaluation.measures.likelihood import TwoStages, likelihoods
from rayapp.models.healed import HealedWeights
from rayapp.models.loading import load_model, read_signature
from rayapp.plan import HEALED_FILE, KVTransfer, PruningPlan
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.evaluator.calibration import load_calibration
from rayapp.pruning.evaluator.naive import naive_scores
from rayapp.pruning.evaluator.objective import combine
from rayapp.pruning.kv_choice import selection as kv_selection
from rayapp.pruning.settings.objective import Objective
from rayapp.workflows.kv_select import kv_select
from tests.told import KVTold

FEW = {"first": 1, "last": (2, 0.25)}


@pytest.fixture(scope="module")
def model_path(save_tiny, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("kv"), "llama")


@pytest.fixture
def plan_dir(model_path, tmp_path) -> Path:
    plan = PruningPlan.model_validate(
        {
            "model": read_signature(model_path),
            "first_token": "decode",
            "prefill": {"blocks": {1: "kv_only", 3: "mlp_and_kv"}},
            "decode": {"blocks": {3: "removed"}},
            "kv_transfer": {2: {"first": 2, "last": 4}},
            "provenance": {"score": 1.0},
        }
    )
    return plan.save(tmp_path / "plan").parent


@pytest.fixture
def data(tmp_path) -> Path:
    answers = [("x", "a"), ("xy", "b")]
    lines = [
        {"prompt": "abcdefgh"[n % 3 :] * (4 + n), "completion": answer, "task": task}
        for n in range(6)
        for answer, task in [answers[n % 2]]
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def settings(model_path, plan_dir, data, tmp_path) -> KVTold:
    return KVTold.of(
        model=str(model_path), plan=str(plan_dir), calibration=str(data), target_reduction=3,
        out=str(tmp_path / "out"), **FEW,
    )  # fmt: skip


@pytest.mark.parametrize("encoding", ["model", "int4"])
def test_what_is_written_is_what_is_served(settings, model_path, data, encoding):
    """Score and bytes of the written plan, by the naive scorer and by the engine's ledger."""
    found = kv_select(*settings.but(encoding=encoding))
    out = settings.out
    plan, before = PruningPlan.load(out), PruningPlan.load(settings.choice.plan)
    assert plan == found.plan
    assert plan.prefill == before.prefill
    assert plan.decode == before.decode
    assert plan.first_token == "decode"
    assert plan.provenance["score"] == 1.0
    assert plan.provenance["kv_select"]["reduction"] == found.reduction >= 3
    encodings = {rule.encoding for rule in plan.kv_transfer.values()}
    assert encodings == {"model"} if encoding == "model" else encodings & {"int4", "int8"}
    loaded = load_model(model_path)
    lines = load_calibration(data, loaded.tokenizer)
    candidate = Candidate.from_plan(plan)
    [naive] = naive_scores(loaded.model, lines, Objective(first_token="decode"), [candidate])
    assert abs(found.score - naive.value) <= 1e-5 * naive.value + 1e-7
    pipeline = LocalPipeline(loaded.model, plan=plan)
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    answers = pipeline.generate([line.prompt for line in lines.lines], sampling)
    transfers = [answer.transfer for answer in answers]
    assert sum(t.bytes_full for t in transfers if t) == found.bytes_full
    # A header is padded to 64 bytes, and the engine's request ids are shorter.
    sent = sum(t.bytes_sent for t in transfers if t)
    assert found.bytes_sent - 64 * len(answers) <= sent <= found.bytes_sent


def test_the_record_holds_all_that_a_report_needs(settings):
    found = kv_select(*settings)
    record = json.loads((settings.out / "kv.json").read_text())
    assert record["complete"] is True
    assert record["previous_kv_transfer"] == {"2": {"first": 2, "last": 4, "encoding": "model"}}
    assert [row["block"] for row in record["blocks"]] == [0, 1, 2, 4]
    assert [row["block"] for row in record["mass"]] == [0, 1, 2, 4]
    for row, mass in zip(record["blocks"], record["mass"], strict=True):
        assert row["mass"] == mass["kept"]
        assert 0 < row["mass"] < 1
    trials = {tuple(map(tuple, t["kv"])): t["score"] for t in record["trials"]}
    assert trials[()] == record["score_all_sent"] == found.base_score
    assert len(trials) == found.evaluations
    alone = ((2, "1", "2", "model"),)
    assert trials[alone] == record["blocks"][2]["cut_alone"]
    assert record["trace"][-1]["score"] == record["score"] == found.score
    assert record["score"] >= min(trials.values())


def test_fewest_bytes_within_a_score(settings):
    everything = kv_select(*settings)
    base, worst = everything.base_score, everything.cut_score
    limit = base + 0.3 * (worst - base)
    found = kv_select(*settings.but(max_kl=limit, out=f"{settings.out}2"))
    assert found.score <= limit
    assert found.reduction > 5 / 4  # of the five blocks, one sends nothing anyway
    tighter = kv_select(
        *settings.but(max_kl=base + 0.05 * (worst - base), out=settings.choice.plan)
    )
    assert tighter.reduction <= found.reduction


def test_mass_cuts_the_blocks_that_concentrate(settings):
    loose = kv_select(*settings.but(method="mass", threshold=0.0, encoding="int8"))
    threshold = sorted(each.mass.kept for each in loose.blocks)[1]
    by_mass = settings.but(
        method="mass", threshold=threshold, encoding="int8", out=settings.choice.plan
    )
    found = kv_select(*by_mass)
    cut, uncut = KVTransfer(first=1, last=2, encoding="int8"), KVTransfer(encoding="int8")
    assert {each.rule for each in loose.blocks} == {cut}
    for each in found.blocks:
        assert each.rule == (cut if each.mass.kept >= threshold else uncut)
    assert {each.rule == cut for each in found.blocks} == {True, False}
    target = 0.99 * found.reduction  # some blocks must be cut for it, and not all
    budget = kv_select(*by_mass.but(target_reduction=target, out=f"{settings.out}2"))
    kept = [each.mass.kept for each in budget.blocks if each.rule == uncut]
    gone = [each.mass.kept for each in budget.blocks if each.rule == cut]
    assert budget.reduction >= target
    assert kept
    assert gone
    assert max(kept) < min(gone)


def test_in_place_keeps_what_lies_there(settings, plan_dir):
    (plan_dir / "journal.jsonl").write_text("search\n")
    before = PruningPlan.load(plan_dir)
    kv_select(*settings.but(out=None))
    assert (plan_dir / "journal.jsonl").read_text() == "search\n"
    after = PruningPlan.load(plan_dir)
    assert after.kv_transfer
    assert after.decode == before.decode


def test_a_second_selection_finds_the_scores_of_the_first(settings, monkeypatch):
    first = kv_select(*settings.but(out=None))
    asked = []
    score_many = kv_selection.Scorer.score_many

    def counted(self, candidates, *arguments, **named):
        asked.extend(candidates)
        return score_many(self, candidates, *arguments, **named)

    monkeypatch.setattr(kv_selection.Scorer, "score_many", counted)
    again = kv_select(*settings.but(out=None))
    assert asked == []
    assert again.plan.kv_transfer == first.plan.kv_transfer
    other = kv_select(*settings.but(out=None, target_reduction=2.5))
    assert len(asked) == other.evaluations - first.evaluations


def test_a_killed_selection_keeps_its_scores(settings, monkeypatch):
    undisturbed = kv_select(*settings.but(out=f"{settings.out}2"))
    write, calls = kv_selection.KVRecord.write, []

    def killed(self, **body):
        write(self, **body)
        calls.append(len(self.trials))
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(kv_selection.KVRecord, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        kv_select(*settings)
    record = json.loads((settings.out / "kv.json").read_text())
    assert record["complete"] is False
    assert len(record["trials"]) == calls[-1] > 0
    monkeypatch.setattr(kv_selection.KVRecord, "write", write)
    assert kv_select(*settings).plan.kv_transfer == undisturbed.plan.kv_transfer


def test_goals_that_cannot_be_met(settings):
    with pytest.raises(InputError, match=r"target-reduction 50 cannot be met.* reach 15\.\d+x"):
        kv_select(*settings.but(target_reduction=50))
    with pytest.raises(InputError, match=r"max-kl 0 cannot be met: the block plan alone") as raised:
        kv_select(*settings.but(max_kl=0))
    assert "kv.json keeps what was scored" in str(raised.value)
    record = json.loads((settings.out / "kv.json").read_text())
    assert len(record["trials"]) > 4
    assert not (settings.out / "plan.json").exists()


def test_bad_settings(settings, model_path, save_tiny, tmp_path):
    for wrong, needle in (
        ({"target_reduction": None}, "give either --target-reduction or --max-kl"),
        ({"target_reduction": 2.0, "max_kl": 0.1}, "give either"),
        ({"target_reduction": -1}, "target_reduction=-1"),
        ({"method": "mass", "max_kl": 0.1}, "--threshold or --target-reduction"),
        ({"first": 0, "last": (0,)}, "keeps something"),
    ):
        with pytest.raises(InputError, match=needle):
            settings.but(**wrong)
    with pytest.raises(InputError, match=r"last=.* 4% is neither a count"):
        settings.but(last=["4", "4%"])
    written = settings.but(first="0.1", last=["8", "0.5"]).choice
    assert (written.first, written.last) == (0.1, (8, 0.5))
    with pytest.raises(InputError, match=r"max_kl=0\.1 with objective=nll"):
        kv_select(*settings.but(max_kl=0.1, objective="nll"))
    other = PruningPlan(model=read_signature(save_tiny(tmp_path, "qwen2"))).save(tmp_path / "other")
    with pytest.raises(PlanError, match="another model"):
        kv_select(*settings.but(plan=str(other)))
    with pytest.raises(InputError, match="a plan already lies here"):
        kv_select(*settings.but(out=str(other.parent)))
    nothing = PruningPlan.model_validate(
        {
            "model": read_signature(model_path),
            "decode": {"blocks": dict.fromkeys(range(5), "mlp_only")},
        }
    ).save(tmp_path / "nothing")
    with pytest.raises(PlanError, match="nothing to select"):
        kv_select(*settings.but(plan=str(nothing)))
    (settings.out / "kv.json").write_text("[]")
    with pytest.raises(InputError, match="no record of a selection"):
        kv_select(*settings)


def test_the_dense_model_and_bounds_of_levels(settings, model_path, tmp_path):
    PruningPlan().save(tmp_path / "dense")
    found = kv_select(*settings.but(plan=str(tmp_path / "dense"), target_reduction=2.0))
    assert found.base_score == pytest.approx(0, abs=1e-9)
    assert math.isfinite(found.score)
    assert found.plan.model == read_signature(model_path)
    assert not (tmp_path / "out" / HEALED_FILE).exists()


def test_a_healed_plan_is_scored_and_written_with_its_tensors(settings, model_path, plan_dir, data):
    loaded = load_model(model_path)
    name = "layers.2.mlp.up_proj.weight"
    own = dict(loaded.model.get_decoder().named_parameters())[name].detach()
    weights = HealedWeights.of({"decode": {name: -own}})
    weights.save(plan_dir)
    PruningPlan.load(plan_dir).with_healed(weights.digest).save(plan_dir)
    found = kv_select(*settings)
    plan = PruningPlan.load(settings.out)
    assert plan.healed == weights.digest
    assert plan.kv_transfer == found.plan.kv_transfer
    lines, dense = load_calibration(data, loaded.tokenizer), TwoStages(loaded.model, PruningPlan())

    def score(served: PruningPlan) -> float:
        sums = likelihoods(dense, TwoStages(loaded.model, served), lines.lines)
        return combine(Objective(), lines, {i: each.kl for i, each in sums}, name="").value

    assert found.score == pytest.approx(score(plan), rel=1e-4)
    assert found.score != pytest.approx(score(plan.with_healed(None)), rel=1e-2)
