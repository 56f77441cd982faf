"""Does it matter that a prompt's pairs are in one step? The bundled model and data, grouped against spread out.

    uv run tests/study_order.py                                             # 48 runs: half an hour on two cores
    uv run tests/study_order.py --flips 0 --rates 2e-4 --num_train_epochs 2.9     # other flags are dpo_train.py's

Both orders see the same pairs once, in steps of the same size, from the same start. `--flips 0.25` swaps chosen and
rejected in a quarter of all pairs, held-out ones too, so that no accuracy above 0.75 is possible and one epoch does not
saturate. Prints means over the seeds, with the range of the held-out loss; `--picture` draws them.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "docs" / "sample" / "pairs.jsonl"


def write_flipped(path: Path, share: float) -> None:
    chance = random.Random(0)
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if chance.random() < share:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def one_run(folder: Path, flip: float, grouped: bool, rate: float, seed: int, flags: list[str]) -> dict[str, float]:
    """The last held-out figures of a run in a process of its own, and the tokens that it encoded for a pair."""
    name = f"{flip}-{grouped}-{rate}-{seed}"
    words = {
        "dataset_name": folder / f"{flip}.jsonl", "output_dir": folder / name, "group_by_prompt": grouped,
        "learning_rate": rate, "seed": seed, "max_new_tokens": 0, "save_steps": 0, "eval_steps": 0,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "dpo_train.py"), "--demo", *(f"--{k}={v}" for k, v in words.items()), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("loss") is not None]
    last = [line for line in lines if line.get("event") == "eval"][-1]
    return last | {"tokens": statistics.fmean(s["tokens_per_second"] / s["pairs_per_second"] for s in steps)}


def draw(path: Path, found: dict, flips: list[float], rates: list[float]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "dpo", "axes.spines.top": False}
    figure, panels = plt.subplots(1, len(flips), figsize=(4 * len(flips), 2.8), layout="constrained", squeeze=False)
    for axes, flip in zip(panels[0], flips, strict=True):
        for grouped, style in ((True, "o-"), (False, "s--")):
            losses = [statistics.fmean(run["eval_loss"] for run in found[flip, grouped, rate]) for rate in rates]
            axes.plot(rates, losses, style, label="grouped by prompt" if grouped else "spread out")
        axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss (nats)")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
        axes.minorticks_off()
        axes.set_title(f"{flip:.0%} of the labels flipped" if flip else "sample as it is", fontsize=10)
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4, 8e-4])
    parser.add_argument("--flips", type=float, nargs="+", default=[0.0, 0.25])
    parser.add_argument("--orders", choices=("grouped", "spread"), nargs="+", default=["grouped", "spread"])
    parser.add_argument("--picture", type=Path)
    args, flags = parser.parse_known_args()
    orders = [order == "grouped" for order in args.orders]
    keys = list(itertools.product(args.flips, orders, args.rates))
    print("| flipped | order | rate | held-out loss | (range) | accuracy | margin | nll of chosen | tokens a pair |")
    print("|---:|---|---:|---:|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(place)
        for flip in args.flips:
            write_flipped(folder / f"{flip}.jsonl", flip)
        waiting = {key: [pool.submit(one_run, folder, *key, seed, flags) for seed in args.seeds] for key in keys}
        found = {}
        for key, futures in waiting.items():
            runs = found[key] = [future.result() for future in futures]
            losses = [run["eval_loss"] for run in runs]
            names = ("eval_rewards/accuracies", "eval_rewards/margins", "eval_nll_loss", "tokens")
            accuracy, margin, nll, tokens = (statistics.fmean(run[name] for run in runs) for name in names)
            cells = [f"{key[0]:g}", "grouped" if key[1] else "spread", f"{key[2]:g}", f"{statistics.fmean(losses):.3f}"]
            cells += [f"{min(losses):.3f} to {max(losses):.3f}", f"{accuracy:.3f}", f"{margin:.3f}", f"{nll:.3f}"]
            print("| " + " | ".join([*cells, f"{tokens:.0f}"]) + " |", flush=True)
    if args.picture:
        draw(args.picture, found, args.flips, args.rates)


if __name__ == "__main__":
    main()
