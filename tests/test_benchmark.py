"""The scripts that measure what docs/performance.md shows: they run, and what they count can be counted by hand."""

import argparse
import itertools
import re
import subprocess
import sys
from pathlib import Path

import benchmark
import pytest
import torch
from fake_training import Storages, Training, as_on_a_gpu, full_micro_batch, peak
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

import dpo_train
import loss
from dataset import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_benchmark_compares_the_same_training(monkeypatch, capsys):
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
def small(tmp_path, monkeypatch):
    """What benchmark.py would take from the command line for the sample model, and a full micro-batch."""
    benchmark.write_coig_p_shaped(tmp_path / "pairs.jsonl", n_queries=40)
    args = argparse.Namespace(
        model=str(ROOT / "docs" / "sample" / "model"), data=str(tmp_path / "pairs.jsonl"), max_length=256, seed=0,
        pairs=64, steps=1, learning_rate=1e-3, fp32=False, micro_batch_tokens=None, attention="sdpa",
    )  # fmt: skip
    steps = benchmark.prepare_steps(benchmark.our_flags(args))
    return args, steps, full_micro_batch(steps, 1024)


@pytest.mark.parametrize("changes", [
    {}, {"gradient_checkpointing": True}, {"precompute_ref_log_probs": True}, {"attn_implementation": "tree"},
], ids=str)  # fmt: skip
def test_a_step_on_fake_tensors_takes_what_a_real_one_takes(small, changes):
    """By the same count within 0.1%, by torch's profiler, which sees what kernels take for themselves, within 5%."""
    args, steps, batch = small
    flags = benchmark.our_flags(args, **{"attn_implementation": "sdpa"} | changes)
    on_fake = peak(flags, steps, batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        on_real = peak(flags, steps, batch, fake=False)
    events = sorted(
        (e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    assert on_fake == pytest.approx(on_real, rel=1e-3)
    assert on_fake == pytest.approx(max(itertools.accumulate(n for _, n in events)), rel=0.05)


def test_the_rehearsal_takes_at_least_what_a_step_takes(small):
    """A run that passes it has room for its steps. 1%: what is in a step besides."""
    args, steps, batch = small
    for changes in {}, {"gradient_checkpointing": True}, {"precompute_ref_log_probs": True}:
        flags = benchmark.our_flags(args, attn_implementation="sdpa", **changes)
        with FakeTensorMode(allow_non_fake_inputs=True):
            training = Training(flags, steps)
            reference = training.reference.scorer.model
            with Storages() as storages:
                for model in {training.policy, reference}:
                    storages.add(model.parameters())
                dpo_train.rehearse(training.policy, reference, steps.collate, training.accelerator, flags)
        assert storages.peak > 0.99 * peak(flags, steps, batch)


class TooSmall(Storages):
    """A GPU of so many bytes."""

    limit = float("inf")

    def add(self, tensors) -> None:
        super().add(tensors)
        if self.now > self.limit:
            raise torch.OutOfMemoryError("fake")


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}], ids=str)
def test_the_advice_of_the_rehearsal_fits(slow, small, tmp_path, monkeypatch, more):
    """With 16 GB, at Qwen2.5-0.5B's size: what does not fit is noticed, what is advised then fits."""
    args, steps, _ = small
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    args.model, steps.collate.micro_batch_tokens = str(tmp_path), 32_768
    flags = benchmark.our_flags(args, attn_implementation="sdpa", max_length=1024, **more)
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_a_gpu():
        training = Training(flags, steps)
        models = training.policy, training.reference.scorer.model

        def rehearse() -> None:
            with TooSmall() as gpu:
                for model in models:
                    gpu.add(model.parameters())
                taken, gpu.limit = gpu.now, 16e9
                monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: taken)
                monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: gpu.now)
                monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gpu.limit - gpu.now, gpu.limit))
                monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)
                dpo_train.rehearse(*models, steps.collate, training.accelerator, flags)

        with pytest.raises(UserError) as refusal:
            rehearse()
        steps.collate.micro_batch_tokens = int(re.search(r"try --micro_batch_tokens (\d+)", str(refusal.value))[1])
        rehearse()


def test_cards_get_the_flags_that_fit(small, monkeypatch, capsys):
    """Of peaks like those of Qwen2.5-0.5B."""
    args, *_ = small
    args.max_length, args.pairs = 1024, 300

    def peak_like(flags, steps, batch) -> float:
        both = (10.5, 1.73e-3), (10.4, 0.19e-3)
        fixed, slope = both[flags.gradient_checkpointing]
        return 1e9 * (fixed + slope * steps.collate.micro_batch_tokens - 1.26 * flags.precompute_ref_log_probs)

    monkeypatch.setattr(benchmark, "peak", peak_like)
    benchmark.memory(args)
    rows = [
        line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if " GB | `" in line or "none" in line
    ]
    ckpt, ready = "--gradient_checkpointing true", "--precompute_ref_log_probs true"
    assert {row[0].strip("| "): row[1].strip("`") for row in rows} == {
        "8 GB": "none", "12 GB": f"{ckpt} {ready} --micro_batch_tokens 6144", "16 GB": ckpt,
        "24 GB": "--micro_batch_tokens 6144", "32 GB": "the defaults", "48 GB": "the defaults", "80 GB": "the defaults",
    }  # fmt: skip


def test_flops_by_hand(small, monkeypatch, capsys):
    """2 for a weight and a token: in the policy's forward pass, twice in its backward pass, in the reference, and the
    head's logits once more. Attention: 2 products forward, 5 backward, 2 in the reference."""
    monkeypatch.setattr(loss, "TILES", dict(loss.TILES))
    args, *_ = small
    args.pairs = 4
    benchmark.flops(args)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "2 pairs a forward" in line]
    steps, config = benchmark.prepare_steps(benchmark.our_flags(args)), AutoConfig.from_pretrained(args.model)
    batches = benchmark.rows_as_trl_pads(steps.pairs.read(steps.indices(0)), 2)
    n_places, n_scored = (sum(batch[name].numel() for batch in batches) for name in ("input_ids", "target_ids"))
    weights = AutoModelForCausalLM.from_config(config).named_parameters()
    layers = sum(weight.numel() for name, weight in weights if "proj.weight" in name)
    head = config.vocab_size * config.hidden_size
    square = sum(len(batch["input_ids"]) * batch["input_ids"].shape[1] ** 2 for batch in batches)
    attention = (2 + 5 + 2) * 2 * config.num_hidden_layers * config.hidden_size * square
    expected = 2 * 4 * layers * n_places + attention + 2 * 5 * head * n_scored
    assert float(rows[0][5]) == pytest.approx(expected / 4 / 1e12, rel=1e-3)
    assert float(rows[1][5]) == pytest.approx((expected + 2 * 5 * head * (n_places - n_scored)) / 4 / 1e12, rel=1e-3)


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

    def gradients(dtype, *tiles) -> list[torch.Tensor]:
        monkeypatch.setitem(loss.TILES, "cpu", tiles)
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        (loss.response_logps(*leaves, targets, response, 8, dtype) * signs).sum().backward()
        return [leaf.grad.double() for leaf in leaves]

    exact = gradients(torch.float32, n_tokens, n_words)
    for cut in (1, 1), (1, 19), (1, 149), (16, 19):
        tiles = n_tokens // cut[0], n_words // cut[1] + 1
        for name, right, rough in zip(("hidden", "weight"), exact, gradients(torch.bfloat16, *tiles), strict=True):
            error = rough - right
            along, mean = (error * right).sum() / right.pow(2).sum(), error.mean() / right.abs().mean()
            relative = error.norm() / right.norm()
            print(f"{cut} tiles, gradient of {name}: signed {along:.1e}, mean {mean:.1e}, relative {relative:.1e}")
            assert abs(along) < 3e-4 and abs(mean) < 3e-4 and relative < 5e-3


def test_study_of_the_order():
    """Grouped steps must share more: fewer tokens a pair."""
    words = ["--seeds", "1", "--rates", "2e-4", "--flips", "0.25", "--max_steps", "2", "--max_eval_samples", "20"]
    command = [sys.executable, "tests/study_order.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| 0.25")]
    tokens = {row[2].strip(): float(row[-2]) for row in rows}
    assert tokens["grouped"] < 0.6 * tokens["spread"], done.stderr
