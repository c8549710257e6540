"""Whether replicas fit: findings that say how much is missing, and which option helps."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from rayapp.distributed.serve.settings import SizeSettings
from rayapp.errors import InputError
from rayapp.workflows import doctor
from rayapp.workflows.sizes import examine_sizes
from tests.models.test_footprint import LLAMA_8B


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama-8b")
    LlamaConfig(**LLAMA_8B, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    return str(directory)


def findings(model, **sizes):
    found = examine_sizes(model, None, SizeSettings.checked(**sizes))
    return {finding.name: finding for finding in found}


def test_both_stages_of_llama_8b_in_24_gib(llama_8b):
    found = findings(llama_8b, memory="24GiB", max_model_len=8192)
    assert [finding.status for finding in found.values()] == ["ok", "ok"]
    assert "weights take 14.96 GiB" in found["decode size"].found
    assert "9 sequences of 8,192 tokens" in found["decode size"].found


def test_what_is_too_long_is_told_with_a_length_that_fits(llama_8b):
    finding = findings(llama_8b, memory="24GiB")["decode size"]
    assert finding.status == "failed"
    assert "6.98 GiB more than the 24.00 GiB" in finding.found
    length = int(finding.remedy.split("--max-model-len ")[1].split()[0])
    assert 65_536 <= length < 75_000
    found = findings(llama_8b, memory="24GiB", max_model_len=length)
    assert found["decode size"].status == "warning"
    assert "of 8 that may run" in found["decode size"].found
    assert "--max-num-seqs" in found["decode size"].remedy


def test_weights_that_do_not_fit_name_other_ways(llama_8b):
    (finding,) = findings(llama_8b, memory="24GiB", mode="unified", dtype="float32").values()
    assert finding.status == "failed"
    assert "--dtype bfloat16" in finding.remedy
    assert "--mode disaggregated" in finding.remedy
    assert "--max-model-len" not in finding.remedy


def test_steps_that_do_not_fit_name_their_options(llama_8b):
    found = findings(llama_8b, memory="15GiB", max_model_len=64, max_num_batched_tokens=65_536)
    assert "--max-num-batched-tokens" in found["prefill size"].remedy


def test_a_configuration_alone_is_enough_and_the_doctor_says_so(llama_8b):
    finding = next(iter(doctor._model(doctor.Path(llama_8b), None)))
    assert finding.status == "warning"
    assert "without weights" in finding.found


def test_bad_sizes_and_models_are_named(tmp_path):
    with pytest.raises(InputError, match="memory"):
        SizeSettings.checked(memory="plenty")
    (finding,) = examine_sizes(str(tmp_path), None, SizeSettings())
    assert finding.status == "failed"
    assert "config.json" in finding.found
