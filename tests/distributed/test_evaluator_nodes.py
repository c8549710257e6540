"""A search on several nodes, one of which is killed and another added while it runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import ray

from rayapp.distributed.cluster.local import LocalCluster, NodeSpec, local_cluster
from rayapp.distributed.evaluator_pool import EvaluatorPool
from rayapp.pruning.preparation import prepare
from rayapp.pruning.scorer import Scorer
from rayapp.pruning.search.run import run_search
from rayapp.workflows.prune import prune
from tests.told import Told

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def settings(tmp_path, save_tiny) -> Told:
    file = tmp_path / "calibration.jsonl"
    lines = [{"prompt": "ab" * (3 + n), "completion": "cd"} for n in range(8)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Told.of(
        model=str(save_tiny(tmp_path, "llama")),
        calibration=str(file),
        out=str(tmp_path / "local"),
        prefill_remove=1,
        decode_remove=1,
        evaluations=16,
        chunk_tokens=100,
    )


class Disaster:
    """Kills a node once an evaluator on it holds work, and brings another one in its place."""

    def __init__(self, cluster: LocalCluster, pool: EvaluatorPool) -> None:
        self.cluster, self.pool, self.node_id = cluster, pool, cluster.nodes[1].node_id
        self.struck = False
        self.alive: set[int] = set()
        self._assign = pool._assign

    def assign(self, waiting: list[Any]) -> None:
        if not self.struck and len(self.pool._idle) == 2:
            self._assign(waiting)
            self.struck = len(self.pool._busy) == 2
            if self.struck:
                self.cluster.kill_node(self.node_id)
                self.cluster.add_node(NodeSpec(num_cpus=1))
            return
        if self.struck and self.pool._starting:
            ray.wait(list(self.pool._starting), num_returns=len(self.pool._starting), timeout=90)
        self._assign(waiting)
        if self.struck:
            self.alive.add(self.pool.num_evaluators)


def test_a_killed_node_changes_nothing_and_a_new_one_joins(tmp_path, settings, monkeypatch, caplog):
    local = prune(*settings)
    search = settings.but(out=str(tmp_path / "nodes"), workers=2)
    prepared = prepare(*search)
    with local_cluster([NodeSpec(num_cpus=1), NodeSpec(num_cpus=1)]) as cluster:
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        with EvaluatorPool(search.score, search.compute, prepared.calibration) as pool:
            ray.wait(list(pool._starting), num_returns=2, timeout=90)
            disaster = Disaster(cluster, pool)
            monkeypatch.setattr(pool, "_assign", disaster.assign)
            scorer = Scorer(prepared.calibration, search.score.scoring(), pool, weights="w")
            result = run_search(search.score, search.search, scorer, prepared.signature)
    assert disaster.struck
    assert 2 in disaster.alive
    assert "an evaluator was lost" in caplog.text
    assert result.plan.fingerprint == local.plan.fingerprint
    found = [(trial.candidate, trial.score.value) for trial in result.trials]
    assert found == [(trial.candidate, trial.score.value) for trial in local.trials]
    assert (search.out / "plan.json").exists()
