"""The script that measures what docs/performance.md shows: it runs, and what it counts is what is computed."""

import argparse
import json
import sys
from pathlib import Path

import benchmark
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import loss


def test_benchmark_compares_the_same_training(slow, monkeypatch, capsys):
    """Exit 0 means that the losses agree; sharing must encode fewer tokens for the same pairs."""
    words = ["--pairs", "8", "--steps", "2", "--max_length", "64", "--fp32", "--only", "ours|ours, sharing off"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert benchmark.main() == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ours")]
    assert [row[1].strip() for row in rows] == ["ours", "ours, sharing off"]
    shared, unshared = (int(row[4]) for row in rows)
    assert shared < 0.8 * unshared


@pytest.fixture
def dry(tmp_path) -> argparse.Namespace:
    """What a part gets in `benchmark.py --gpu --dry`."""
    args = benchmark.read_words(["--gpu", "--dry"])
    args.scratch, args.results = str(tmp_path), str(tmp_path / "results.jsonl")
    return args


def results(args: argparse.Namespace) -> list[dict]:
    lines = [json.loads(line) for line in Path(args.results).read_text().splitlines()]
    assert not [line for line in lines if "failed" in line or "refused" in line]
    return lines


def test_the_parts_for_a_gpu(dry):
    """In this process, on any device: each line is in order."""
    for part in benchmark.machine, benchmark.core, benchmark.more, benchmark.variants:
        part(dry)
    lines = results(dry)
    errors = [value for line in lines for name, value in line.items() if name.startswith("error_of")]
    assert len(errors) >= 8 and max(errors) < 0.02
    runs = {line["run"]: line for line in lines if "run" in line}
    assert len(runs) == 11
    ours = runs["defaults"]
    assert ours["kernels"] and ours["kernels_busy_seconds"] > 0 and ours["mfu"] > 0
    assert ours["tflop_a_pair"] < runs["sharing off"]["tflop_a_pair"]
    assert runs["precomputed"]["tflop_a_pair"] == pytest.approx(0.75 * ours["tflop_a_pair"], rel=0.2)
    assert all(run["grad_norm"] == pytest.approx(ours["grad_norm"], rel=0.02) for run in runs.values())


def test_the_command_for_a_gpu(tmp_path, monkeypatch, capsys):
    """A part that fails costs only itself; results are in the file; TRL may be missing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--gpu", "--dry", "--only", "machine|trl", "--output", str(tmp_path / "results.jsonl")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    assert benchmark.main() == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines if "part" in line] == ["machine", "trl"]
    assert [line for line in lines if line.get("table") == "ours" and line["pairs_per_second"] > 0]
    assert "in short" in capsys.readouterr().out


def test_arithmetic_is_what_is_computed(dry, monkeypatch):
    """Matrix products, by torch's own count: the head's logits once more than is needed, in the backward pass."""
    benchmark.prepare_inputs(dry)
    watch, counted, expected = benchmark.Watch(), [], []
    original = watch.original

    def count(batches, n_pairs, scorer, *others):
        with FlopCounterMode(display=False) as counter:
            found = original(batches, n_pairs, scorer, *others)
        kinds = counter.get_flop_counts()["Global"]
        counted.append(sum(n for kind, n in kinds.items() if str(kind) in ("aten.mm", "aten.addmm")))
        n_tokens, n_scored = (sum(t[name].numel() for t, _ in batches) for name in ("input_ids", "target_ids"))
        head = scorer.model.get_output_embeddings().weight.numel()
        expected.append(benchmark.arithmetic(scorer.model, n_tokens, n_scored, 0) + 2 * head * n_scored)
        return found

    watch.original = count
    benchmark.run_ours(dry, watch=watch)
    assert counted == expected


@pytest.mark.parametrize("n_tokens, n_words, hidden_size", [(128, 8192, 256), (256, 151_936, 896)])
def test_gradients_of_the_head_in_bf16_have_no_bias(n_tokens, n_words, hidden_size, request, monkeypatch):
    """Against float32, by the number of tiles. Signed: how much too long the gradient is along itself, and the mean of
    the errors in units of the mean magnitude; relative: the norm of the error. The larger one is Qwen2.5-0.5B's."""
    if n_words > 10_000:
        request.getfixturevalue("slow")
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(n_tokens, hidden_size, generator=random)
    weight = 0.02 * torch.randn(n_words, hidden_size, generator=random)
    targets = torch.randint(n_words, (n_tokens,), generator=random)
    response = torch.arange(n_tokens) // (n_tokens // 8)
    signs = torch.tensor([0.0625, -0.0625]).repeat(4)  # chosen up, rejected down; by what bf16 holds exactly

    def gradients(dtype, n_tiles) -> list[torch.Tensor]:
        monkeypatch.setattr(loss, "TILE_WORDS", n_words // n_tiles + 1)
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        (loss.response_logps(*leaves, targets, response, 8, dtype) * signs).sum().backward()
        return [leaf.grad.double() for leaf in leaves]

    exact = gradients(torch.float32, 1)
    for n_tiles in (1, 19, 149):
        for name, right, rough in zip(("hidden", "weight"), exact, gradients(torch.bfloat16, n_tiles), strict=True):
            error = rough - right
            along, mean = (error * right).sum() / right.pow(2).sum(), error.mean() / right.abs().mean()
            relative = error.norm() / right.norm()
            print(f"{n_tiles} tiles, gradient of {name}: signed {along:.1e}, mean {mean:.1e}, relative {relative:.1e}")
            assert abs(along) < 3e-4 and abs(mean) < 3e-4 and relative < 5e-3
