"""Does it matter that a prompt's pairs are in one step? The sample model and data, grouped against spread out.

    uv run tests/study_order.py --seeds 1 2 3
    uv run tests/study_order.py --seeds 1 2 3 --shuffle prompts --num_train_epochs 2.9     # as many tokens as the other

Both see the same pairs once, in steps of the same size, from the same start; only the order differs. `prompts` is the
default of dpo_train.py (a prompt's pairs together); `pairs` is a plain shuffle, in which hardly a prompt or a response
is shared within a step. Held-out loss and accuracy at the end, one line a run.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dpo_train

FIGURES = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen", "tokens")


def one_run(shuffle: str, seed: int, flags: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        words = ["--demo", "--output_dir", f"{folder}/run", "--seed", str(seed), "--shuffle", shuffle]
        words += ["--max_new_tokens", "0"]
        dpo_train.train(dpo_train.parse_flags([*words, "--save_steps", "0", "--eval_steps", "0", *flags]))
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line]
    tokens = sum(line["tokens_per_second"] / line["pairs_per_second"] for line in steps) / len(steps)
    return {**lines[-1], "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--shuffle", nargs="+", default=["prompts", "pairs"])
    args, flags = parser.parse_known_args()  # others are dpo_train.py's
    print("| --shuffle | seed | held-out loss | accuracy | margin | log p of chosen | tokens a pair |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in args.shuffle:
        runs = [one_run(name, seed, flags) for seed in args.seeds]
        for seed, found in zip(args.seeds, runs, strict=True):
            print(f"| {name} | {seed} | " + " | ".join(f"{found[key]:.4g}" for key in FIGURES) + " |", flush=True)
        means = [statistics.fmean(found[key] for found in runs) for key in FIGURES]
        print(f"| {name} | mean | " + " | ".join(f"{value:.4g}" for value in means) + " |", flush=True)


if __name__ == "__main__":
    main()
