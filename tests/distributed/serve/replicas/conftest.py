"""A stage of a small model, and a thread that stands still."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rayapp.distributed.serve.replicas.stage import StageModel
from rayapp.models.blocks import signature_of
from rayapp.models.loading import LoadedModel
from rayapp.plan import PruningPlan


@pytest.fixture(scope="package")
def stage(tiny_model, byte_tokenizer):
    model = tiny_model("llama")
    loaded = LoadedModel(model, byte_tokenizer, signature_of(model), Path(), 0)
    return StageModel(loaded, PruningPlan(), 256)


@pytest.fixture
def held():
    """``held(thread)``: the thread does nothing until the returned event is set."""
    releases = []

    def hold(thread):
        releases.append(threading.Event())
        thread.submit(releases[-1].wait)
        return releases[-1]

    yield hold
    for release in releases:
        release.set()
