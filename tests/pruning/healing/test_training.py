"""Which survivor takes over, against brute force; what training improves, and leaves alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from rayapp.data.lines import TokenizedLine
from rayapp.models.blocks import signature_of
from rayapp.models.fingerprints.fingerprint import canonical_name
from rayapp.models.healed import HealedWeights, attach
from rayapp.models.loading import load_model
from rayapp.models.stack import BlockStack
from rayapp.plan import STAGES, PruningPlan
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.candidates.healing import HealedUnit, Healing, Pair
from rayapp.pruning.evaluator.calibration import cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.naive import naive_scores
from rayapp.pruning.healing.healed_units import HealedUnits
from rayapp.pruning.healing.training import FROZEN, Healer
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.settings.objective import Objective
from rayapp.pruning.settings.training import Training
from rayapp.pruning.storage import Storage
from rayapp.testbed.tasks import TASKS, generate

BLOCKS = 7
ALL = Healing.of_all(BLOCKS)


def removing(prefill=(), decode=()):
    return Candidate(*(tuple(p for b in s for p in (2 * b, 2 * b + 1)) for s in (prefill, decode)))


def most_healed(removed, healable):
    """Brute force for the most removed blocks that can have neighbours of their own."""
    free = [set(range(BLOCKS)) - set(removed)]
    choices = [[None, b - 1, b + 1] for b in removed if b in healable]
    counts = [
        len(used)
        for picked in itertools.product(*choices)
        if len(used := [p for p in picked if p is not None]) == len({*used} & free[0])
    ]
    return max(counts)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_as_many_are_healed_as_can_be(size):
    for removed in itertools.combinations(range(BLOCKS), size):
        for healable in (frozenset(range(BLOCKS)), frozenset({0, 2, 3, 5})):
            healing = Healing(BLOCKS, healable, healable)
            pairs = healing.stage_pairs(removing(decode=removed), "decode")
            assert len(pairs) == most_healed(removed, healable)
            survivors = [pair.survivor for pair in pairs]
            assert len({*survivors}) == len(survivors)
            assert not {*survivors} & {*removed}
            assert {pair.removed for pair in pairs} <= {*removed} & healable
            assert all(abs(pair.removed - pair.survivor) == 1 for pair in pairs)


def test_the_next_block_survives_or_else_the_one_before():
    def named(candidate):
        return [str(pair) for pair in ALL.pairs(candidate)]

    assert named(removing(decode=[3])) == ["decode 3 into 4"]
    assert named(removing(decode=[3, 4])) == ["decode 3 into 2", "decode 4 into 5"]
    assert named(removing(decode=[2, 3, 4])) == ["decode 2 into 1", "decode 4 into 5"]
    assert named(removing([6], [0])) == ["decode 0 into 1", "prefill 6 into 5"]
    assert named(removing(decode=[1, 3])) == ["decode 1 into 2", "decode 3 into 4"]
    assert named(Candidate((), (4, 5, 6))) == ["decode 2 into 1"]  # block 3 runs its MLP only
    assert not named(DENSE)
    assert not Healing().pairs(removing(decode=[3]))


def test_marks_tell_pairs_apart():
    skips = ALL.skips(removing(decode=[3, 4]), "decode", BLOCKS)
    assert skips == (0, 0, 8, 3, 3, 4, 0)
    assert Pair.of_mark("decode", 2, 8) == Pair("decode", 3, 2)
    assert Pair.of_mark("decode", 5, 4) == Pair("decode", 4, 5)
    fixed = Healing(fixed=(Pair("decode", 3, 4),))
    assert fixed.pairs(removing(decode=[3])) == (Pair("decode", 3, 4),)


def altered(model, pair, scale=1.3):
    """A pair that counts as trained: every trainable parameter of the survivor, scaled."""
    tensors = {
        canonical_name(name): p.detach() * scale
        for name, p in model.named_parameters()
        if f"layers.{pair.survivor}." in name and not any(f"{part}." in name for part in FROZEN)
    }
    return HealedUnit(pair, tensors, 1.0, 0.5)


class Altering(LocalCompute):
    """Stands in for training, and counts its calls."""

    def __init__(self, evaluator):
        super().__init__(evaluator)
        self.trained = []

    def heal(self, pairs):
        for pair in pairs:
            self.trained.append(pair)
            yield altered(self._evaluator.runner.model, pair)


def scorer_of(evaluator, directory, compute=None):
    compute = compute or Altering(evaluator)
    healed = HealedUnits(Storage(directory), {"data": "d"}, compute)
    scorer = Scorer(evaluator.calibration, evaluator.objective, compute, weights="w", healed=healed)
    scorer.heal_with(Healing.of_all(5))
    return scorer


CANDIDATES = [
    DENSE,
    removing([1], [1]),
    removing([2], []),
    removing([2, 4], [2, 3]),
    removing([3, 4], [0, 4]),
]


@pytest.mark.parametrize(
    ("family", "first_token"),
    [
        ("llama", "prefill"),
        pytest.param("mistral", "decode", marks=pytest.mark.slow),
        ("qwen2", "decode"),
        pytest.param("qwen3", "prefill", marks=pytest.mark.slow),
    ],
)
def test_reuse_equals_the_naive_score(tiny_model, few, tmp_path, family, first_token):
    model, objective = tiny_model(family), Objective(first_token=first_token)
    healing = Healing.of_all(5)

    def weights_of(candidate):
        stages = {
            stage: {
                n: t
                for pair in healing.stage_pairs(candidate, stage)
                for n, t in altered(model, pair).tensors.items()
            }
            for stage in STAGES
        }
        return HealedWeights.of(stages) if any(stages.values()) else None

    wanted = naive_scores(model, few, objective, CANDIDATES, weights_of)
    for cache_bytes in (1 << 30, 60_000):
        evaluator = Evaluator(model, few, objective, cache_bytes=cache_bytes)
        scorer = scorer_of(evaluator, tmp_path / str(cache_bytes))
        found = scorer.score_many(CANDIDATES)
        for got, want in zip(found, wanted, strict=True):
            assert abs(got.value - want.value) <= 1e-5 * want.value + 1e-7
    scorer.heal_with(Healing())  # the same memo and cache: no healed state may come from there
    for plain, got in zip(scorer.score_many(CANDIDATES)[1:], found[1:], strict=True):
        assert abs(got.value - plain.value) > 1e-3


def test_healed_blocks_count_as_whole_forwards(tiny_model, calibration, tmp_path):
    one = cut(calibration.lines[-1:])
    evaluator = Evaluator(tiny_model("llama"), one, Objective(), cache_bytes=0)
    scorer = scorer_of(evaluator, tmp_path)
    evaluator.line_sums([], 0)
    evaluator.forwards = 0.0
    scorer.score_many([removing([], [2])])
    prompt, answer = len(one.lines[0].prompt), len(one.lines[0].continuation) - 1
    assert evaluator.forwards == 2 * 5 * (prompt + answer) - answer  # the reference is dense


@pytest.fixture(scope="module")
def lines(calibration):
    return [*calibration.lines, *calibration.lines[::-1]]


QUICK = Training(steps=40, learning_rate=3e-3, step_tokens=64)
PAIRS = [Pair(s, *b) for s in STAGES for b in ((1, 2), (2, 1))]


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_training_helps_and_leaves_keys_and_values_alone(tiny_model, lines, family):
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    healer = Healer(model, lines, training=QUICK)
    for pair in PAIRS:
        healed = healer.heal(pair)
        assert healed.loss_after < 0.9 * healed.loss_before
        block = f"layers.{pair.survivor}."
        all_names = {canonical_name(n) for n in before if block in n}
        frozen = {n for n in all_names if any(f"{part}." in n for part in FROZEN)}
        assert len(frozen) == (4 if family == "qwen3" else 3)
        assert set(healed.tensors) == all_names - frozen
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_loss_is_that_of_the_plan_that_serves_it(tiny_model, lines, pair):
    """The held-back loss equals that of the model's own forward with the serving stack, line by
    line.
    """
    model = tiny_model("llama")
    healed = Healer(model, lines, training=QUICK).heal(pair)
    weights = healed.weights
    plan = PruningPlan(model=signature_of(model), healed=weights.digest)
    attach(model, weights)
    for which, served in (("loss_before", PruningPlan()), ("loss_after", plan)):
        stack = BlockStack(model, served, pair.stage)
        error = size = 0.0
        for line in lines[7::8]:
            found, wanted = span(model, stack, pair, line)
            error += float((found - wanted).square().sum())
            size += float(wanted.square().sum())
        assert error / size == pytest.approx(getattr(healed, which), rel=1e-4)


class Prefixed:
    """Decode's cache for one block: the dense prompt KV, then new entries."""

    def __init__(self, prefix=None):
        self.prefix = prefix

    def update(self, keys, values, block):
        if self.prefix is None:
            self.written = (keys, values)
            return keys, values
        return torch.cat([self.prefix[0], keys], 2), torch.cat([self.prefix[1], values], 2)


@torch.no_grad()
def span(model, stack, pair, line):
    """The survivor's output for the span's input on one line, and the dense span's output."""
    ids = torch.tensor([[*line.prompt, *line.continuation[:-1]]])
    states = model(ids, output_hidden_states=True).hidden_states
    num_prompt, dense = len(line.prompt), BlockStack(model, PruningPlan(), "prefill")
    prefill = pair.stage == "prefill"
    at = slice(0, num_prompt) if prefill else slice(num_prompt, None)
    cache = Prefixed()
    if not prefill:
        positions = torch.arange(num_prompt)[None]
        j = pair.survivor
        dense.run(states[j][:, :num_prompt], positions, cache, start=j, stop=j + 1)
        cache = Prefixed(cache.written)
    entering, leaving = states[pair.first][:, at], states[pair.last + 1][:, at]
    positions = torch.arange(ids.shape[1])[None, at]
    mask = None
    if not prefill:
        steps = torch.arange(entering.shape[1])
        new = steps[:, None] >= steps[None]
        mask = torch.cat([torch.ones(len(steps), num_prompt, dtype=torch.bool), new], 1)[None, None]
    j = pair.survivor
    found = stack.run(entering, positions, cache, {j: mask}, start=j, stop=j + 1)
    return found, leaving


def test_training_repeats_bit_for_bit(tiny_model, lines):
    model, pair = tiny_model("llama"), Pair("decode", 2, 1)
    first, second = (Healer(model, lines, training=QUICK).heal(pair) for _ in range(2))
    assert first.weights.digest == second.weights.digest
    healer = Healer(model, lines, training=QUICK, cache_bytes=0)
    healer.heal(Pair("decode", 1, 2))
    assert healer.heal(pair).weights.digest == first.weights.digest


@pytest.mark.parametrize("rate", [5.0, 1e30])
def test_a_survivor_that_gets_no_better_stays_as_it_was(tiny_model, lines, rate):
    model, pair = tiny_model("llama"), Pair("prefill", 1, 2)
    wild = Training(steps=3, learning_rate=rate)
    healed = Healer(model, lines, training=wild).heal(pair)
    assert healed.loss_after == healed.loss_before
    own = {canonical_name(name): p for name, p in model.named_parameters()}
    assert all(torch.equal(t, own[name]) for name, t in healed.tensors.items())


def test_bfloat16_models_are_trained_in_float32_and_judged_as_they_will_run(tiny_model, lines):
    model, pair = tiny_model("llama").to(torch.bfloat16), Pair("decode", 1, 2)
    healed = Healer(model, lines, training=QUICK).heal(pair)
    assert {tensor.dtype for tensor in healed.tensors.values()} == {torch.bfloat16}
    assert healed.loss_after < 0.9 * healed.loss_before


def draw_testbed(tokenizer, split, per_task):
    found = [
        TokenizedLine(
            tuple(tokenizer(e.prompt)["input_ids"]),
            (*tokenizer(e.completion)["input_ids"], tokenizer.eos_token_id),
            e.task,
        )
        for task in TASKS
        for e in generate(task, split, per_task, seed=0, length="short")
    ]
    return [found[i] for start in range(per_task) for i in range(start, len(found), per_task)]


@pytest.mark.slow
def test_the_shipped_model_loses_far_less_where_it_is_healed(testbed_path, tmp_path):
    loaded = load_model(testbed_path, dtype="float32")
    healer = Healer(loaded.model, draw_testbed(loaded.tokenizer, "heal", 32))
    calibration = cut(draw_testbed(loaded.tokenizer, "validation", 16))
    evaluator = Evaluator(loaded.model, calibration, Objective())
    compute = LocalCompute(evaluator, healer)
    healed = HealedUnits(Storage(tmp_path), {}, compute)
    scorer = Scorer(calibration, Objective(), compute, weights="w", healed=healed)
    candidates = [removing(decode=[2, 4]), removing(prefill=[3, 6])]
    plain = [score.value for score in scorer.score_many(candidates)]
    scorer.heal_with(Healing.of_all(12))
    pairs = {pair for candidate in candidates for pair in scorer.units(candidate)}
    scores = [score.value for score in scorer.score_many(candidates)]
    assert len(pairs) == 4
    for pair in pairs:
        record = healed.record(pair)
        assert record["relative_mse_after"] < 0.5 * record["relative_mse_before"]
    for healthy, bare in zip(scores, plain, strict=True):
        assert healthy < 0.2 * bare
