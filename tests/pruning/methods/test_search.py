from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from rayapp.data.lines import TokenizedLine
from rayapp.errors import InputError
from rayapp.models.loading import load_model
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.calibration import cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.naive import naive_scores
from rayapp.pruning.measures.influence import Influence
from rayapp.pruning.methods.annealing import Annealing
from rayapp.pruning.methods.exhaustive import Exhaustive
from rayapp.pruning.methods.method import SearchMethod, Setup
from rayapp.pruning.methods.similarity import Similarity
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.settings.objective import Objective
from rayapp.testbed import tasks

FLAT = Influence((0.5,) * 6, (0.5,) * 12, (0.5,) * 6, (0.5,) * 12)


def synthetic(candidate: Candidate) -> float:
    """A rugged score with interactions inside and between the stages."""
    value = 0.1
    for part in candidate.prefill:
        value += (part * 7 % 5) / 10
    for part in candidate.decode:
        value += (part * 5 % 7) / 8
    pairs = itertools.combinations(candidate.prefill, 2)
    value += sum((3 * a + b) % 4 for a, b in pairs) / 20
    return value + len(set(candidate.prefill) & set(candidate.decode)) / 15


def drive(method: SearchMethod, score: Callable[[Candidate], float]) -> Iterator[list[Candidate]]:
    """Ask and tell to the end, and yield every generation."""
    while (asked := method.ask()) is not None:
        before = method.evaluations_left
        assert 0 < len(asked.candidates) <= before
        yield list(asked.candidates)
        method.tell([score(candidate) for candidate in asked.candidates])
        assert method.evaluations_left <= before - len(asked.candidates)
    assert method.evaluations_left == 0


SPACES = [
    Space(6, 2, 2),
    Space(6, 1, 3, kv_modes=False),
    Space(6, 2, 2, kv_modes=False),
    Space(6, 0, 2),
    Space(6, 3, 0),
    Space(6, 1.5, 1, "part"),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_annealing_keeps_its_budget_and_beats_chance(space):
    budget = 60
    setup = Setup(space, budget, 8, seed=3, influence=FLAT)
    generations = list(drive(Annealing(setup), synthetic))
    asked = [c for generation in generations for c in generation]
    assert len(asked) == len(set(asked)) <= budget
    assert all(generation == sorted(generation) for generation in generations)
    truth = sorted(synthetic(c) for c in space)
    best = min(synthetic(c) for c in asked if c in space)
    assert best <= truth[len(truth) // 50]


def test_annealing_depends_on_seed_and_scores_alone():
    def run(seed: int) -> list[list[Candidate]]:
        setup = Setup(Space(6, 2, 2), 60, 8, seed=seed, influence=FLAT)
        return list(drive(Annealing(setup), synthetic))

    assert run(0) == run(0)
    assert run(0) != run(1)


@pytest.mark.parametrize(
    ("space", "phases"),
    [
        (Space(6, 2, 2), ["decode", "prefill", "joint"]),
        (Space(6, 1, 2, kv_modes=False), ["decode", "prefill", "joint"]),
        (Space(6, 0, 2), ["decode"]),
        (Space(6, 2, 0), ["prefill"]),
    ],
)
def test_annealing_couples_the_stages_at_the_end(space, phases):
    method = Annealing(Setup(space, 60, 4, seed=0, influence=FLAT))
    seen: dict[str, list[Candidate]] = {}
    while (asked := method.ask()) is not None:
        seen.setdefault(asked.phase, []).extend(asked.candidates)
        method.tell([synthetic(candidate) for candidate in asked.candidates])
    assert list(seen) == phases
    assert all(candidate in space for candidate in seen[phases[-1]])
    if "joint" in phases and space.kv_modes:
        best = [
            min(seen[phase], key=lambda c: (synthetic(c), c)) for phase in ("decode", "prefill")
        ]
        assert Candidate(best[1].prefill, best[0].decode) in seen["joint"]
        assert not any(candidate.prefill for candidate in seen["decode"])
        assert not any(candidate.decode for candidate in seen["prefill"])


def test_annealing_finishes_a_space_that_is_smaller_than_its_budget():
    space = Space(6, 0, 1)
    asked = [c for g in drive_loose(Annealing(Setup(space, 50, 4, 0, FLAT))) for c in g]
    assert sorted(asked) == list(space)


def drive_loose(method: SearchMethod) -> Iterator[list[Candidate]]:
    while (asked := method.ask()) is not None:
        yield list(asked.candidates)
        method.tell([synthetic(candidate) for candidate in asked.candidates])


def test_similarity_removes_the_least_influential_units_per_stage():
    influence = Influence(
        prefill_blocks=(9, 1, 8, 2, 7, 3),
        prefill_parts=(9,) * 5 + (0.5,) + (9,) * 6,
        decode_blocks=(1, 9, 9, 9, 0.5, 9),
        decode_parts=(1,) * 12,
    )

    def choice(space: Space) -> Candidate:
        [[candidate]] = drive(Similarity(Setup(space, None, 8, 0, influence)), synthetic)
        return candidate

    assert choice(Space(6, 2, 2)) == Candidate((2, 3, 6, 7), (0, 1, 8, 9))
    assert choice(Space(6, 1, 2, kv_modes=False)) == Candidate((8, 9), (0, 1, 8, 9))
    assert choice(Space(6, 0.5, 0, "part")) == Candidate((5,), ())


def test_exhaustive_asks_for_everything_once():
    space = Space(6, 1, 2)
    generations = list(drive(Exhaustive(Setup(space, None, 8, 0)), synthetic))
    assert [c for generation in generations for c in generation] == list(space)
    with pytest.raises(InputError, match="all 90 candidates, but at most 89"):
        Exhaustive(Setup(space, 89, 8, 0))
    with pytest.raises(InputError, match="choose another method"):
        Exhaustive(Setup(Space(32, 8, 8), None, 8, 0))


def _minimum(scorer: Scorer, space: Space) -> tuple[float, Candidate]:
    method = Exhaustive(Setup(space, None, 16, 0))
    told = []
    while (asked := method.ask()) is not None:
        scores = [score.value for score in scorer.score_many(asked.candidates)]
        told += zip(scores, asked.candidates, strict=True)
        method.tell(scores)
    return min(told)


def test_exhaustive_finds_the_true_minimum_of_two_blocks(tiny_model, calibration):
    model = tiny_model("llama")
    few = cut(calibration.lines[:3])
    evaluator = Evaluator(model, few, Objective())
    scorer = Scorer(few, Objective(), LocalCompute(evaluator), weights="w")
    score, best = _minimum(scorer, Space(5, 0, 2))
    pairs = [
        Candidate((), (2 * i, 2 * i + 1, 2 * j, 2 * j + 1))
        for i, j in itertools.combinations(range(5), 2)
    ]
    brute = naive_scores(model, few, Objective(), pairs)
    assert best == pairs[min(range(10), key=lambda i: brute[i].value)]
    assert score == pytest.approx(min(b.value for b in brute), rel=1e-5)


@pytest.mark.slow
def test_exhaustive_finds_the_true_minimum_on_the_testbed(testbed_path):
    """The search meets the minimum of all 66 pairs; the brute force runs its own masked models."""
    loaded = load_model(testbed_path, dtype="float32")
    examples = [
        e for t in tasks.TASKS for e in tasks.generate(t, "calibration", 1, 7, length="short")
    ]
    lines = [
        TokenizedLine(
            tuple(loaded.tokenizer(e.prompt)["input_ids"]),
            (*loaded.tokenizer(e.completion)["input_ids"], loaded.tokenizer.eos_token_id),
            e.task,
        )
        for e in examples
    ]
    few = cut(lines)
    scorer = Scorer(
        few, Objective(), LocalCompute(Evaluator(loaded.model, few, Objective())), weights="w"
    )
    score, best = _minimum(scorer, Space(12, 0, 2))
    dense = [_masked_logprobs(loaded.model, line, ()) for line in lines]
    pairs = itertools.combinations(range(12), 2)
    brute = {pair: _masked_score(loaded.model, lines, dense, pair) for pair in pairs}
    true = min(brute, key=lambda pair: (brute[pair], pair))
    assert Candidate((), tuple(p for b in true for p in (2 * b, 2 * b + 1))) == best
    assert score == pytest.approx(brute[true], rel=1e-5, abs=1e-7)


def _masked_score(
    model, lines: list[TokenizedLine], dense: list[torch.Tensor], removed: tuple[int, ...]
) -> float:
    by_task: dict[str, list[torch.Tensor]] = {}
    for line, reference in zip(lines, dense, strict=True):
        plan = _masked_logprobs(model, line, removed)
        kl = (reference.exp() * (reference - plan)).sum(-1)
        by_task.setdefault(line.task, []).append(kl)
    return sum(float(torch.cat(values).mean()) for values in by_task.values()) / len(by_task)


@torch.inference_mode()
def _masked_logprobs(model, line: TokenizedLine, removed: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities of one plain forward; ``removed`` blocks pass the continuation through."""
    ids, split = torch.tensor([[*line.prompt, *line.continuation[:-1]]]), len(line.prompt)

    def skip(_module, inputs, output):
        passed = output.clone()
        passed[:, split:] = inputs[0][:, split:]
        return passed

    hooks = [model.model.layers[block].register_forward_hook(skip) for block in removed]
    logits = model(ids).logits[0, split - 1 :]
    for hook in hooks:
        hook.remove()
    return logits.double().log_softmax(-1)
