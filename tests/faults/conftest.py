"""The same cluster and services as in the tests of :mod:`rayapp.distributed`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_FILE = Path(__file__).parents[1] / "distributed" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("distributed_fixtures", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
_FIXTURES = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _FIXTURES
_SPEC.loader.exec_module(_FIXTURES)

cluster = _FIXTURES.cluster
deploy = _FIXTURES.deploy
