"""Nothing is lost: runs killed at any moment, and rows of any kind."""

import json
import random
import shutil
import signal
import subprocess
import sys

import torch
from conftest import make_rows
from safetensors.torch import load_file
from test_train import ROOT, read_metrics, run

from dataset import load_rows, prepare


def test_killed_at_random_moments_and_resumed(tmp_path, pytestconfig):
    """The demo, killed with SIGKILL again and again, ends with the weights of a run that nobody disturbed.

    A checkpoint is written after every step, so that many of the kills fall into the writing of one.
    `uv run pytest tests/test_robust.py --kills 20` is the long form.
    """
    n_kills = pytestconfig.getoption("kills")
    words = [
        sys.executable, "dpo_train.py", "--demo", "--max_train_samples", "400", "--train_batch_size", "16",
        "--max_steps", str(8 + 5 * n_kills), "--save_steps", "1", "--max_eval_samples", "20", "--eval_steps", "0",
        "--max_new_tokens", "0", "--logging_steps", "1",
    ]  # fmt: skip
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*words, "--output_dir", str(whole)], cwd=ROOT, check=True, capture_output=True)
    one_before, last = sorted(path.stat().st_mtime for path in whole.glob("checkpoint-*"))  # two are kept
    seconds_per_step = last - one_before

    rng, kills, resumes = random.Random(0), 0, 0
    while True:
        resume = ["--resume_from_checkpoint", "latest"] if any(folder.glob("checkpoint-*")) else []
        resumes += bool(resume)
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(
            [*words, "--output_dir", str(folder), *resume], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if kills < n_kills:
            n_steps = rng.randint(1, 3)
            for line in process.stdout:  # wait for a few steps: a kill before them tests nothing
                n_steps -= line.startswith(b"step ")
                if not n_steps:
                    break
            try:
                process.communicate(timeout=rng.uniform(0, 2 * seconds_per_step))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
        _, error = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error.decode()
    assert kills == n_kills and resumes
    ours, theirs = load_file(folder / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    trajectories = [
        [(line["step"], line["loss"]) for line in read_metrics(path) if "loss" in line] for path in (folder, whole)
    ]
    assert trajectories[0] == trajectories[1]


def fuzzed_rows(n, seed=0):
    """Rows that can't train: good ones with a field missing, null, of a wrong type, nested, empty or not Unicode."""
    rng = random.Random(seed)
    junk = [None, 0, -1.5, True, "", " \n", [], {}, [[]], [None], {"from": "gpt"}, {"value": "x"}, "\ud800",
            ["\udfff"], {"from": 3, "value": "x"}, {"from": "gpt", "value": {"a": [1]}},
            [{"from": "gpt", "value": "x"}] * 2]  # fmt: skip
    rows = []
    while len(rows) < n:
        row = rng.choice(make_rows(8, seed=rng.randrange(1000)))
        field = rng.choice(["conversations", "chosen", "rejected"])
        damage = rng.randrange(4)
        if damage == 0:
            del row[field]
        elif damage == 1:
            row[field] = rng.choice(junk)
        elif damage == 2:
            row["rejected"] = row["chosen"]
        else:
            row = rng.choice([None, 1, "text", [], [row], {}])
        if (
            isinstance(row, dict)
            and isinstance(row.get(field), str)
            and row[field].strip()
            and field != "conversations"
        ):
            continue  # a response as plain text is accepted
        rows.append(row)
    return rows


def strange_rows():
    """Rows that look odd and are good: their texts are trained on as they are."""
    texts = ["\x00", "!" * 9, "<|im_end|>", "<|im_start|>assistant\n", "\ufdd00\ufdd1", "好" * 100_000, "a" * 100_000,
             "\u202e反", "👩‍👩‍👧", "\r\n", '"}],', "\\ud800", "{{ messages }}", "{% raise %}"]  # fmt: skip
    for i, text in enumerate(texts):
        yield {
            "conversations": [{"from": "human", "value": f"问{i}{text[:50]}"}],
            "chosen": {"from": "gpt", "value": f"好{text}"},
            "rejected": {"from": "gpt", "value": f"坏{text}"},
        }


def test_fuzzed_rows_cost_nothing(tmp_path, tokenizer, model_dir):
    good = [*make_rows(450), *strange_rows()][-1000:]
    bad = fuzzed_rows(1000)
    mixed = [(row, True) for row in good] + [(row, False) for row in bad]
    random.Random(1).shuffle(mixed)
    path = tmp_path / "mixed.jsonl"
    with path.open("wb") as file:
        for row, _ in mixed:
            file.write(json.dumps(row).encode() + b"\n")
        file.write(b'{"conversations": "\xff\xfe"\n\x00\n[[[[[[\n' + b"[" * 100_000 + b"\n")
    data = prepare(load_rows(str(path)), tokenizer, max_length=128, max_eval_samples=0)
    assert sorted(data.train.rows) == [i for i, (_, is_good) in enumerate(mixed) if is_good]
    assert sum(count for count, _ in data.dropped.values()) == len(bad) + 4

    alone = tmp_path / "good.jsonl"
    alone.write_text("".join(json.dumps(row) + "\n" for row, is_good in mixed if is_good))
    clean = prepare(load_rows(str(alone)), tokenizer, max_length=128, max_eval_samples=0)
    assert clean.fingerprint == data.fingerprint  # not one token differs
    run(model_dir, path, tmp_path / "run", max_steps=3)
