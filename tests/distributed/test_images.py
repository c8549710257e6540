"""Images served over nodes: equal to the pipeline in one process, and kept out of decode."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import pytest

from rayapp.distributed.deploy import resolved
from rayapp.distributed.settings import ServiceSettings
from rayapp.engine.local import ImagePrompt, LocalPipeline
from rayapp.engine.request import SamplingParams
from rayapp.errors import ModelError, PlanError
from rayapp.models.blocks import signature_of
from rayapp.models.loading import load_model
from rayapp.plan import KVTransfer, Mode, PruningPlan, StagePlan, VisualTokens
from rayapp.vision.llava import load_image_processor

SAMPLING = SamplingParams(max_tokens=8, ignore_eos=True)


def url_of(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ask(service, text, images, **options):
    parts = [{"type": "image_url", "image_url": {"url": url_of(data)}} for data in images]
    body = {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        "max_tokens": 8, "temperature": 0, "ignore_eos": True, **options,
    }  # fmt: skip
    return service.client.post("/v1/chat/completions", json=body)


def make_plan(model, first_token):
    return PruningPlan(
        model=signature_of(model),
        first_token=first_token,
        visual_tokens=VisualTokens(num_keep=6),
        prefill=StagePlan(blocks={1: Mode.KV_ONLY}),
        decode=StagePlan(blocks={2: Mode.MLP_ONLY}),
        kv_transfer={0: KVTransfer(encoding="int8"), 1: KVTransfer(first=2, last=8)},
    )


@pytest.mark.ray
@pytest.mark.parametrize(
    ("kind", "mode", "first_token"),
    [
        ("llava", "disaggregated", "decode"),
        ("llava_next", "disaggregated", "prefill"),
        ("llava_next", "unified", "prefill"),
    ],
)
def test_served_answers_equal_the_pipeline(
    kind, mode, first_token, deploy, tiny_llava_path, encoded_image, tmp_path
):
    path = tiny_llava_path(tmp_path / "model", kind)
    loaded = load_model(path)
    plan = make_plan(loaded.model, first_token)
    plan.save(tmp_path / "plan")
    pipeline = LocalPipeline(
        loaded.model, loaded.tokenizer, plan, image_processor=load_image_processor(path)
    )
    shapes = [(20, 20), (40, 16), (16, 50), (13, 31)]
    asked = [(f"question {n}", [encoded_image(n, *shapes[n % 4])] * (1 + n % 2)) for n in range(6)]
    prompts = [ImagePrompt("<image>\n" * len(i) + text, i, text) for text, i in asked]
    expected = pipeline.generate(prompts, SAMPLING)
    with deploy(model=str(path), plan=str(tmp_path / "plan"), mode=mode, max_num_seqs=3) as service:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda each: ask(service, *each), asked))
        for answer, reference in zip(answers, expected, strict=True):
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["content"] == reference.text
        own = ask(service, *asked[1], visual_tokens={"num_keep": 1.0})
        whole = ImagePrompt(
            prompts[1].prompt, asked[1][1], "question 1", VisualTokens(num_keep=1.0)
        )
        assert own.json()["choices"][0]["message"]["content"] == (
            pipeline.generate([whole], SAMPLING)[0].text
        )
        assert ask(service, "x", [b"no image"]).status_code == 400
        cls = ask(service, "x", asked[0][1], visual_tokens={"method": "fastv", "num_keep": 3})
        assert cls.status_code == 200
        if mode == "disaggregated":
            check_ledger(service, expected)
            check_parameters(service, loaded)
        service.check_idle()


def check_ledger(service, expected):
    """What pruning saved, by the ledger and by the reference; the identity to the byte."""
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
