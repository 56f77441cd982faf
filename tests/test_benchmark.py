"""The scripts that measure what docs/performance.md shows: they run, and what they count is what is computed."""

import argparse
import json
import sys

import benchmark
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dataset import TreeCollator
from loss import ResponseScorer, attend_by_segment, plan_attention


@pytest.fixture
def run_benchmark(monkeypatch, capsys):
    def run(*words: str) -> tuple[dict[str, list[dict]], str]:
        """What each run found, and all of stdout. 0 means that none failed and that losses agree."""
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
        assert benchmark.main() == 0
        found, stdout = {}, capsys.readouterr().out
        for line in (json.loads(line) for line in stdout.splitlines() if line.startswith("{")):
            found.setdefault(line["run"], []).append(line)
        return found, stdout

    return run


def test_benchmark_compares_the_same_training(slow, run_benchmark):
    """Sharing must encode fewer tokens for as many pairs."""
    words = ["--pairs", "8", "--steps", "2", "--max_length", "64", "--fp32"]
    found, stdout = run_benchmark(*words, "--only", "ours|ours checkpointing|ours, spread out")
    ours, checkpointing, spread = (found[name][0] for name in ("ours", "ours checkpointing", "ours, spread out"))
    assert checkpointing["losses_differ_by"] < 1e-4 and "losses_differ_by" not in spread
    assert ours["tokens_per_pair"] < 0.8 * spread["tokens_per_pair"] < 0.8 * spread["separate_per_pair"]
    assert "| ours checkpointing |" in stdout


def test_the_two_ways_to_attend_are_measured(capsys):
    """As a worker does it."""
    assert benchmark.work(argparse.Namespace(worker="machine", dry=True)) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    errors = [line[name] for line in lines for name in line if name.startswith("error_of")]
    assert len(errors) >= 8 and 0 < max(errors) < 0.02


def test_the_command_for_a_gpu(run_benchmark, pytestconfig, tmp_path):
    """Each line is in order, on any device, and in the file; TRL may be missing. With --slow all parts, else one."""
    is_slow, file = pytestconfig.getoption("slow"), tmp_path / "results.jsonl"
    only = ".*" if is_slow else "core"
    found, stdout = run_benchmark("--gpu", "--dry", "--seconds", "3600", "--only", only, "--output", str(file))
    assert file.read_text().splitlines() == [line for line in stdout.splitlines() if line.startswith("{")]
    (ours,) = found["defaults"]
    assert ours["kernels"] and 0 < ours["kernels_busy_seconds"] and ours["tflops"] > 0
    if is_slow:
        ours, precomputed = (found[name][0]["tflop_per_pair"] for name in ("8192 tokens", "ours precomputed"))
        assert precomputed == pytest.approx(0.75 * ours)
        compared = [name for name, lines in found.items() if "losses_differ_by" in lines[-1]]
        assert {"ours precomputed", "in 16 GiB", "demo, float32", "demo, resumed"} <= {*compared}


def test_arithmetic_is_what_is_computed():
    """Matrix products, by torch's own count: the head's logits once more than is needed, in the backward pass."""
    model = AutoModelForCausalLM.from_pretrained(benchmark.SAMPLE, dtype=torch.float32, attn_implementation="tree")
    pairs = [{"index": i, "prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10 + i]} for i in range(3)]
    (batch,) = TreeCollator(100)(pairs)
    plan = plan_attention(batch.segments, torch.device("cpu"), torch.float32, attend_by_segment)
    with FlopCounterMode(display=False) as counter:
        ResponseScorer(model, torch.float32)(batch.tensors, plan).sum().backward()
    kinds = counter.get_flop_counts()["Global"]
    counted = sum(n for kind, n in kinds.items() if str(kind) in ("aten.mm", "aten.addmm"))
    n_tokens, n_scored = (batch.tensors[name].numel() for name in ("input_ids", "target_ids"))
    once_more = 2 * model.get_output_embeddings().weight.numel() * n_scored
    assert counted == benchmark.arithmetic(model, n_tokens, n_scored, 0, passes=3) + once_more
