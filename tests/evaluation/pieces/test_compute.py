"""What computes an evaluation multiplies as searches and the service do."""

from __future__ import annotations

import pytest
import torch

from rayapp.evaluation.paper.outcome import WeightBytes
from rayapp.evaluation.pieces.compute import Here, LocalPieces, Subject
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.sides import Sides
from rayapp.models.blocks import decoder_blocks
from rayapp.models.healed import HealedWeights
from rayapp.models.loading import load_model
from rayapp.models.products.packed import PackedLinear
from rayapp.plan import Mode, PruningPlan, StagePlan

SETTINGS = EvaluationSettings(num_runs=0)
PROJECTIONS = ("self_attn.k_proj", "self_attn.v_proj")


@pytest.fixture(scope="module", params=[False, True], ids=["head of its own", "tied head"])
def home(request, tmp_path_factory, save_tiny):
    directory = tmp_path_factory.mktemp("packed")
    return save_tiny(directory, "llama", tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def plan(home, tmp_path_factory):
    """A plan whose prefill misses a block, with healed projections of the KV that it writes."""
    loaded = load_model(home)
    layer = decoder_blocks(loaded.model)[3]
    tensors = {
        f"layers.3.{name}.weight": layer.get_submodule(name).weight + 0.25 for name in PROJECTIONS
    }
    healed = HealedWeights.of({"prefill": tensors, "decode": {}})
    found = PruningPlan(
        model=loaded.signature,
        prefill=StagePlan(blocks={3: Mode.KV_ONLY}),
        decode=StagePlan(blocks={1: Mode.REMOVED}),
    ).with_healed(healed.digest)
    directory = tmp_path_factory.mktemp("plan")
    found.save(directory)
    healed.save(directory)
    return PruningPlan.load(directory)


def used(home, plan) -> LocalPieces:
    with Here().open(Subject(home, SETTINGS)) as pieces:
        pieces.use(plan)
        return pieces


def test_products_of_both_sides_are_packed_and_say_what_plain_ones_say(home, plan):
    prompts, answers = torch.randint(256, (3, 20)), torch.randint(256, (3, 4))
    plain = Sides(load_model(home), plan, SETTINGS)
    packed = used(home, plan).measure(lambda sides: sides)
    for side in ("dense", "plan"):
        stages, others = (getattr(sides, side) for sides in (packed, plain))
        for stage in (stages.prefill, stages.decode):
            layers = [m for m in stage.model.modules() if isinstance(m, torch.nn.Linear)]
            assert not layers, "none is left plain"
        found, expected = stages.logits(prompts, answers), others.logits(prompts, answers)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    healed = packed.plan.prefill.blocks[3]
    for name in PROJECTIONS:
        layer = healed.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        torch.testing.assert_close(
            layer.weight, plain.plan.prefill.blocks[3].get_parameter(f"{name}.weight")
        )


def test_packed_weights_are_counted_as_plain_ones(home, plan):
    pieces = used(home, plan)
    model = load_model(home).model

    def size(module) -> int:
        return sum(parameter.nbytes for parameter in module.parameters())

    block, whole = decoder_blocks(model)[0], size(model)
    healed = sum(size(block.get_submodule(name)) for name in PROJECTIONS)
    kept = healed + size(block.input_layernorm)  # of the block that writes KV alone
    found = pieces.measure(WeightBytes.of)
    assert found.prefill == whole - size(block) + kept
    assert found.decode == whole - size(block)
    assert found.unified == whole + healed
