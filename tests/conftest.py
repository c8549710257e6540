"""Fixtures that every room shares: small random-weight models, and the test-bed."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

# Before anything imports ray or torch: processes must agree on authentication, and workers that
# share two cores must not spin against each other.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.utils import logging as transformers_logging

torch.set_num_threads(1)
pytest_plugins = ["tests.clusters", "tests.services", "tests.evaluators", "tests.order"]
transformers_logging.disable_progress_bar()  # it would stand in what commands print

# How long a draw takes tells of the machine, and of what else it does; not of the code.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
}
FAMILIES = tuple(CONFIGS)
EOS = 256
SHAPES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 257,
    # Large enough that the two best logits lie well apart: greedy paths must not hang on rounding.
    "initializer_range": 0.2,
}


def make_tiny_model(family: str, **overrides: object) -> PreTrainedModel:
    """A random-weight float32 model; mistral has a sliding window shorter than prompts."""
    extra: dict[str, object] = {"sliding_window": 12} if family == "mistral" else {}
    config = CONFIGS[family](**{**SHAPES, **extra, **overrides})
    torch.manual_seed(sum(map(ord, family)))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids equal bytes; 256 ends an answer, 257 pads."""
    alphabet = _byte_symbols()
    raw = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def _byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for every byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def save_model(model: PreTrainedModel, directory: Path) -> Path:
    """Write a model with the byte tokenizer as an ordinary checkpoint directory."""
    model.save_pretrained(directory)
    make_byte_tokenizer().save_pretrained(directory)
    return directory


IMAGE_TOKEN = 290
SIDE, PATCH = 16, 4  # of images that a tower sees, and of its patches, in pixels
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16]]
LLAVA_TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LLAVA_VISION = CLIPVisionConfig(
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=PATCH,
    initializer_range=0.2,
)


def make_llava(kind: str, text: str = "llama", **overrides: object) -> PreTrainedModel:
    """A random float32 model; ``kind`` is its model type, ``overrides`` its language model's."""
    shapes: dict[str, Any] = {**LLAVA_TEXT, **overrides}
    language: PreTrainedConfig = (
        MistralConfig(**shapes, sliding_window=10) if text == "mistral" else LlamaConfig(**shapes)
    )
    torch.manual_seed(7)
    shared: dict[str, Any] = {
        "vision_config": LLAVA_VISION,
        "text_config": language,
        "image_token_index": IMAGE_TOKEN,
    }
    if kind == "llava":
        return LlavaForConditionalGeneration(LlavaConfig(**shared)).eval()
    config = LlavaNextConfig(**shared, image_grid_pinpoints=PINPOINTS)
    return LlavaNextForConditionalGeneration(config).eval()


def make_processor(kind: str) -> Any:
    """The image processor that fits :func:`make_llava`."""
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if kind == "llava":
        return LlavaImageProcessorPil(**sizes)
    return LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS)


def save_llava(directory: Path, kind: str, text: str = "llama", **overrides: object) -> Path:
    """Write a tiny LLaVA with tokenizer (``<image>`` is its placeholder) and image processor."""
    model, tokenizer = make_llava(kind, text, **overrides), make_byte_tokenizer()
    fillers = [f"<unused-{number}>" for number in range(258, IMAGE_TOKEN)]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in (*fillers, "<image>")])
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    make_processor(kind).save_pretrained(directory)
    return directory


def make_encoded_image(seed: int, width: int = 20, height: int = 20, form: str = "PNG") -> bytes:
    """Coloured noise as the bytes of an image file."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=form)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def llava() -> Callable[..., PreTrainedModel]:
    """``llava(kind, text="llama")``."""
    return make_llava


@pytest.fixture(scope="session")
def processor() -> Callable[[str], Any]:
    """``processor(kind)``."""
    return make_processor


def write_published_sets(directory: Path, num_lines: int = 24) -> Path:
    """Random words in the layout and the formats of published sets, short enough for bytes."""
    rng = random.Random(7)

    def words(count: int) -> str:
        return " ".join(rng.choice("abcdefgh") for _ in range(count))

    files: dict[str, list[object]] = {
        "wikitext2/train_part.txt": [words(130) for _ in range(num_lines)],
        "wikitext2/test.txt": [words(60) for _ in range(4)],
        "piqa/train.jsonl": [
            {"goal": words(9), "sol1": words(3), "sol2": words(4), "label": n % 2}
            for n in range(num_lines)
        ],
        "instructions/dolly.jsonl": [
            {"prompt": words(9), "completion": words(5), "task": "instructions"}
            for n in range(num_lines)
        ],
        "arc/arc_easy_test.jsonl": [
            {"prompt": words(8), "choices": [" a", " b c", " d"], "answer": n % 3, "task": "arc"}
            for n in range(6)
        ],
        "long_prompts/xsum.jsonl": [
            {
                "prompt": f"###\nArticle: {words(40)}\n\nSummarize the above article.\n",
                "completion": words(4),
            }
            for _ in range(3)
        ],
    }
    for name, lines in files.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        file.write_text("\n\n".join(texts) + "\n")
    return directory


@pytest.fixture(scope="session")
def tiny_llava_path() -> Callable[..., Path]:
    """``tiny_llava_path(directory, kind, text, **overrides)`` writes a checkpoint; its path."""
    return save_llava


@pytest.fixture(scope="session")
def encoded_image() -> Callable[..., bytes]:
    """``encoded_image(seed, width, height, form="PNG")``."""
    return make_encoded_image


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(family, **config overrides)``."""
    return make_tiny_model


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids equal bytes."""
    return make_byte_tokenizer()


@pytest.fixture(scope="session")
def save_tiny() -> Callable[..., Path]:
    """``save_tiny(directory, family, **overrides)`` writes a checkpoint; returns its path."""

    def save(directory: Path, family: str, **overrides: object) -> Path:
        return save_model(make_tiny_model(family, **overrides), directory / family)

    return save


@pytest.fixture(scope="session")
def testbed_path() -> Path:
    """The shipped test-bed text model."""
    from rayapp.testbed import text_model_path

    return text_model_path()


JOBS = Path(__file__).parents[1] / "jobs"
Done = subprocess.CompletedProcess[str]


def start_job(name: str, *words: object) -> Done:
    command = [sys.executable, str(JOBS / f"{name}.py"), *map(str, words)]
    wide = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=wide
    )


def call_job(name: str, *words: object) -> Done:
    file, out, err = JOBS / f"{name}.py", io.StringIO(), io.StringIO()
    warnings = logging.StreamHandler(err)  # a new process would write them there
    warnings.setLevel(logging.WARNING)
    code: Any = 0
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(out), redirect_stderr(err):
        patched.setattr(sys, "argv", [str(file), *map(str, words)])
        patched.setenv("COLUMNS", "160")
        logging.getLogger().addHandler(warnings)
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            logging.getLogger().removeHandler(warnings)
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def published_sets() -> Callable[..., Path]:
    """``published_sets(directory, num_lines=24)`` writes a small directory of published sets."""
    return write_published_sets


@pytest.fixture(scope="session")
def run_job() -> Callable[..., Done]:
    """``run_job(name, *words)`` runs a file of ``jobs`` as a cluster would: in a new process."""
    return start_job


@pytest.fixture(scope="session")
def run_job_here() -> Callable[..., Done]:
    """``run_job_here(name, *words)`` does the same in this process, which has torch already."""
    return call_job


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse cluster tests that ``make test`` would overlook: it looks for the mark in the text."""
    for item in items:
        if item.get_closest_marker("ray") and "mark.ray" not in item.path.read_text("utf-8"):
            raise pytest.UsageError(f"{item.path}: write pytest.mark.ray in the file itself")


def pytest_collection_finish() -> None:
    """Half a second of every search for garbage went through what torch and its like define."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _leave_nothing_behind() -> object:
    """A module leaves no garbage, and none of what training sets for its whole process."""
    yield
    gc.collect()
    gc.freeze()  # What is alive now lives until the end, and need not be looked at again.
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)
