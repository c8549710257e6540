"""Settings: strict, and the same in a configuration file as on the command line."""

from __future__ import annotations

import pytest

from rayapp.distributed.deploy import configuration
from rayapp.distributed.messages import Address
from rayapp.distributed.router import ranks
from rayapp.distributed.settings import ServiceSettings
from rayapp.errors import InputError


def test_they_survive_a_configuration_file():
    settings = ServiceSettings.parse(
        {"model": "/m", "prefill": {"replicas": "1:3"}, "decode": {"replicas": 2}}
    )
    (application,) = configuration(settings)["applications"]
    assert ServiceSettings.parse(application["args"]) == settings
    assert str(settings.prefill.replicas) == "1:3"
    assert settings.prefill.replicas.is_elastic
    assert not settings.decode.replicas.is_elastic


def test_the_key_itself_is_never_deployed():
    settings = ServiceSettings.parse({"model": "/m", "api_key": "open sesame"})
    (application,) = configuration(settings)["applications"]
    assert "open sesame" not in str(application)
    deployed = ServiceSettings.parse(application["args"])
    assert deployed.key_digest == settings.key_digest
    assert deployed.key_digest != ServiceSettings.parse({"model": "/m", "api_key": "x"}).key_digest


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model": "/m", "prefil": {}}, "prefil: "),
        ({"model": "/m", "prefill": {"replica": 1}}, "prefill.replica: "),
        ({"model": "/m", "decode": {"replicas": "3:1"}}, "decode.replicas: 3:1 has its maximum"),
        ({"model": "/m", "decode": {"replicas": "many"}}, "'many' is no number of replicas"),
        ({"model": "/m", "decode": {"replicas": 0}}, "decode.replicas.minimum: "),
        ({"model": "/m", "deadlines": {"queue_s": 0}}, "deadlines.queue_s: "),
        ({}, "model: "),
    ],
)
def test_what_breaks_a_rule_is_named_by_its_path(raw, message):
    with pytest.raises(InputError) as caught:
        ServiceSettings.parse(raw)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_name_is_the_directory_unless_given():
    assert ServiceSettings(model="/models/small/").model_name == "small"
    assert ServiceSettings(model="/m", served_model_name="big").model_name == "big"


def test_calls_go_where_they_are_addressed():
    pool = {"a": 1, "b": 2, "c": 3}
    assert ranks(Address("b"), pool) == [[2]]
    assert ranks(Address("gone"), pool)[0] == [1, 2, 3]
    assert ranks(Address(avoid=frozenset("ab")), pool) == [[3], [1, 2, 3]]
    assert ranks(Address(avoid=frozenset("abc")), pool) == [[1, 2, 3]]
    assert ranks(Address(), {}) == []
