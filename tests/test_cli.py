"""The command line as a user meets it: help, one clear line and exit code 2 for bad input."""

from __future__ import annotations

import json
import re
import socket

import httpx
import pytest

from rayapp import cli
from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.loading import load_model, read_signature
from rayapp.plan import PruningPlan

COMMANDS = {
    "demo", "prune", "kv-select", "evaluate", "report", "export", "serve", "generate", "transfers",
    "plan", "plan-capacity", "doctor", "reproduce", "smollm2", "train-testbed",
    "train-vision-testbed",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """``run("plan", "show", ...)`` gives the exit code, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["rayapp", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def checkpoint(save_tiny, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("cli"), "llama")


@pytest.fixture
def plan_dir(checkpoint, tmp_path):
    plan = PruningPlan.model_validate(
        {
            "model": read_signature(checkpoint),
            "prefill": {"blocks": {1: "kv_only", 3: "removed"}},
            "decode": {"blocks": {3: "removed"}},
            "kv_transfer": {2: {"first": 2, "last": 4}},
        }
    )
    return plan.save(tmp_path / "plan").parent


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [{"prompt": f"{i}: what?", "completion": "ab", "task": "t"} for i in range(4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def complains(result, needle):
    code, out, err = result
    assert code == 2, (out, err)
    assert re.search(needle, err), err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_help_lists_exactly_what_works(run):
    code, out, _ = run("--help")
    assert code == 0
    listed = {line.split()[1] for line in out.splitlines() if re.match(r"│ \w[\w-]* {2,}\S", line)}
    assert listed == COMMANDS
    for command in COMMANDS:
        assert run(command, "--help")[0] == 0


def test_generate_answers_like_the_model(run, checkpoint):
    loaded = load_model(checkpoint)
    prompt = "hello there"
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    want = loaded.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    code, out, err = run("generate", "--model", checkpoint, "--prompt", prompt, "--max-tokens", 8)
    assert code == 0, err
    text = loaded.tokenizer.decode(want, skip_special_tokens=True)
    assert out == text + "\n"


def test_generate_with_a_plan_and_several_prompts(run, checkpoint, plan_dir):
    arguments = ("--model", checkpoint, "--max-tokens", 5, "--prompt", "one", "--prompt", "two")
    loaded, plan = load_model(checkpoint), PruningPlan.load(plan_dir)
    pipeline = LocalPipeline(loaded.model, loaded.tokenizer, plan)
    answers = pipeline.generate(["one", "two"], SamplingParams(max_tokens=5))
    code, out, err = run("generate", *arguments, "--plan", plan_dir)
    assert code == 0, err
    assert out == "".join(f"{answer.text}\n" for answer in answers)
    assert run("generate", *arguments)[1] != out, "the dense model answers otherwise"


def test_plan_show(run, plan_dir, tmp_path):
    code, out, _ = run("plan", "show", plan_dir)
    assert code == 0
    assert "kv_only" in out
    assert "first 2 + last 4" in out
    complains(run("plan", "show", tmp_path / "nowhere"), "cannot be read")


def test_evaluate(run, checkpoint, plan_dir, data, tmp_path):
    out = tmp_path / "result.json"
    code, printed, err = run(
        "evaluate", "--model", checkpoint, "--plan", plan_dir, "--data", data, "--out", out,
        "--runs", 0,
    )  # fmt: skip
    assert code == 0, err
    assert "not for quotation" in printed
    assert json.loads(out.read_text())["complete"] is True


def test_report(run, checkpoint, plan_dir, data, tmp_path):
    code, printed, err = run("report", "--plan", plan_dir)
    assert code == 0, err
    assert printed.strip() == str(plan_dir / "report.html")
    measuring = ("--sensitivity", "--model", checkpoint, "--calibration", data)
    page = tmp_path / "new" / "page.html"
    code, _, err = run("report", "--plan", plan_dir / "plan.json", "--out", page, *measuring)
    assert code == 0, err
    assert "Sensitivity per block" in page.read_text()
    (plan_dir / "kv.json").write_text(
        json.dumps(
            {"complete": False, "subject": {"plan": ""}, "settings": {"method": "mass"}, "mass": []}
        )
    )
    code, _, err = run("report", "--plan", plan_dir)
    assert (code, err) == (0, "left out: kv.json: the selection did not finish\n")
    complains(run("report", "--plan", plan_dir, "--sensitivity"), "give it with --model and")
    complains(run("report", "--plan", plan_dir, *measuring[1:3]), "give it with --model and")
    complains(run("report", "--plan", tmp_path / "nowhere"), "cannot be read")
    complains(run("report", "--plan", plan_dir, "--ledger", data), "is not JSON")


def test_prune_in_process(run, checkpoint, data, tmp_path):
    out = tmp_path / "found"
    code, printed, err = run(
        "prune", "--model", checkpoint, "--calibration", data, "--out", out,
        "--decode-remove", 1, "--method", "exhaustive",
    )  # fmt: skip
    assert code == 0, err
    assert "plan.json" in printed
    assert PruningPlan.load(out).removed("decode") == 1
    for name in ("journal.jsonl", "trials.parquet", "report.html"):
        assert (out / name).is_file(), name


def test_kv_select(run, checkpoint, plan_dir, data, tmp_path):
    before = PruningPlan.load(plan_dir)
    arguments = (
        "kv-select", "--model", checkpoint, "--plan", plan_dir, "--calibration", data, "--first", 1,
        "--last", 2, "--last", 0.5,
    )  # fmt: skip
    out = tmp_path / "chosen"
    goal = ("--target-reduction", 2, "--dtype", "int8", "--out", out)
    code, printed, err = run(*arguments, *goal)
    assert code == 0, err
    assert "KL, cut alone" in printed
    assert f"{out}/plan.json: 2." in printed.replace("\n", "")
    assert PruningPlan.load(out).kv_transfer
    assert json.loads((out / "kv.json").read_text())["complete"] is True
    assert PruningPlan.load(plan_dir) == before
    assert run(*arguments, "--method", "mass", "--threshold", 0.5)[0] == 0  # in place
    complains(run(*arguments), "give either --target-reduction or --max-kl")
    complains(run(*arguments, "--target-reduction", 99), r"99 cannot be met.*reach \d+")
    complains(run(*arguments, "--max-kl", 1, "--out", out), "a plan already lies here")
    complains(run(*arguments, "--max-kl", 1, "--last", "x"), r"--last=.*'x'.*: x is neither")


def test_bad_models_plans_and_data(run, checkpoint, plan_dir, data, save_tiny, tmp_path):
    other = save_tiny(tmp_path, "qwen2")
    prompt = ("--prompt", "x")
    complains(run("generate", "--model", tmp_path / "no", *prompt), "no such model directory")
    complains(run("generate", "--model", other, "--plan", plan_dir, *prompt), "another model")
    complains(run("serve", "--model", tmp_path / "no"), "no such model directory")
    complains(run("serve", "--model", other, "--plan", plan_dir), "another model")
    (plan_dir / "plan.json").write_text('{"kv": 1}')
    complains(run("serve", "--model", checkpoint, "--plan", plan_dir), "unknown key `kv`")
    data.write_text(data.read_text() + "not json\n")
    arguments = ("--model", checkpoint, "--out", tmp_path / "o", "--decode-remove", 1)
    complains(run("prune", *arguments, "--calibration", data), r"data\.jsonl.*5")
    complains(run("evaluate", "--model", checkpoint, "--data", data), r"data\.jsonl.*5")


def test_bad_options(run, checkpoint, data, tmp_path):
    long = ("--prompt", "x" * 600)
    complains(run("generate", "--model", checkpoint, *long), "600.*512|512.*600")
    complains(run("generate", "--model", checkpoint, "--prompt", "x", "--top-p", 2), "--top-p")
    arguments = ("--model", checkpoint, "--calibration", data, "--out", tmp_path / "o")
    complains(run("prune", *arguments, "--decode-remove", 9), "9")
    complains(run("serve", "--model", checkpoint, "--prefill-replicas", "3:1"), "MIN")
    complains(run("serve", "--model", checkpoint, "--host", "0.0.0.0"), "--api-key")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        complains(run("serve", "--model", checkpoint, "--port", port), f"{port}.*another --port")
    assert run("generate", "--model", checkpoint)[0] == 2
    assert run("nonsense")[0] == 2


def test_transfers(run, monkeypatch):
    totals = {
        "bytes_full": 10, "bytes_sent": 6, "overhead_bytes": 1, "saved_by_visual_tokens_bytes": 0,
        "saved_by_blocks_bytes": 5, "saved_by_tokens_bytes": 0, "saved_by_encoding_bytes": 0,
        "reduction_factor": 10 / 6, "gb_per_s": None, "num_transfers": 1,
    }  # fmt: skip
    body = {"totals": totals, "links": [], "recent": []}
    asked = []

    def answer(url, **_):
        asked.append(url)
        return httpx.Response(200, json=body, request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "get", answer)
    code, out, _ = run("transfers", "--url", "http://127.0.0.1:1/")
    assert code == 0
    assert "1.667x" in out
    assert asked == ["http://127.0.0.1:1/v1/transfers"]
    assert json.loads(run("transfers", "--json")[1]) == body


def test_transfers_where_nothing_runs(run):
    complains(run("transfers", "--url", "http://127.0.0.1:9"), "is a service running")
