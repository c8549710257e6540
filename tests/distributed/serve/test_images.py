"""Images served over nodes: equal to the pipeline in one process, and kept out of decode."""

from __future__ import annotations

import base64
import io
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from rayapp.distributed.serve.deploy import resolved
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.engine.local import ImagePrompt
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import ModelError, PlanError
from rayapp.models.loading import load_model
from rayapp.plan import PruningPlan, VisualTokens

SAMPLING = SamplingParams(max_tokens=8, ignore_eos=True)


def url_of(data, kind="image/png"):
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def ask(service, text, images, **options):
    """Images are bytes of PNGs, or URLs."""
    urls = [image if isinstance(image, str) else url_of(image) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        "max_tokens": 8, "temperature": 0, "ignore_eos": True, **options,
    }  # fmt: skip
    return service.client.post("/v1/chat/completions", json=body)


@pytest.mark.slow
@pytest.mark.ray
def test_answers_apart_equal_the_pipeline(planned, planned_model, encoded_image):
    expected = check_answers(planned, planned_model, encoded_image)
    check_ledger(planned, expected)
    check_parameters(planned, planned_model.loaded)


@pytest.mark.slow
@pytest.mark.ray
def test_answers_together_equal_the_pipeline(unified, unified_model, encoded_image):
    check_answers(unified, unified_model, encoded_image)


@pytest.mark.ray
@pytest.mark.slow
def test_answers_apart_equal_the_pipeline_with_first_tokens_of_prefill(
    deploy, unified_model, encoded_image
):
    with deploy(**unified_model.served) as service:
        expected = check_answers(service, unified_model, encoded_image)
        check_ledger(service, expected)
        check_parameters(service, unified_model.loaded)


def check_answers(service, served, encoded_image):
    """Alone and several at once, under the plan's visual rule and the client's own."""
    pipeline = served.pipeline()
    shapes = [(20, 20), (40, 16), (16, 50), (13, 31)]
    asked = [(f"question {n}", [encoded_image(n, *shapes[n % 4])] * (1 + n % 2)) for n in range(6)]
    prompts = [ImagePrompt("<image>\n" * len(i) + text, i, text) for text, i in asked]
    expected = pipeline.generate(prompts, SAMPLING)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda each: ask(service, *each), asked))
    for answer, reference in zip(answers, expected, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == reference.text
    own = ask(service, *asked[1], visual_tokens={"num_keep": 1.0})
    whole = ImagePrompt(prompts[1].prompt, asked[1][1], "question 1", VisualTokens(num_keep=1.0))
    assert own.json()["choices"][0]["message"]["content"] == (
        pipeline.generate([whole], SAMPLING)[0].text
    )
    assert ask(service, "x", [b"no image"]).status_code == 400
    cls = ask(service, "x", asked[0][1], visual_tokens={"method": "fastv", "num_keep": 3})
    assert cls.status_code == 200
    several = ask(service, *asked[1], n=3).json()["choices"]
    assert [c["message"]["content"] for c in several] == [expected[1].text] * 3
    service.check_idle()
    return expected


def file_of(mode="RGB", form="PNG", size=(21, 30), seed=0, **options):
    """Noise as an image file."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 4), dtype=np.uint8))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def deep():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 2**16, (9, 12), dtype=np.uint16)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def turned():
    """A photograph that lies on its side, by its own account."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(form="JPEG", size=(40, 16), exif=exif)


def animated(form):
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bomb():
    """A small file that says it is huge."""
    data = bytearray(file_of())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


KINDS = {
    "PNG": (file_of(), "image/png"),
    "JPEG": (file_of(form="JPEG"), "image/jpeg"),
    "progressive JPEG, alias": (file_of(form="JPEG", progressive=True, seed=1), "image/jpg"),
    "WebP": (file_of(form="WEBP"), "image/webp"),
    "grey PNG": (file_of("L"), "image/png"),
    "grey JPEG": (file_of("L", "JPEG"), "image/jpeg"),
    "black and white": (file_of("1"), "image/png"),
    "16 bits of grey": (deep(), "image/png"),
    "palette": (file_of("P"), "image/png"),
    "transparent palette": (file_of("P", transparency=3), "image/png"),
    "alpha PNG": (file_of("RGBA"), "image/png"),
    "grey and alpha": (file_of("LA"), "image/png"),
    "alpha WebP": (file_of("RGBA", "WEBP", lossless=True), "image/webp"),
    "CMYK": (file_of("CMYK", "JPEG"), "image/jpeg"),
    "turned": (turned(), "image/jpeg"),
    "one pixel": (file_of(size=(1, 1)), "image/png"),
    "a line": (file_of(size=(60, 1)), "image/png"),
    "a column": (file_of(size=(2, 90)), "image/png"),
    "large": (file_of(size=(190, 200)), "image/png"),
}
REFUSED = {
    "truncated": (url_of(file_of()[:300]), "cannot be decoded"),
    "wrongly typed": (url_of(file_of(), "image/jpeg"), "holds image/png"),
    "animated WebP": (url_of(animated("WEBP"), "image/webp"), "animated"),
    "animated PNG": (url_of(animated("PNG")), "animated"),
    "GIF": (url_of(animated("GIF"), "image/gif"), "PNG, JPEG or WebP"),
    "bomb": (url_of(bomb()), "40000 pixels"),
    "too long": (url_of(file_of(size=(300, 2))), "times its breadth"),
    "too many bytes": (url_of(file_of() + b"0" * 200_000), "200000 bytes"),
    "private address": ("http://localhost/x.png", "not public"),
    "unknown host": ("https://images.example.com/x.png", "not allowed"),
    "file": ("file:///etc/passwd", "data:"),
}
LIMITS = {
    "max_images": 3, "max_bytes": 200_000, "max_pixels": 40_000, "allowed_hosts": ["LOCALHOST"],
}  # fmt: skip
RULES = {
    "zero budget": ({"num_keep": 0}, "at least one visual token"),
    "no share": ({"num_keep": 0.0}, "at least one visual token"),
    "aligned too few": ({"num_keep": 9, "num_aligned": 3}, "fewer than"),
    "no way to share": ({"num_keep": 3, "sharing": "random"}, "'equal' or 'diversity'"),
}


@pytest.mark.slow
@pytest.mark.ray
def test_every_kind_of_file_is_served_as_the_pipeline_reads_it(deploy, unified_model):
    pipeline = unified_model.pipeline()

    def expected(images, rule=None):
        prompt = ImagePrompt("<image>\n" * len(images) + "what?", images, "what?", rule)
        return pipeline.generate([prompt], SAMPLING)[0].text

    with deploy(**unified_model.served, images=LIMITS) as service:
        check_kinds(service, expected)
        check_refusals(service)
        check_rules(service, expected)
        check_image_cache(service)
        service.check_idle()


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def check_kinds(service, expected):
    def served(item):
        return ask(service, "what?", [url_of(*item)])

    with ThreadPoolExecutor(6) as pool:
        answers = dict(zip(KINDS, pool.map(served, KINDS.values()), strict=True))
    found = {name: text_of(answer) for name, answer in answers.items()}
    assert found == {name: expected([data]) for name, (data, _) in KINDS.items()}
    assert len(set(found.values())) > len(found) // 2


def check_refusals(service):
    answers = {name: ask(service, "x", [url]) for name, (url, _) in REFUSED.items()}
    answers["too many"] = ask(service, "x", [file_of()] * 4)
    says = {name: words for name, (_, words) in REFUSED.items()} | {"too many": "at most 3"}
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(
        says, 400
    )
    messages = {name: answer.json()["error"]["message"] for name, answer in answers.items()}
    assert not {name: m for name, m in messages.items() if says[name] not in m or "\n" in m}


def check_rules(service, expected):
    for name, (rule, words) in RULES.items():
        answer = ask(service, "what?", [file_of()], visual_tokens=rule)
        assert (answer.status_code, words in answer.text) == (400, True), (name, answer.text)
    images = [file_of(), file_of("1", seed=4)]
    for rule in ({"num_keep": 10_000}, {"num_keep": 6, "sharing": "diversity"}):
        answer = ask(service, "what?", images, visual_tokens=rule)
        assert text_of(answer) == expected(images, VisualTokens(**rule))
    assert expected(images, VisualTokens(num_keep=10_000)) == (
        expected(images, VisualTokens(num_keep=1.0))
    )


def check_image_cache(service):
    """The images of before are at hand; a new one is not."""

    def counts():
        pools = service.client.get("/health").json()["pools"]
        assert [replica["image_cache"] for replica in pools["decode"]] == [None]
        return pools["prefill"][0]["image_cache"]

    before = counts()
    assert before["num_images"] >= len(KINDS)
    assert 0 < before["num_bytes"] <= before["max_bytes"]
    for image in (file_of(), file_of(seed=99), file_of(seed=99)):
        text_of(ask(service, "what?", [image]))
    after = counts()
    assert after["hits"] - before["hits"] == 2
    assert after["misses"] - before["misses"] == 1


def check_ledger(service, expected):
    """Compare the bytes that pruning saved in ledger and reference; check the ledger's identity."""
    ledger = service.client.get("/v1/transfers").json()
    found = {r["saved_by_visual_tokens_bytes"] for r in ledger["recent"]}
    assert {a.transfer.saved_by_visual_tokens_bytes for a in expected} <= found
    for record in ledger["recent"]:
        saved = sum(v for k, v in record.items() if k.startswith("saved_by"))
        assert record["bytes_full"] == record["bytes_sent"] - record["overhead_bytes"] + saved
    assert ledger["totals"]["num_visual_tokens_removed"] > 0


def check_parameters(service, loaded):
    """Decode holds nothing of the vision tower."""
    pools = service.client.get("/health").json()["pools"]
    tower = sum(p.nbytes for p in loaded.model.model.vision_tower.parameters())
    (prefill,), (decode,) = pools["prefill"], pools["decode"]
    text = loaded.parameter_bytes - tower
    assert prefill["parameter_bytes"] > tower
    assert decode["parameter_bytes"] < text


def test_what_cannot_serve_is_refused_before_anything_starts(tiny_llava_path, save_tiny, tmp_path):
    text = save_tiny(tmp_path, "llama")
    plan = PruningPlan(
        model=load_model(text).signature, visual_tokens=VisualTokens(num_keep=3)
    ).save(tmp_path / "plan")
    with pytest.raises(PlanError, match="takes no images"):
        resolved(ServiceSettings(model=str(text), plan=str(plan)))
    path = tiny_llava_path(tmp_path / "llava", "llava")
    resolved(ServiceSettings(model=str(path)))
    for file in path.glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(ModelError, match="image processor"):
        resolved(ServiceSettings(model=str(path)))
