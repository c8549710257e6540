"""A search on several nodes, one of which is killed and another added while it runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from rayapp.distributed.cluster.local import NodeSpec, local_cluster
from rayapp.distributed.evaluator_pool import EvaluatorPool
from rayapp.pruning.preparation import prepare
from rayapp.pruning.scorer import Scorer
from rayapp.pruning.search.run import run_search
from rayapp.workflows.prune import prune
from tests.told import Told

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
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
    """Strikes a node once an evaluator on it holds work, and waits for another evaluator."""

    def __init__(self, pool: EvaluatorPool, strike: Callable[[], None]) -> None:
        self.pool, self._strike = pool, strike
        self.struck = False
        self.alive: set[int] = set()
        self._assign = pool._assign

    def assign(self, waiting: list[Any]) -> None:
        if not self.struck and len(self.pool._idle) == 2:
            self._assign(waiting)
            self.struck = len(self.pool._busy) == 2
            if self.struck:
                self._strike()
            return
        if self.struck and self.pool._starting:
            ray.wait(list(self.pool._starting), num_returns=len(self.pool._starting), timeout=90)
        self._assign(waiting)
        if self.struck:
            self.alive.add(self.pool.num_evaluators)


def searched(search: Told, pool: EvaluatorPool, prepared: Any) -> Any:
    """The result of the search on these evaluators."""
    scorer = Scorer(prepared.calibration, search.score.scoring(), pool, weights="w")
    return run_search(search.score, search.search, scorer, prepared.signature)


def check_equal(result: Any, local: Any) -> None:
    """Every candidate has the score that it has without nodes."""
    assert result.plan.fingerprint == local.plan.fingerprint
    found = [(trial.candidate, trial.score.value) for trial in result.trials]
    assert found == [(trial.candidate, trial.score.value) for trial in local.trials]


def test_a_killed_node_changes_nothing_and_a_new_one_joins(tmp_path, settings, monkeypatch, caplog):
    local = prune(*settings)
    search = settings.but(out=str(tmp_path / "nodes"), workers=2)
    prepared = prepare(*search)
    with local_cluster([NodeSpec(num_cpus=1), NodeSpec(num_cpus=1)]) as cluster:

        def strike() -> None:
            cluster.kill_node(cluster.nodes[1].node_id)
            cluster.add_node(NodeSpec(num_cpus=1))

        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        with EvaluatorPool(search.score, search.compute, prepared.calibration) as pool:
            ray.wait(list(pool._starting), num_returns=2, timeout=90)
            disaster = Disaster(pool, strike)
            monkeypatch.setattr(pool, "_assign", disaster.assign)
            result = searched(search, pool, prepared)
    assert disaster.struck
    assert 2 in disaster.alive
    assert "an evaluator was lost" in caplog.text
    check_equal(result, local)
    assert (search.out / "plan.json").exists()


def test_evaluators_bring_their_nodes_and_another_one_for_a_node_that_is_taken(
    tmp_path, settings, monkeypatch, caplog
):
    """The cluster begins with a head that holds no evaluator, and ends so."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from serving.growing_cluster import NodeType, growing_cluster

    local = prune(*settings)
    search = settings.but(out=str(tmp_path / "growing"), workers=2)
    prepared = prepare(*search)
    types = {"worker": NodeType({"role": "worker"}, most=3)}
    with growing_cluster(types, head_cpus=0, idle_s=3.0) as cluster:

        def strike() -> None:
            workers = (node for node in ray.nodes() if node["Labels"].get("role") == "worker")
            cluster.take(next(node["NodeID"] for node in workers if node["Alive"]))

        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        assert cluster.count("worker") == 0
        with EvaluatorPool(search.score, search.compute, prepared.calibration) as pool:
            ready, _ = ray.wait(list(pool._starting), num_returns=2, timeout=120)
            assert len(ready) == cluster.count("worker") == 2
            disaster = Disaster(pool, strike)
            monkeypatch.setattr(pool, "_assign", disaster.assign)
            result = searched(search, pool, prepared)
            assert cluster.count("worker") == 2
        until_s = time.monotonic() + 60
        while cluster.count("worker"):
            assert time.monotonic() < until_s, ray.nodes()
            time.sleep(0.2)
    assert disaster.struck
    assert 2 in disaster.alive
    assert "an evaluator was lost" in caplog.text
    check_equal(result, local)
