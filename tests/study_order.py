"""Does it matter that a prompt's pairs are in one step? The sample model and data, grouped against spread out.

    uv run tests/study_order.py --seeds 1 2 3

Both see the same pairs once, in steps of the same size, from the same start; only the order differs. Grouped is what
dpo_train.py does (prompts shuffled, a prompt's pairs together); spread out is a plain shuffle of the pairs, in which
hardly a prompt or a response is shared within a step. Held-out loss and accuracy at the end, one line a run.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dpo_train

FIGURES = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen", "tokens")


def spread_out(keys: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(len(keys))


def one_run(order, seed: int, flags: list[str]) -> dict[str, float]:
    dpo_train.epoch_order = order
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        words = ["--demo", "--output_dir", f"{folder}/run", "--seed", str(seed), "--max_new_tokens", "0"]
        dpo_train.train(dpo_train.parse_flags([*words, "--save_steps", "0", "--eval_steps", "0", *flags]))
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line]
    tokens = sum(line["tokens_per_second"] / line["pairs_per_second"] for line in steps) / len(steps)
    return {**lines[-1], "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args, flags = parser.parse_known_args()
    print("| order | seed | held-out loss | accuracy | margin | log p of chosen | tokens a pair |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, order in (("grouped", dpo_train.epoch_order), ("spread out", spread_out)):
        runs = [one_run(order, seed, flags) for seed in args.seeds]
        for seed, found in zip(args.seeds, runs, strict=True):
            print(f"| {name} | {seed} | " + " | ".join(f"{found[key]:.4g}" for key in FIGURES) + " |", flush=True)
        means = [statistics.fmean(found[key] for found in runs) for key in FIGURES]
        print(f"| {name} | mean | " + " | ".join(f"{value:.4g}" for value in means) + " |", flush=True)


if __name__ == "__main__":
    main()
