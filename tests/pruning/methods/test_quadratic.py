"""The model of scores against plain ridge regression, and the search on it against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.methods.landscape import ENUMERATED, Landscape
from rayapp.pruning.methods.method import Setup
from rayapp.pruning.methods.quadratic import PENALTY, Quadratic, features, root_losses

BLOCKS = 8


def test_the_fit_is_ridge_regression_on_units_and_pairs():
    rng = np.random.default_rng(0)
    features_NM = (rng.random((20, 6)) < 0.5).astype(float)
    targets_N = rng.normal(size=20)
    pairs = list(itertools.combinations(range(6), 2))
    design = np.hstack(
        [features_NM, *[features_NM[:, [i]] * features_NM[:, [j]] for i, j in pairs]]
    )
    direct = np.linalg.solve(
        design.T @ design + PENALTY * np.eye(design.shape[1]), design.T @ targets_N
    )
    model = Quadratic.fitted(features_NM, targets_N)
    assert model.linear_M == pytest.approx(direct[:6])
    assert [model.pairs_MM[pair] for pair in pairs] == pytest.approx(direct[6:])
    assert model.predict(features_NM) == pytest.approx(design @ direct)


def test_root_losses_keep_the_sign():
    assert root_losses(np.array([5.0, 1.0, 0.0]), 1.0) == pytest.approx([2.0, 0.0, -1.0])


def test_features_tell_stages_apart():
    space = Space(3, 1, 1)
    assert features(space, [Candidate((2, 3), (4, 5))]).tolist() == [[0, 1, 0, 0, 0, 1]]
    parts = Space(2, 0.5, 0.5, "part")
    assert features(parts, [Candidate((1,), (2,))]).tolist() == [[0, 1, 0, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize("kv_modes", [True, False])
def test_descents_find_what_enumeration_finds(kv_modes, monkeypatch):
    space = Space(BLOCKS, 2, 3, kv_modes=kv_modes)
    rng = np.random.default_rng(1)
    pairs_MM = np.triu(rng.normal(size=(2 * BLOCKS, 2 * BLOCKS)), 1)
    model = Quadratic(rng.random(2 * BLOCKS) * 4, pairs_MM + pairs_MM.T)
    setup = Setup(space, None, 8, 0)

    def lowest() -> list[Candidate]:
        return Landscape(space).lowest(model, 3, rng=lambda index: setup.rng(0, index))

    assert space.size <= ENUMERATED
    listed = lowest()
    truth = sorted(space, key=lambda c: (model.predict(features(space, [c]))[0], c))[:3]
    assert listed == truth
    monkeypatch.setattr("rayapp.pruning.methods.landscape.ENUMERATED", 0)
    assert lowest()[0] == listed[0]
    assert all(candidate in space for candidate in lowest())
