"""A server with a key opens nothing but the door bell without it."""

from __future__ import annotations

import httpx
import openai
import pytest

from rayapp.api.keys import digest_of
from rayapp.api.routes import build_app

PATHS = ["/", "/v1/models", "/v1/transfers", "/metrics", "/openapi.json", "/nothing", "/health/x"]


@pytest.fixture(scope="module")
def locked_url(shared, serve_app):
    with serve_app(build_app(shared[0], key_digest=digest_of("s3cret"))) as url:
        yield url


@pytest.fixture(scope="module")
def locked_client(locked_url):
    with httpx.Client(base_url=locked_url) as http:
        yield http


@pytest.fixture
def locked(service, locked_client):
    return locked_client


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "value", [None, "", "Bearer", "Bearer wrong", "s3cret", "Basic s3cret", "Bearer s3cret x"]
)
def test_without_the_key_every_path_is_closed(locked, path, value):
    headers = {} if value is None else {"Authorization": value}
    reply = locked.get(path, headers=headers)
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
)
def test_without_the_key_nothing_runs(locked, service, path):
    assert locked.post(path, json={"prompt": "a"}).status_code == 401
    assert not service.requests


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_key_paths_are_open(locked, scheme):
    headers = {"Authorization": f"{scheme} s3cret"}
    assert locked.get("/v1/models", headers=headers).status_code == 200


def test_the_client_with_its_key(locked, service):
    base_url = str(locked.base_url).rstrip("/") + "/v1"
    client = openai.OpenAI(base_url=base_url, api_key="s3cret", max_retries=0)
    assert client.models.list().data[0].id == "tiny"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=base_url, api_key="other", max_retries=0).models.list()


def test_health_is_open_but_only_the_key_shows_nodes(locked):
    reply = locked.get("/health")
    assert reply.status_code == 200
    assert reply.json() == {"ready": True, "reason": ""}
    full = locked.get("/health", headers={"Authorization": "Bearer s3cret"}).json()
    assert full["pools"]["decode"][0]["node"] == "node-1"


def test_without_a_key_an_empty_bearer_header_is_fine(http):
    assert http.get("/v1/models", headers={"Authorization": "Bearer"}).status_code == 200
