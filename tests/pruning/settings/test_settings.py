"""The three settings: what records say of them, what help says of them, and what they load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rayapp.errors import InputError
from rayapp.plan import KVTransfer, PruningPlan, VisualTokens
from rayapp.pruning.kv_choice.settings import KVSelectSettings
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.objective import Objective
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings
from rayapp.pruning.settings.training import Training
from rayapp.settings import filled
from tests.told import Told

ROOT = Path(__file__).parents[3]
KINDS = (ScoreSettings, ComputeSettings, SearchSettings, KVSelectSettings)

DEFAULTS = {
    "prefill_remove": 0.0, "decode_remove": 0.0, "target_speedup": None, "pareto": False,
    "unit": "block", "kv_modes": True, "shared": False, "pruning_set": False,
    "distillation_threshold": 0.95, "method": "surrogate", "score_by": "task", "objective": "kl",
    "kl_top_k": 0, "racing": False, "first_token": "prefill", "kv_transfer": {},
    "evaluations": None, "generation_size": 8, "seed": 0, "dtype": "auto", "chunk_tokens": 4096,
}  # fmt: skip
"""Settings of a journal from before there were three groups; such journals must still go on."""


def identity(told: Told) -> dict[str, object]:
    return {**told.search.identity, **told.score.identity}


def test_journals_keep_their_settings():
    plain = Told.of(model="m", calibration="c", out="o")
    assert identity(plain) == DEFAULTS
    told = plain.but(
        heal="all", heal_data="h", visual_tokens="64", kv_transfer={1: {"first": 1}},
        device="cuda", threads=3, workers=2, resume=True, cache_bytes=1,
    )  # fmt: skip
    rule = {"method": "trimtokenator", "num_aligned": None, "num_keep": 64}
    assert identity(told) == DEFAULTS | {
        "heal": "all", "heal_steps": 100, "heal_learning_rate": None,
        "kv_transfer": {"1": {"first": 1, "last": None, "encoding": "model"}},
        "visual_tokens": {**rule, "positions": "original", "sharing": "equal"},
    }  # fmt: skip
    assert told.compute.environment == {"device": "cuda", "threads": 3}
    assert identity(plain.but(revision="v1")) == DEFAULTS | {"revision": "v1"}


def test_selections_keep_their_settings():
    score = ScoreSettings(model="m", calibration="c")
    choice = KVSelectSettings(plan="p", target_reduction=4.95)
    was = {
        "target_reduction": 4.95, "max_kl": None, "encoding": "model", "method": "elimination",
        "threshold": None, "first": 4, "recent": [0.03125, 0.0625, 0.125, 0.25, 0.5, 0.75],
        "score_by": "task", "generation_size": 8, "seed": 0, "chunk_tokens": 4096,
    }  # fmt: skip
    assert choice.identity(score) == was
    other = score.model_copy(update={"dtype": "float32", "kl_top_k": 8})
    assert choice.identity(other) == was | {"dtype": "float32", "kl_top_k": 8}


def test_an_objective_and_a_training():
    told = Told.of(
        model="m", calibration="c", out="o", objective="nll", score_by="token", kl_top_k=4,
        first_token="decode", kv_transfer={2: {"last": 0.5}}, heal_steps=3,
    )  # fmt: skip
    assert told.score.scoring() == Objective("nll", "token", "decode", {2: KVTransfer(last=0.5)}, 4)
    assert told.search.training() == Training(steps=3)
    plan = PruningPlan()
    followed = told.but(visual_tokens="3").score.following(plan)
    assert (followed.first_token, followed.visual_tokens) == ("prefill", None)
    assert followed.kv_transfer == {}
    assert followed.objective == "nll"


def test_text_of_a_command_line():
    score = ScoreSettings.checked(model="m", calibration="c", visual_tokens='{"num_keep": 3}')
    assert score.visual_tokens == VisualTokens(num_keep=3)
    choice = KVSelectSettings.checked(plan="p", max_kl=1, first="0.1", last=["8", "0.5"])
    assert (choice.first, choice.last) == (0.1, (8, 0.5))


def test_bad_values_are_named_in_one_line():
    kinds = (ScoreSettings, ComputeSettings, SearchSettings)
    with pytest.raises(InputError, match="speed=3: there is no such setting"):
        filled({"model": "m", "calibration": "c", "out": "o", "speed": 3}, *kinds)
    with pytest.raises(InputError) as error:
        filled({"model": "m", "dtype": "float8"}, *kinds)
    assert "calibration=" in str(error.value)
    assert "dtype='float8'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_says_in_a_sentence_what_it_is(kind):
    for name, field in kind.model_fields.items():
        text = field.description or ""
        assert text[:1].isupper(), name
        assert text.endswith("."), name
        assert len(text.split()) >= 4, name
        assert len(text) <= 160, name
    names = [name for other in KINDS[:3] for name in other.model_fields]
    assert len(names) == len(set(names)), "an option fills one of the three"


def test_settings_load_no_torch():
    modules = [f"rayapp.pruning.settings.{name}" for name in ("score", "compute", "search")]
    code = (
        f"import sys, {', '.join(modules)}, rayapp.pruning.kv_choice.settings; "
        "print(*{'torch', 'transformers', 'ray', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
