"""The bytes of the ledger beside those that Ray's stores say they took."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def created_bytes(node):
    """Bytes of all objects that were ever made in a node's store, arrivals included."""
    from ray._private.internal_api import node_stats

    stats = node_stats(node.node_ip_address, node.node_manager_port, include_memory_info=False)
    return stats.store_stats.cumulative_created_bytes


def test_the_ledger_agrees_with_the_stores_of_both_nodes(deploy, tiny_llama, cluster):
    """KV goes whole here: groups of blocks of so small a model travel inside Ray's own messages."""
    _, source, destination, *_ = cluster.nodes
    prompt = [(3 * i) % 250 for i in range(440)]
    body = {"model": "tested", "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
    with deploy(model=str(tiny_llama), max_num_batched_tokens=128, kv_part_ms=1e6) as service:
        before = created_bytes(source), created_bytes(destination)
        sent = service.client.get("/v1/transfers").json()["totals"]["bytes_sent"]
        for _ in range(4):
            assert service.client.post("/v1/completions", json=body).status_code == 200
        sent = service.client.get("/v1/transfers").json()["totals"]["bytes_sent"] - sent
        made = created_bytes(source) - before[0], created_bytes(destination) - before[1]
        assert made == (pytest.approx(sent, rel=0.02), pytest.approx(sent, rel=0.02))
