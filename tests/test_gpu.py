"""On a GPU, and only there: `python -m pytest tests/test_gpu.py`. `tests/benchmark.py --gpu` measures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def start(folder, *words, **environment):
    command = [sys.executable, "dpo_train.py", "--demo", "--output_dir", *map(str, (folder, *words))]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def read(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(lines):
    return [line["loss"] for line in lines if "loss" in line]


def run(folder, *words, **environment):
    """What a run has logged that must succeed."""
    process = start(folder, *words, **environment)
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0, error
    return read(folder)


def test_the_demo_as_on_a_cpu(tmp_path):
    words = ["--max_steps", 10, "--save_steps", 0, "--max_new_tokens", 0]
    expected = losses(run(tmp_path / "cpu", *words, CUDA_VISIBLE_DEVICES=""))
    assert len(expected) == 10 and expected[0] == pytest.approx(0.693147, abs=1e-4)
    assert losses(run(tmp_path / "float32", *words)) == pytest.approx(expected, abs=1e-4)
    lines = run(tmp_path / "bf16", *words, "--mixed_precision", "bf16")
    assert losses(lines) == pytest.approx(expected, abs=2e-2)
    assert lines[0]["device"].endswith("attend at once"), lines[0]  # the kernel passed the check
    assert all(line["peak_memory_gb"] > 0 for line in lines if "loss" in line)


def test_stopped_by_sigterm_and_resumed(tmp_path):
    """Stops after the step with a checkpoint, and goes on from there to where a whole run ends."""
    expected = losses(run(tmp_path / "whole", "--max_new_tokens", 0))
    process, deadline = start(tmp_path / "run", "--max_new_tokens", 0), time.time() + 300
    while len(losses(read(tmp_path / "run"))) < 5 and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "resume_from_checkpoint latest" in error, error
    n_steps = len(losses(read(tmp_path / "run")))
    lines = run(tmp_path / "run", "--max_new_tokens", 0, "--resume_from_checkpoint", "latest")
    assert 5 <= n_steps < len(expected) and losses(lines) == pytest.approx(expected, abs=1e-4)
    assert [line["step"] for line in lines if line.get("event") == "resumed"] == [n_steps]
