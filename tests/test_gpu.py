"""On a GPU, and only there: `uv run pytest tests/test_gpu.py`. Skipped without one, and never run by us yet.

Models have Qwen2.5-0.5B's size and random weights; nothing is downloaded.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmark import write_coig_p_shaped
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "docs" / "sample" / "model"
CARDS = {  # GB: flags, peak in GB by `tests/benchmark.py --memory`
    16: ("--micro_batch_tokens 8192 --gradient_checkpointing true", 12.0),
    24: ("--micro_batch_tokens 6144", 20.6),
    32: ("", 24.6),
}
LIMITED = """
import sys, dpo_train, torch
limit = float(sys.argv[1])
if limit:
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
sys.exit(dpo_train.main(sys.argv[2:]))
"""
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def start(*words, limit: float = 0, gpu: bool = True, **options) -> subprocess.Popen:
    """dpo_train.py with these flags, in a process that may take `limit` bytes of the GPU, if not 0."""
    environment = os.environ | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, "-c", LIMITED, str(limit), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **options)


def run(folder: Path, *words, **options) -> list[dict]:
    """The lines of metrics.jsonl of a run that must succeed."""
    process = start(*words, "--output_dir", folder, **options)
    error = process.communicate(timeout=900)[1]
    assert process.returncode == 0, error
    return read(folder)


def read(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="session")
def full_size(tmp_path_factory) -> list:
    """Flags that train a model of Qwen2.5-0.5B's size for three steps of pairs of COIG-P's shape."""
    folder = tmp_path_factory.mktemp("full")
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(SAMPLE).save_pretrained(folder / "model")
    write_coig_p_shaped(folder / "pairs.jsonl", n_queries=200)
    words = {
        "model_name_or_path": folder / "model", "dataset_name": folder / "pairs.jsonl", "max_length": 1024,
        "train_batch_size": 512, "max_steps": 3, "max_eval_samples": 0, "save_steps": 0, "logging_steps": 1,
    }  # fmt: skip
    return [word for name, value in words.items() for word in (f"--{name}", value)]


def test_the_demo(tmp_path):
    lines = run(tmp_path / "run", "--demo")
    assert losses(lines)[0] == pytest.approx(0.693147, abs=1e-4) and lines[-1]["eval_loss"] < 0.6
    assert lines[-1]["eval_rewards/accuracies"] > 0.9
    assert any("peak_memory_gb" in line for line in lines)
    for name in ("model.safetensors", "report.md", "loss.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_ten_steps_as_on_a_cpu(tmp_path):
    words = ["--demo", "--max_steps", 10, "--max_eval_samples", 0, "--save_steps", 0]
    expected = losses(run(tmp_path / "cpu", *words, gpu=False))
    assert len(expected) == 10
    for attention in ("sdpa", "tree"):
        found = losses(run(tmp_path / attention, *words, "--attn_implementation", attention))
        assert found == pytest.approx(expected, abs=1e-4)
        # In bf16, `tree` is another kernel: torch's varlen_attn.
        words_bf16 = [*words, "--mixed_precision", "bf16", "--attn_implementation", attention]
        assert losses(run(tmp_path / f"{attention}-bf16", *words_bf16)) == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("limit, more", [(16e9, []), (14e9, ["--gradient_checkpointing", "true"])])
def test_the_advice_of_the_rehearsal(full_size, tmp_path, limit, more):
    """Too large a micro-batch is found before the first step; what is then advised fits."""
    process = start(*full_size, *more, "--micro_batch_tokens", 65_536, "--output_dir", tmp_path / "1", limit=limit)
    error = process.communicate(timeout=900)[1]
    advised = re.search(r"try --micro_batch_tokens (\d+)", error)
    assert process.returncode == 1 and advised and not read(tmp_path / "1"), error
    run(tmp_path / "2", *full_size, *more, "--micro_batch_tokens", advised[1], limit=limit)


@pytest.mark.parametrize("card", CARDS)
def test_what_fits_on_a_card(full_size, tmp_path, card):
    """Without 1.5 GB that the process has outside of torch's allocator; and the count on fake tensors was right."""
    flags, expected = CARDS[card]
    limit = card * 2**30 - 1.5e9
    if torch.cuda.mem_get_info()[0] < limit:
        pytest.skip("this GPU is smaller")
    lines = run(tmp_path / "run", *full_size, *flags.split(), limit=limit)
    assert lines[-1]["peak_memory_gb"] == pytest.approx(expected, rel=0.1)


def test_sigterm(tmp_path):
    """Stops after the step with a checkpoint, and goes on from there."""
    expected = losses(run(tmp_path / "whole", "--demo"))
    words = ["--demo", "--output_dir", tmp_path / "run"]
    process = start(*words)
    deadline = time.time() + 300
    while len(losses(read(tmp_path / "run"))) < 5 and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "resume_from_checkpoint latest" in error, error
    resumed = losses(run(tmp_path / "run", "--demo", "--resume_from_checkpoint", "latest"))
    assert resumed == pytest.approx(expected, abs=1e-4)
