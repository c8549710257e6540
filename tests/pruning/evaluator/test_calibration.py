from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayapp.errors import DataError
from rayapp.pruning.evaluator.calibration import cut, load_calibration

GOOD = '{"prompt": "ab", "completion": "c", "task": "t"}'


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "calibration.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        ("{not json", "not JSON"),
        ('["prompt"]', "not a JSON object"),
        ('{"completion": "x"}', "`prompt` is missing"),
        ('{"prompt": "x"}', "`completion` is missing"),
        ('{"prompt": 3, "completion": "x"}', "`prompt` is not a string"),
        ('{"prompt": "x", "completion": null}', "`completion` is not a string"),
        ('{"prompt": "", "completion": "x"}', "`prompt` is empty"),
        ('{"prompt": "x", "completion": ""}', "`completion` is empty"),
        ('{"prompt": "x", "completion": "y", "tsak": "t"}', "unknown key `tsak`"),
        ('{"prompt": "x", "completion": "y", "task": 1}', "`task` is not a string"),
        ('{"prompt": "x", "completion": "y", "image": "a.png"}', "has an image"),
        (
            '{"prompt": "' + 14 * "x" + '", "completion": "yy"}',
            "= 17, but the model's context is 16",
        ),
    ],
)
def test_malformed_line_is_named(tmp_path, byte_tokenizer, bad, rule):
    path = write(tmp_path, GOOD, GOOD, bad, GOOD)
    with pytest.raises(DataError) as error:
        load_calibration(path, byte_tokenizer, max_positions=16)
    assert f"{path} line 3: " in str(error.value)
    assert rule in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file_is_refused(tmp_path, byte_tokenizer, content):
    path = write(tmp_path, content)
    with pytest.raises(DataError, match="holds no line"):
        load_calibration(path, byte_tokenizer)


def test_unreadable_file_is_refused(tmp_path, byte_tokenizer):
    with pytest.raises(DataError, match="cannot be read"):
        load_calibration(tmp_path / "none.jsonl", byte_tokenizer)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        load_calibration(tmp_path / "latin.jsonl", byte_tokenizer)


def test_lines_are_tokenised_with_the_end_marker(tmp_path, byte_tokenizer):
    # U+2028 separates lines for str.splitlines, but not for JSON lines.
    path = write(tmp_path, GOOD, "", '{"prompt": "d\u2028", "completion": "ef"}')
    lines = load_calibration(path, byte_tokenizer).lines
    assert [(line.prompt, line.continuation, line.task) for line in lines] == [
        ((97, 98), (99, 256), "t"),
        ((100, *"\u2028".encode()), (101, 102, 256), ""),
    ]


def test_a_line_as_long_as_the_context_is_taken(tmp_path, byte_tokenizer):
    path = write(tmp_path, '{"prompt": "' + 13 * "x" + '", "completion": "yy"}')
    assert len(load_calibration(path, byte_tokenizer, max_positions=16).lines) == 1


def test_chunks_hold_every_line_once_within_the_bound(calibration):
    bound = 64
    again = cut(calibration.lines, chunk_tokens=bound)
    assert sorted(i for chunk in again.chunks for i in chunk.lines) == list(range(8))
    assert len(again.chunks) > 2
    for chunk in again.chunks:
        tokens = chunk.prompts_BT.numel() + chunk.continuations_BC.numel()
        assert tokens <= bound or len(chunk.lines) == 1
        for row, index in enumerate(chunk.lines):
            length = int(chunk.prompt_lengths_B[row])
            assert tuple(chunk.prompts_BT[row, :length].tolist()) == calibration.lines[index].prompt
            assert not torch.any(chunk.prompts_BT[row, length:])
            length = int(chunk.continuation_lengths_B[row])
            ids = tuple(chunk.continuations_BC[row, :length].tolist())
            assert ids == calibration.lines[index].continuation


def test_fingerprint_follows_the_content(calibration):
    same = cut(list(calibration.lines), chunk_tokens=96)
    assert same.fingerprint == calibration.fingerprint
    assert [c.key for c in same.chunks] == [c.key for c in calibration.chunks]
    assert cut(calibration.lines[1:], chunk_tokens=96).fingerprint != calibration.fingerprint
    assert cut(calibration.lines, chunk_tokens=64).fingerprint != calibration.fingerprint
