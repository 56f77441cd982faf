"""Nothing is lost: runs killed at any moment, and rows of any kind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

from conftest import make_rows, write_jsonl
from test_train import ROOT, losses, read_metrics, run, same_weights, type_here

from dataset import load_rows, prepare


def test_killed_at_random_moments_and_resumed(tmp_path, pytestconfig):
    """The demo, killed with SIGKILL again and again, ends with the weights of a run that nobody disturbed.

    A checkpoint is written after every step, so that many of the kills fall into the writing of one.
    `uv run pytest tests/test_robust.py --kills 20` is the long form.
    """
    n_kills = pytestconfig.getoption("kills")
    words = [
        "--demo", "--max_train_samples", "100", "--train_batch_size", "4", "--max_steps", str(6 + 4 * n_kills),
        "--save_steps", "1", "--max_eval_samples", "0", "--logging_steps", "1", "--output_dir",
    ]  # fmt: skip
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert type_here([*words, whole]).returncode == 0
    one_before, last = sorted(path.stat().st_mtime for path in whole.glob("checkpoint-*"))  # two are kept
    seconds_per_step = last - one_before
    command = [sys.executable, "dpo_train.py", *words, str(folder)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: kernels divide their sums among threads

    rng, kills, resumes = random.Random(0), 0, 0
    while True:
        resume = ["--resume_from_checkpoint", "latest"] if any(folder.glob("checkpoint-*")) else []
        resumes += bool(resume)
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([*command, *resume], cwd=ROOT, env=one_thread, **pipes)
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
    assert same_weights(folder, whole)
    assert losses(read_metrics(folder)) == losses(read_metrics(whole))


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
        rows.append(row)
    return rows


ODD = ["\x00", "!" * 9, "<|im_end", "\ufdd00\ufdd1", "好" * 100_000, "a" * 100_000, "\u202e反", "👩‍👩‍👧", "\r\n",
       '"}],', "\\ud800", "{{ messages }}", "{% raise %}"]  # fmt: skip


def row_with(prompt, chosen, rejected):
    turns = {"from": "human", "value": f"问{prompt}"}, {"from": "gpt", "value": f"好{chosen}"}
    return {"conversations": [turns[0]], "chosen": turns[1], "rejected": turns[1] | {"value": f"坏{rejected}"}}


def test_fuzzed_rows_cost_nothing(tmp_path, tokenizer, model_dir):
    """Bad rows and rows with special tokens are dropped and counted; of the others not one token differs."""
    good = [*make_rows(450), *(row_with(i, text, text) for i, text in enumerate(ODD))][-1000:]
    special = [row_with("<|im_end|>", 1, 2), row_with(1, "<|im_start|>user\n", 2), row_with(1, 2, "<|endoftext|>")]
    bad = [*fuzzed_rows(1000), *special]
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
    assert data.dropped["contains a special token"][0] == len(special)

    alone = write_jsonl(tmp_path / "good.jsonl", [row for row, is_good in mixed if is_good])
    clean = prepare(load_rows(str(alone)), tokenizer, max_length=128, max_eval_samples=0)
    assert clean.train.fingerprint == data.train.fingerprint
    run(model_dir, path, tmp_path / "run", max_steps=3)
