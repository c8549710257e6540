"""The recipe: same steps however they are shared out, resumable, exported as it was trained."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayapp.errors import InputError
from rayapp.testbed.card import SCORED_LENGTHS, Measurement, write_card
from rayapp.testbed.export import export_checkpoint, llama_model
from rayapp.testbed.muon import Exchange, Optimizer, orthogonalize
from rayapp.testbed.network import Shape, initial_weights, logits_at
from rayapp.testbed.recipe import Phase, Recipe
from rayapp.testbed.rows import KINDS, draw_batch, draw_row, standard_library_text
from rayapp.testbed.score import score
from rayapp.testbed.tasks import TASKS, Example, generate
from rayapp.testbed.tokens import END_ID, PAD_ID, byte_tokenizer
from rayapp.testbed.train import (
    Pace,
    Trainer,
    argmax_matches,
    load_checkpoint,
    start_run,
    train,
)

SHAPE = Shape(num_blocks=2, hidden=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp=48)
RECIPE = Recipe(
    num_steps=6,
    decay_steps=2,
    warmup_steps=2,
    tokens_per_shard=120,
    phases=(Phase(0, {40: 1.0}), Phase(3, {40: 1.0, 60: 1.0})),
    shape=SHAPE,
)
PACE = Pace(log_every=2, evaluate_every=100, checkpoint_every=3, num_examples=1)


@pytest.fixture
def weights():
    drawn = initial_weights(SHAPE, 0)
    generator = torch.Generator().manual_seed(1)
    for name in ("o_proj", "down_proj"):
        drawn[name].data.normal_(generator=generator).mul_(0.2)
    return drawn


def test_network_equals_the_exported_llama(weights) -> None:
    ids_BT = torch.randint(0, 258, (3, 50), generator=torch.Generator().manual_seed(0))
    everything = torch.ones_like(ids_BT, dtype=torch.bool)
    with torch.no_grad():
        ours = logits_at(weights, ids_BT, everything, SHAPE, torch.float32).view(3, 50, -1)
        theirs = llama_model(weights, SHAPE)(ids_BT).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_export_rounds_to_bf16_and_nothing_else(weights, tmp_path: Path) -> None:
    export_checkpoint(weights, SHAPE, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = llama_model(weights, SHAPE).to(torch.bfloat16).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_score_equals_teacher_forced_matching(weights) -> None:
    model = llama_model(weights, SHAPE)
    tokenizer = byte_tokenizer(SHAPE.max_positions)
    asked = [example for task in TASKS for example in generate(task, "test", 2, 0, length="short")]
    for example in (answered(model, example) for example in asked):
        greedy = score(model, tokenizer, [example])
        assert argmax_matches(weights, RECIPE, [example], torch.float32) == [greedy == 1]


def answered(model, example: Example) -> Example:
    """The example with the model's own greedy answer, cut where it ends or after four bytes."""
    ids = torch.tensor([list(example.prompt.encode())])
    output = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=END_ID)
    own = [token for token in output[0, ids.shape[1] :].tolist() if token < 128]
    return dataclasses.replace(example, completion=bytes(own).decode() or "x")


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    stack = torch.randn(3, 48, 32, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(stack).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_optimizer_moves_every_weight(weights) -> None:
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    gradients = {name: torch.randn_like(weight) for name, weight in weights.items()}
    Optimizer(0.02, 3e-3, 0.05).update(weights, gradients, 1.0, Exchange())
    assert all(not torch.equal(weights[name], before[name]) for name in weights)


def test_rows_are_prompts_answers_and_end_markers() -> None:
    ids, kinds = draw_row(random.Random(0), 300, (100, 200), dict.fromkeys(TASKS, 1.0))
    text = bytes(int(token) for token in ids if token < END_ID).decode()
    context, _, rest = text.partition("\n")
    end = int(np.flatnonzero(ids == END_ID)[0])
    first = bytes(ids[:end].astype(np.uint8)).decode()
    assert first.startswith(f"{context}\n{rest.split('?')[0]}?\n")
    answer = bytes(ids[(kinds > 0)][: end - int(np.flatnonzero(kinds)[0])].astype(np.uint8))
    assert first.endswith(answer.decode())
    assert set(kinds[ids == END_ID]) <= {1, 2, 3, 4}
    assert not kinds[ids == PAD_ID].any()
    assert set(kinds.tolist()) == {0, 1, 2, 3, 4}
    assert 92 <= len(context) <= 200


def test_batches_repeat_and_mark_text() -> None:
    text = standard_library_text(held_out=False)
    assert not set(KINDS) - {*TASKS, "text"}
    mix = dict.fromkeys(TASKS, 1.0)
    one, other = (draw_batch(random.Random(3), 60, (16, 40), 600, mix, text, 0.5) for _ in range(2))
    assert torch.equal(one.inputs_BT, other.inputs_BT)
    assert one.inputs_BT.shape == one.targets_BT.shape == one.kinds_BT.shape == (10, 60)
    is_text = (one.kinds_BT == 5).all(dim=1)
    assert 0 < is_text.sum() < 10
    assert torch.equal(one.inputs_BT[:, 1:], one.targets_BT[:, :-1])


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path, monkeypatch) -> None:
    whole = train(start_run(RECIPE), tmp_path / "whole", num_ranks=1, pace=PACE)
    take_step = Trainer.step

    def die_after_four_steps(trainer: Trainer) -> None:
        if trainer.run.step == 4:
            raise KeyboardInterrupt
        take_step(trainer)

    monkeypatch.setattr(Trainer, "step", die_after_four_steps)
    with pytest.raises(KeyboardInterrupt):
        train(start_run(RECIPE), tmp_path / "cut", num_ranks=1, pace=PACE)
    monkeypatch.undo()
    saved = load_checkpoint(tmp_path / "cut", RECIPE)
    assert saved.step == 3
    resumed = train(saved, tmp_path / "cut", num_ranks=1, pace=PACE)
    assert whole.step == resumed.step == RECIPE.num_steps
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name


@pytest.mark.slow
def test_a_time_limit_brings_the_decay_forward(tmp_path: Path) -> None:
    pace = dataclasses.replace(PACE, minutes=0.0)
    run = train(start_run(RECIPE), tmp_path, num_ranks=1, pace=pace)
    assert run.step == run.recipe.num_steps == 4
    assert run.recipe.decay_steps == RECIPE.decay_steps


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    alone = train(start_run(RECIPE), tmp_path / "alone", num_ranks=1, pace=PACE)
    shared = train(start_run(RECIPE), tmp_path / "shared", num_ranks=2, pace=PACE)
    for name, weight in alone.weights.items():
        torch.testing.assert_close(weight, shared.weights[name], atol=0.02, rtol=0)


def test_the_card_tells_recipe_and_scores(tmp_path: Path) -> None:
    shares = {(task, length): 0.5 for task in TASKS for length in SCORED_LENGTHS}
    shares["sort", "long"] = 0.98765
    run = start_run(RECIPE)
    run.step, run.seconds = 6, 1234.0
    write_card(tmp_path, run, Measurement(shares, 2000, 0, 1.5, 65536))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n")
    for fact in (
        "| sort | 0.5000 | 0.9877 |",
        "2,000 examples",
        "6 steps",
        "1,234 s",
        "1.500 nats",
    ):
        assert fact in " ".join(card.split())
    for task in TASKS:
        assert generate(task, "test", 1, 0, length="short")[0].prompt in card


def test_rates_rise_stay_and_fall() -> None:
    phases = (
        Phase(0, {48: 1.0}),
        Phase(200, {48: 1.0}, last_rate=0.5),
        Phase(500, {48: 1.0}, rate=0.5),
    )
    recipe = Recipe(num_steps=1000, decay_steps=400, warmup_steps=10, phases=phases)
    assert recipe.rate_at(0) == pytest.approx(0.1)
    assert recipe.rate_at(199) == 1
    assert recipe.rate_at(350) == pytest.approx(0.75)
    assert recipe.rate_at(800) == pytest.approx(0.25)
    assert recipe.rate_at(999) == pytest.approx(1 / 800)


def test_phases_say_how_much_of_a_row_is_records() -> None:
    phase = Phase(0, {48: 1.0, 520: 1.0}, contexts={520: (300, 478)})
    assert phase.context_of(520) == (300, 478)
    assert phase.context_of(48) == (16, 34)
    assert Recipe().phase_at(10**6) == Recipe().phases[-1]


def test_unusable_recipes_are_refused() -> None:
    with pytest.raises(InputError, match="task_mix"):
        Recipe(task_mix={"add": 1.0})
    with pytest.raises(InputError, match="num_steps=10"):
        Recipe(num_steps=10)
