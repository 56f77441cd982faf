"""The scripts that measure what docs/performance.md shows: they run, and what they count can be counted by hand."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def benchmark(*words: str) -> str:
    done = subprocess.run([sys.executable, "tests/benchmark.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_benchmark_compares_the_same_training():
    """Exit 0 means that the losses agree; sharing must encode fewer tokens for the same pairs."""
    words = ["--pairs", "16", "--steps", "2", "--max_length", "128", "--fp32", "--only", "ours|ours, sharing off"]
    rows = [line.split("|") for line in benchmark(*words).splitlines() if line.startswith("| ours")]
    assert [row[1].strip() for row in rows] == ["ours", "ours, sharing off"]
    shared, unshared = (int(row[4]) for row in rows)
    assert shared < 0.8 * unshared


def test_bytes_per_token_are_those_of_the_sample_model():
    """By hand, for 4 layers of hidden size 256, 128 of keys and of values, 768 inner, in float32, at the least:

    inputs of the two norms 2 * 256, query, key, value 512, attention's output 256, gate, up and their product
    3 * 768: 3,584 numbers a layer, 57 kB in all. Norms and rotary embeddings keep copies in addition.
    """
    megabytes = float(benchmark("--bytes_per_token", "--max_length", "256", "--fp32").split()[0])
    assert 0.057 < megabytes < 3 * 0.057


def test_study_of_the_order():
    """Grouped steps must share more: fewer tokens a pair."""
    words = ["--seeds", "1", "--rates", "2e-4", "--flips", "0.25", "--max_steps", "2", "--max_eval_samples", "20"]
    command = [sys.executable, "tests/study_order.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| 0.25")]
    tokens = {row[2].strip(): float(row[-2]) for row in rows}
    assert tokens["grouped"] < 0.6 * tokens["spread"], done.stderr
