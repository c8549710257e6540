"""Settings: strict, and the same in a configuration file as on the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from rayapp.cli import app
from rayapp.distributed.serve.app import build
from rayapp.distributed.serve.deploy import configuration
from rayapp.distributed.serve.exposure import check_exposure, serving_host
from rayapp.distributed.serve.ingress.router import ranks
from rayapp.distributed.serve.messages import Address
from rayapp.distributed.serve.settings import ServiceSettings
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
        (
            {"model": "/m", "decode": {"num_gpus": 1, "device": "cpu"}},
            "decode: device 'cpu' with num_gpus 1: replicas on a GPU reserve GPUs",
        ),
        ({"model": "/m", "prefill": {"device": "cuda"}}, "prefill: device 'cuda' with num_gpus 0"),
        ({"model": "/m", "deadlines": {"queue_s": 0}}, "deadlines.queue_s: "),
        ({"model": "/m", "images": {"max_images": -1}}, "images.max_images: "),
        ({"model": "/m", "images": {"max_image": 1}}, "images.max_image: "),
        ({"model": "/m", "images": {"max_pixels": 10**9}}, "images.max_pixels: "),
        (
            {"model": "/m", "images": {"allowed_hosts": ["https://a.example/"]}},
            "images.allowed_hosts: 'https://a.example/' is no host name",
        ),
        ({}, "model: "),
    ],
)
def test_what_breaks_a_rule_is_named_by_its_path(raw, message):
    with pytest.raises(InputError) as caught:
        ServiceSettings.parse(raw)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_image_limits_come_from_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "rayapp.workflows.serve.serve_until_interrupted",
        lambda settings, **_: seen.append(settings),
    )

    def limits(*arguments):
        result = CliRunner().invoke(app, ["serve", "--model", "/m", *arguments])
        assert result.exit_code == 0, result.output
        return seen[-1].images

    assert limits() == ServiceSettings(model="/m").images
    given = limits(
        "--max-images", "2", "--max-image-bytes", "1000", "--max-image-pixels", "640000",
        "--image-host", "Images.Example.com", "--image-host", "b.example",
    )  # fmt: skip
    assert (given.max_images, given.max_bytes, given.max_pixels) == (2, 1000, 640_000)
    assert given.allowed_hosts == {"images.example.com", "b.example"}
    (application,) = configuration(seen[-1])["applications"]
    assert ServiceSettings.parse(application["args"]).images == given
    assert limits("--max-images", "0").max_images == 0


def test_the_name_is_the_directory_unless_given():
    assert ServiceSettings(model="/models/small/").model_name == "small"
    assert ServiceSettings(model="/m", served_model_name="big").model_name == "big"


def test_calls_go_where_they_are_addressed():
    pool = {"a": 1, "b": 2, "c": 3}
    assert ranks(Address("b"), pool) == [[2]]
    assert ranks(Address("gone"), pool)[0] == [1, 2, 3]
    assert ranks(Address(avoid=frozenset("ab")), pool) == [[3], [1, 2]]
    assert ranks(Address(avoid=frozenset("abc")), pool) == [[1, 2, 3]]
    assert ranks(Address(), {}) == []


def test_kv_memory_is_read_with_its_unit():
    raw = {"model": "m", "kv_memory": "2GiB", "block_size": 32}
    settings = ServiceSettings.parse(raw)
    assert (settings.kv_memory, settings.block_size) == (2 << 30, 32)
    assert ServiceSettings.parse(settings.model_dump(mode="json")) == settings
    with pytest.raises(InputError, match="kv_memory: could not"):
        ServiceSettings.parse({"model": "m", "kv_memory": "much"})


def test_a_pool_computes_on_the_gpus_that_it_reserves():
    settings = ServiceSettings.parse({"model": "/m", "decode": {"num_gpus": 0.5}})
    assert (settings.decode.device, settings.prefill.device) == ("cuda", "cpu")
    assert ServiceSettings.parse(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("host", "settings", "is_open"),
    [
        ("0.0.0.0", {}, True),
        ("10.1.2.3", {}, True),
        ("::", {}, True),
        ("example.com", {}, True),
        ("127.0.0.5", {}, False),
        ("::1", {}, False),
        ("localhost", {}, False),
        ("0.0.0.0", {"api_key": "k"}, False),
        ("0.0.0.0", {"api_key_digest": "0" * 64}, False),
        ("0.0.0.0", {"allow_unauthenticated": True}, False),
        (None, {"host": "0.0.0.0"}, True),
        (None, {}, False),
    ],
)
def test_strangers_are_let_in_only_by_decision(host, settings, is_open):
    parsed = ServiceSettings.parse({"model": "/m", **settings})
    if is_open:
        with pytest.raises(InputError, match=f"host {host or '0.0.0.0'!r} can be reached"):
            check_exposure(parsed, host)
    else:
        check_exposure(parsed, host)


def test_where_serve_does_not_run_the_settings_say_where_it_listens():
    assert serving_host() is None
    with pytest.raises(InputError, match="no API key is set"):
        build({"model": "/m", "host": "0.0.0.0"})


def test_a_configuration_that_listens_everywhere_is_refused(monkeypatch):
    """Serve's own options say so, whatever the settings say."""
    monkeypatch.setattr("rayapp.distributed.serve.app.serving_host", lambda: "0.0.0.0")
    with pytest.raises(InputError, match=r"'0\.0\.0\.0' can be reached"):
        build({"model": "/m"})
