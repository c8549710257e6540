"""Images in chat messages over HTTP: answered as the pipeline answers, or refused."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from rayapp.api.routes import build_app
from rayapp.engine.local import ImagePrompt, LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.blocks import signature_of
from rayapp.models.loading import load_model
from rayapp.plan import KVTransfer, PruningPlan, VisualTokens
from rayapp.vision.limits import ImageLimits
from rayapp.vision.llava import load_image_processor
from rayapp.vision.reader import ImageSupport
from tests.api.in_process import InProcessService

Make = Callable[..., Any]
CHAT = "/v1/chat/completions"
GREEDY = {"model": "tiny", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
SAMPLING = SamplingParams(max_tokens=8, ignore_eos=True)
PARTS_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>|{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}>"
)


def url_of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def turn(*parts: bytes | str, kind: str = "image/png") -> dict[str, Any]:
    """A user's turn: bytes are images, texts are texts."""
    content: list[dict[str, Any]] = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url_of(part, kind)}}
        for part in parts
    ]
    return {"role": "user", "content": content}


class Served:
    """A tiny LLaVA behind HTTP, and the pipeline that it must equal."""

    def __init__(self, loaded: Any, processor: Any, plan: PruningPlan) -> None:
        limits = ImageLimits(max_images=3, max_bytes=100_000, max_pixels=40_000)
        self.service = InProcessService(
            loaded.model,
            loaded.tokenizer,
            plan,
            model_name="tiny",
            max_num_seqs=3,
            images=ImageSupport(processor, limits),
        )
        self.pipeline = LocalPipeline(
            loaded.model, loaded.tokenizer, plan, image_processor=processor
        )
        self.client: Any = None

    def chat(self, *messages: dict[str, Any], **options: Any) -> httpx.Response:
        body = {**GREEDY, "messages": list(messages), **options}
        return self.client.post(CHAT, json=body)

    def text(self, *messages: dict[str, Any], **options: Any) -> str:
        answer = self.chat(*messages, **options)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    def expected(self, prompt: str, images: list[bytes], text: str, **options: Any) -> Any:
        (answer,) = self.pipeline.generate([ImagePrompt(prompt, images, text, **options)], SAMPLING)
        return answer


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def served(
    request: Any, tiny_llava_path: Make, tmp_path_factory: Any, serve_app: Make
) -> Iterator[Served]:
    path = tiny_llava_path(tmp_path_factory.mktemp("llava"), request.param)
    loaded = load_model(path)
    plan = PruningPlan(
        model=signature_of(loaded.model),
        visual_tokens=VisualTokens(num_keep=6),
        kv_transfer={0: KVTransfer(encoding="int8"), 1: KVTransfer(first=2, last=8)},
    )
    opened = Served(loaded, load_image_processor(path), plan)
    with serve_app(build_app(opened.service)) as address, httpx.Client(base_url=address) as client:
        opened.client = client
        yield opened
    opened.service.close()


def test_an_image_is_answered_as_the_pipeline_answers(served: Served, encoded_image: Make) -> None:
    image = encoded_image(0, 40, 16)
    expected = served.expected("<image>\nwhat is this?", [image], "what is this?")
    assert served.text(turn(image, "what is this?")) == expected.text
    jpeg = encoded_image(1, 21, 30, form="JPEG")
    webp = encoded_image(2, 16, 16, form="WEBP")
    for data, kind in ((jpeg, "image/jpeg"), (webp, "image/webp")):
        expected = served.expected("<image>\nwhy", [data], "why")
        assert served.text(turn(data, "why", kind=kind)) == expected.text


def test_several_images_keep_their_order(served: Served, encoded_image: Make) -> None:
    one, two = encoded_image(3), encoded_image(4, 33, 20)
    messages = [
        turn(one, "first"),
        {"role": "assistant", "content": "yes"},
        turn("and ", two, "this?"),
    ]
    prompt = "<image>\nfirstyesand <image>\nthis?"
    assert served.text(*messages) == served.expected(prompt, [one, two], "and this?").text
    swapped = served.expected(prompt, [two, one], "and this?").text
    assert served.text(*messages) != swapped


def test_a_template_of_parts_gets_parts(served: Served, encoded_image: Make) -> None:
    tokenizer = served.service.description.tokenizer
    before, tokenizer.chat_template = tokenizer.chat_template, PARTS_TEMPLATE
    try:
        image = encoded_image(5)
        prompt = "[system]short[user]look <image>|>"
        expected = served.expected(prompt, [image], "look ")
        system = {"role": "system", "content": "short"}
        assert served.text(system, turn("look ", image)) == expected.text
    finally:
        tokenizer.chat_template = before


def test_text_alone_still_works(served: Served) -> None:
    (expected,) = served.pipeline.generate(["hello"], SAMPLING)
    assert served.text({"role": "user", "content": "hello"}) == expected.text


def test_the_openai_client_streams_about_an_image(served: Served, encoded_image: Make) -> None:
    image = encoded_image(6)
    with openai.OpenAI(base_url=str(served.client.base_url.join("/v1")), api_key="x") as client:
        chunks = client.chat.completions.create(
            model="tiny", max_tokens=8, temperature=0, stream=True, messages=[turn(image, "so?")],
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == served.expected("<image>\nso?", [image], "so?").text


def test_a_request_may_prune_as_it_likes(served: Served, encoded_image: Make) -> None:
    image = encoded_image(7)
    for rule in ({"num_keep": 1.0}, {"method": "grid", "num_keep": 4, "positions": "compact"}):
        own = VisualTokens(**rule)
        expected = served.expected("<image>\nhm", [image], "hm", visual_tokens=own)
        assert served.text(turn(image, "hm"), visual_tokens=rule) == expected.text


def test_a_request_says_how_its_images_share(served: Served, encoded_image: Make) -> None:
    plain = io.BytesIO()
    Image.new("RGB", (20, 20), "grey").save(plain, format="PNG")
    images = [plain.getvalue(), encoded_image(11)]
    found = []
    for sharing in ("equal", "diversity"):
        rule = {"num_keep": 6, "sharing": sharing}
        own = VisualTokens.model_validate(rule)
        expected = served.expected("<image>\n<image>\nwhich?", images, "which?", visual_tokens=own)
        found.append(served.text(turn(*images, "which?"), visual_tokens=rule))
        assert found[-1] == expected.text
    assert found[0] != found[1]


def test_health_tells_of_the_image_cache(served: Served, encoded_image: Make) -> None:
    def counts() -> dict[str, int]:
        pools = served.client.get("/health").json()["pools"]
        assert pools["decode"][0]["image_cache"] is None
        return dict(pools["prefill"][0]["image_cache"])

    before, image = counts(), encoded_image(12)
    for _ in range(3):
        served.text(turn(image, "again"))
    after = counts()
    changes = {name: after[name] - before[name] for name in after}
    assert (changes["misses"], changes["hits"], changes["num_images"]) == (1, 2, 1)
    taken = served.service.description.images.take_all([image])[0]
    assert changes["num_bytes"] == taken.num_tokens * 32 * 4
    assert after["max_bytes"] >= after["num_bytes"]


def test_usage_and_tokenize_count_the_unpruned_prompt(served: Served, encoded_image: Make) -> None:
    image = encoded_image(8, 40, 16)
    intake = served.service.description.images
    (taken,) = intake.take_all([image])
    total = len("\nhm") + taken.num_tokens
    answer = served.chat(turn(image, "hm")).json()
    assert answer["usage"]["prompt_tokens"] == total
    tokens = served.client.post("/tokenize", json={"messages": [turn(image, "hm")]}).json()
    assert tokens["count"] == len(tokens["tokens"]) == total
    assert tokens["tokens"][: taken.num_tokens] == [290] * taken.num_tokens


def test_the_ledger_counts_removed_tokens(served: Served, encoded_image: Make) -> None:
    def totals() -> dict[str, Any]:
        return dict(served.client.get("/v1/transfers").json()["totals"])

    before, image = totals(), encoded_image(9)
    served.text(turn(image, "x"))
    after = totals()
    expected = served.expected("<image>\nx", [image], "x").transfer
    for name in ("num_visual_tokens_removed", "saved_by_visual_tokens_bytes", "bytes_full"):
        assert after[name] - before[name] == getattr(expected, name) > 0
    saved = sum(
        after[f"saved_by_{n}_bytes"] for n in ("visual_tokens", "blocks", "tokens", "encoding")
    )
    assert after["bytes_full"] == after["bytes_sent"] - after["overhead_bytes"] + saved


def bomb() -> bytes:
    """A PNG that says it is huge."""
    data = bytearray(io.BytesIO(_png()).getvalue())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 90).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def _animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, format="WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="GIF")
    return buffer.getvalue()


BAD = {
    "truncated": (lambda: [turn(_png()[:150], "x")], "cannot be decoded"),
    "bomb": (lambda: [turn(bomb(), "x")], "pixels"),
    "wrong type": (lambda: [turn(_png(), "x", kind="image/jpeg")], "holds image/png"),
    "animated": (lambda: [turn(_animated(), "x", kind="image/webp")], "animated"),
    "gif": (lambda: [turn(_gif(), "x", kind="image/gif")], "PNG, JPEG or WebP"),
    "nothing": (lambda: [turn(b"", "x")], "PNG, JPEG or WebP"),
    "too large": (lambda: [turn(b"\x89PNG\r\n\x1a\n" + b"0" * 200_000, "x")], "100000 bytes"),
    "too many": (lambda: [turn(*[_png()] * 4, "x")], "at most 3"),
    "literal placeholder": (lambda: [turn(_png(), "an <image> too")], "<image>"),
    "literal alone": (lambda: [{"role": "user", "content": "<image>"}], "<image>"),
}


@pytest.mark.parametrize(("make", "says"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_refused(served: Served, make: Make, says: str) -> None:
    answer = served.chat(*make())
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]
    assert served.chat({"role": "user", "content": "hello"}).status_code == 200


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1/x.png", "not allowed"),
        ("file:///etc/passwd", "data:"),
        ("data:image/png,raw", "base64"),
        ("data:image/png;base64,§§", "base64"),
    ],
)
def test_addresses_are_not_followed(served: Served, url: str, says: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    answer = served.chat({"role": "user", "content": [part]})
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"num_keep": 0}, "at least one"),
        ({"num_keep": 3, "method": "psychic"}, "not known"),
        ({"num_keep": 0.9, "num_aligned": 0.2}, "fewer than"),
        ({"num_keep": 3, "typo": 1}, "typo"),
        ({"num_keep": 3, "sharing": "unequal"}, "'equal' or 'diversity'"),
    ],
)
def test_rules_that_mean_nothing_are_refused(
    served: Served, rule: Any, says: str, encoded_image: Make
) -> None:
    answer = served.chat(turn(encoded_image(0), "x"), visual_tokens=rule)
    assert answer.status_code == 400
    assert says in answer.text


def test_a_placeholder_as_token_id_or_text_is_refused(served: Served) -> None:
    for prompt in ([1, 290, 2], "see <image> here"):
        answer = served.client.post("/v1/completions", json={"model": "tiny", "prompt": prompt})
        assert (answer.status_code, "placeholder" in answer.text) == (400, True)


def test_a_prompt_is_measured_unpruned(served: Served, encoded_image: Make) -> None:
    wide = encoded_image(0, 48, 16)
    answer = served.chat(turn(wide, wide, wide, "x" * 470))
    assert (answer.status_code, "512" in answer.text) == (400, True)


def test_a_text_only_model_says_so(client: openai.OpenAI, encoded_image: Make) -> None:
    with pytest.raises(openai.BadRequestError, match=r"`tiny` takes no images.*text-only"):
        client.chat.completions.create(model="tiny", messages=[turn(encoded_image(0), "x")])
