"""``rayapp generate --image``: the pipeline's answer, or one line."""

from __future__ import annotations

from rayapp import cli
from rayapp.engine.local import ImagePrompt, LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.loading import load_model
from rayapp.vision.llava import load_image_processor


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["rayapp", "generate", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_an_image_is_read(tiny_llava_path, save_tiny, encoded_image, tmp_path, monkeypatch, capsys):
    path = tiny_llava_path(tmp_path / "llava", "llava")
    data = encoded_image(0)
    file = tmp_path / "picture.bin"
    file.write_bytes(data)
    loaded = load_model(path)
    pipeline = LocalPipeline(
        loaded.model, loaded.tokenizer, image_processor=load_image_processor(path)
    )
    prompt = ImagePrompt("<image>\nwhat?", [data], "what?")
    (expected,) = pipeline.generate([prompt], SamplingParams(max_tokens=6))
    given = ("--model", path, "--max-tokens", 6, "--image", file)
    for text in ("what?", "<image>\nwhat?"):
        code, out, _ = call(monkeypatch, capsys, *given, "--prompt", text)
        assert (code, out) == (0, expected.text + "\n")

    missing = call(monkeypatch, capsys, *given, "--image", tmp_path / "no.png", "--prompt", "x")
    assert missing[0] == 2
    assert "no.png: cannot be read" in missing[2]
    plain = save_tiny(tmp_path, "llama")
    refused = call(monkeypatch, capsys, "--model", plain, "--image", file, "--prompt", "x")
    assert refused[0] == 2
    assert "text-only" in refused[2]
    assert refused[2].count("\n") == 1
