"""Pairs per second and peak memory: this trainer, the same with sharing off, and TRL, on the same token ids.

    uv run tests/benchmark.py                                                # ours only: the sample model, a smoke run
    uv run --with trl tests/benchmark.py --model Qwen/Qwen2.5-0.5B --pairs 32 --max_length 512
    uv run --with trl tests/benchmark.py --model PATH --data COIG-P.jsonl --only "ours|trl 2.*" --steps 4

Each line of the table is a process of its own (so that peaks of memory don't mix), started with the same environment.
All of them train on the same steps of the same pairs, every pair new, in the same order, with fused AdamW over float32
weights: our tokens are handed to TRL. The first step is a warm-up; speeds are over the others. Losses must agree.

What can be known of a GPU without one, from a model's config.json and tokenizer (no weights are needed):

    uv run tests/benchmark.py --model Qwen/Qwen2.5-0.5B --memory             # of a step, and what each card needs
    uv run tests/benchmark.py --model Qwen/Qwen2.5-0.5B --flops              # of a pair, ours and in TRL's rows

`--data coig-p` writes pairs of COIG-P's shape (pairs and queries by domain: arXiv 2504.05535, table 2), of sentences
put together at random: good for speed and memory, meaningless for what a model learns.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from fake_training import Training, as_on_a_gpu, full_micro_batch, peak
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoTokenizer

import dpo_train
import loss

ROOT = Path(__file__).resolve().parent.parent
COIG_P = {  # domain: (pairs, queries)
    "chat": (702_398, 37_323), "math": (155_872, 27_259), "logic": (54_617, 8_816),
    "novel": (34_483, 6_682), "role": (19_363, 4_930), "code": (40_213, 7_774),
}  # fmt: skip
RESPONSES, SCORE_GAP = 15, 2  # of a query; above which a pair is made
PROMPT_CHARACTERS, RESPONSE_CHARACTERS = (3.65, 0.8, 8, 200), (5.3, 1.05, 15, 900)  # log-normal: mean, sd; least, most
SHORT = {"gradient_checkpointing": "checkpointing", "precompute_ref_log_probs": "precomputed"}


def named(trainer: str, **flags) -> tuple[str, dict]:
    """`ours sdpa`, `trl 2 checkpointing precomputed`: what is on, in short; and the flags."""
    words = [SHORT.get(name, name) if value is True else str(value) for name, value in flags.items() if value]
    return " ".join([trainer, *words]), flags


CONFIGS = dict(
    [
        *(named("ours", **flags) for flags in ({}, *({name: True} for name in SHORT))),
        *(named("ours", attn_implementation=name) for name in ("sdpa", "tree")),
        named("ours, sharing off"),
        *(
            named("trl", micro_batch=size, gradient_checkpointing=checkpointing, precompute_ref_log_probs=ready)
            for size in (1, 2, 4, 8, 16, 32)
            for checkpointing in (False, True)
            for ready in (False, True)
        ),
    ]
)


def write_coig_p_shaped(path: Path, n_queries: int, seed: int = 0) -> None:
    """Queries by domain in COIG-P's proportions, each with 15 scored responses; pairs whose scores are far apart."""
    rng = random.Random(seed)
    text = (ROOT / "docs" / "sample" / "texts.txt").read_text(encoding="utf-8")
    sentences = re.findall(r"[^。！？\n]{6,}[。！？]", text)

    def compose(mean: float, sd: float, least: int, most: int) -> str:
        while not least <= (length := rng.lognormvariate(mean, sd)) <= most:
            pass
        words = ""
        while len(words) < length:
            words += rng.choice(sentences)
        return words[: int(length)]

    with path.open("w", encoding="utf-8") as file:
        for query in range(n_queries):
            domain = rng.choices(list(COIG_P), [queries for _, queries in COIG_P.values()])[0]
            per_query = COIG_P[domain][0] / COIG_P[domain][1]
            scored = [(rng.gauss(6, 1.8), compose(*RESPONSE_CHARACTERS)) for _ in range(RESPONSES)]
            pairs = [(a, b) for a in scored for b in scored if a[0] - b[0] > SCORE_GAP]
            rng.shuffle(pairs)
            prompt = f"{compose(*PROMPT_CHARACTERS)}（{query}）"
            for (_, chosen), (_, rejected) in pairs[: max(1, round(rng.gauss(per_query, 0.3 * per_query)))]:
                row = {
                    "conversations": [{"from": "human", "value": prompt}],
                    "chosen": {"from": "gpt", "value": chosen},
                    "rejected": {"from": "gpt", "value": rejected},
                    "domain": domain,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def our_flags(args: argparse.Namespace, **changes) -> dpo_train.Flags:
    words = {
        "model_name_or_path": args.model, "dataset_name": args.data, "max_length": args.max_length, "seed": args.seed,
        "max_train_samples": args.pairs * args.steps, "train_batch_size": args.pairs, "max_eval_samples": 0,
        "learning_rate": args.learning_rate, "lr_scheduler_type": "constant", "warmup_ratio": 0, "save_steps": 0,
        "mixed_precision": "no" if args.fp32 else "bf16", "logging_steps": 1,
        "micro_batch_tokens": args.micro_batch_tokens, **changes,
    }  # fmt: skip
    return dpo_train.parse_flags([w for k, v in words.items() if v is not None for w in (f"--{k}", str(v))])


def prepare_steps(flags: dpo_train.Flags):
    """The steps as our trainer will take them."""
    alone = SimpleNamespace(process_index=0, num_processes=1, local_main_process_first=contextlib.nullcontext)
    steps = dpo_train.prepare_steps(AutoTokenizer.from_pretrained(flags.model_name_or_path), alone, flags)[1]
    if len(steps.pairs) < flags.max_train_samples:
        raise SystemExit(f"{flags.dataset_name} has {len(steps.pairs)} usable pairs, {flags.max_train_samples} wanted")
    return steps


# ---------------------------------------------------------------------------------------------------------------------
# One configuration, in a process of its own


def run_ours(args: argparse.Namespace, share: bool, changes: dict) -> dict:
    dpo_train.TreeCollator = partial(dpo_train.TreeCollator, share=share)
    dpo_train.save_model = lambda *_: None  # the same model either way; its writing isn't what is measured
    flags = our_flags(args, output_dir=Path(tempfile.mkdtemp()) / "run", **changes)
    lines = map(json.loads, (dpo_train.train(flags) / "metrics.jsonl").read_text().splitlines())
    lines = [line for line in lines if "pairs_per_second" in line]
    steps = prepare_steps(flags)
    batches = [batch for step in range(args.steps) for batch in steps[step]]
    return {
        "seconds": [args.pairs / line["pairs_per_second"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "tokens": sum(batch["n_tokens"] for batch in batches),
        "padded": sum(batch["input_ids"].numel() for batch in batches),
    }


def run_trl(args: argparse.Namespace, micro_batch: int, gradient_checkpointing: bool, precompute_ref_log_probs: bool):
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            self.started = now()

        def on_step_end(self, *_, **__):
            self.seconds.append(now() - self.started)

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # our tokens

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    steps = prepare_steps(our_flags(args))
    pairs = [
        {name: [int(token) for token in pair[name]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for step in range(args.steps) for pair in steps.pairs.read(steps.indices(step))
    ]  # fmt: skip
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro_batch, max_steps=args.steps,
        gradient_accumulation_steps=args.pairs // micro_batch, max_length=None, bf16=not args.fp32,
        gradient_checkpointing=gradient_checkpointing, use_cpu=not torch.cuda.is_available(), report_to="none",
        precompute_ref_log_probs=precompute_ref_log_probs, optim="adamw_torch_fused", logging_steps=1, beta=0.1,
        save_strategy="no", learning_rate=args.learning_rate, lr_scheduler_type="constant", warmup_steps=0,
        disable_tqdm=True, model_init_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"},
    )  # fmt: skip
    trainer = Trainer(
        model=args.model, args=config, train_dataset=Dataset.from_list(pairs), callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )  # fmt: skip
    trainer.train()
    rows = [len(pair["prompt_ids"]) + len(pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    forwards = [rows[i : i + 2 * micro_batch] for i in range(0, len(rows), 2 * micro_batch)]
    return {
        "seconds": Clock.seconds,
        "losses": [float(line["loss"]) for line in trainer.state.log_history if "loss" in line],
        "tokens": sum(rows),
        "padded": sum(len(one) * max(one) for one in forwards),
    }


def work(args: argparse.Namespace) -> None:
    if args.worker.startswith("trl"):
        found = run_trl(args, **CONFIGS[args.worker])
    else:
        found = run_ours(args, "off" not in args.worker, CONFIGS[args.worker])
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps(found | {"peak_gb": peak / 1e9, "name": args.worker}), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# A step on fake tensors, which have shapes, dtypes and devices, and no values

SIZES = (2048, 4096, 6144, 8192, 16384, 32768)  # --micro_batch_tokens
CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB
RESERVE = 1.5e9, 0.06  # bytes, for the CUDA context and libraries' workspaces; share of the card, for fragmentation


def memory(args: argparse.Namespace) -> None:
    """Peaks by --micro_batch_tokens and flags, a line through two of them, and from the peaks what each card needs."""
    cases = [(), *((name,) for name in reversed(SHORT)), tuple(SHORT)]
    names = [" and ".join(SHORT[name] for name in case) or "as it is" for case in cases]
    steps = prepare_steps(our_flags(args, attn_implementation=args.attention, max_train_samples=args.pairs))
    found: dict[tuple, list[tuple[int, int, int]]] = {case: [] for case in cases}
    print(f"| `--micro_batch_tokens` | rows x length | {' | '.join(names)} |\n|---:|---:|" + "---:|" * len(cases))
    with as_on_a_gpu():
        for n_tokens in [n for n in SIZES if n >= 2 * args.max_length]:
            batch = full_micro_batch(steps, n_tokens)
            rows, length = batch["input_ids"].shape
            for case in cases:
                flags = our_flags(args, attn_implementation=args.attention, **dict.fromkeys(case, True))
                found[case].append((n_tokens, rows * length, peak(flags, steps, batch)))
            cells = [f"{found[case][-1][2] / 1e9:.1f}" for case in cases]
            print(f"| {n_tokens:,} | {rows} x {length:,} | {' | '.join(cells)} |", flush=True)
    cells = []
    for case in cases:
        (_, few, less), (_, many, more) = found[case][-3:-1]
        slope = (more - less) / (many - few)
        cells.append(f"{(less - slope * few) / 1e9:.2f} + {slope / 1e6:.2f}")
    print(f"| GB + MB a token | | {' | '.join(cells)} |")
    print("\n| card | flags | peak, GB | left, GB | most tokens with these flags |\n|---:|---|---:|---:|---:|")
    for card in CARDS:
        usable = card * 2**30 * (1 - RESERVE[1]) - RESERVE[0]
        fitting = [(case, n, most) for case in cases for n, _, most in found[case] if most <= usable]
        if not fitting:
            print(f"| {card} GB | none | | | |")
            continue
        # Of the cases that hold twice the smallest micro-batch the first, which is the fastest.
        case = next((case for case, n, _ in fitting if n >= 4 * args.max_length), fitting[0][0])
        sizes = {n: most for other, n, most in fitting if other == case}
        n_tokens = max(n for n in sizes if n <= max(8192, min(sizes)))  # the default, where it fits
        words = [f"--{name} true" for name in case] + [f"--micro_batch_tokens {n_tokens}"] * (n_tokens < 8192)
        cells = f"{sizes[n_tokens] / 1e9:.1f} | {(usable - sizes[n_tokens]) / 1e9:.1f} | {max(sizes):,}"
        print(f"| {card} GB | `{' '.join(words) or 'the defaults'}` | {cells} |")


def rows_as_trl_pads(pairs: list[dict], n: int) -> list[dict]:
    """TRL's micro-batches of n pairs: a row for each response of each pair, its prompt before it, padded."""
    batches = []
    for some in (pairs[i : i + n] for i in range(0, len(pairs), n)):
        responses = [len(pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in some]
        prompts, half = [len(pair["prompt_ids"]) for pair in some] * 2, torch.arange(len(some))
        rows = torch.zeros(len(responses), max(map(sum, zip(prompts, responses, strict=True))), dtype=torch.long)
        index, tokens = np.array([pair["index"] for pair in some]), torch.zeros(sum(responses), dtype=torch.long)
        batches.append(
            dict.fromkeys(("input_ids", "position_ids", "branch_ids", "tree_ids"), rows)
            | dict.fromkeys(("predictor_index", "target_ids", "response_index"), tokens)
            | {"response_lengths": torch.tensor(responses), "chosen_index": half, "rejected_index": half + len(some)}
            | {"pair_index": torch.from_numpy(index), "index_on_host": index, "weight": 1.0}
            | {"n_tokens": sum(prompts + responses)}
        )
    return batches


def flops(args: argparse.Namespace) -> None:
    """Arithmetic of steps, a pair: policy forward and backward and reference, matrix products and attention only."""
    n_pairs, loss.TILES["cpu"] = args.pairs * args.steps, (1 << 30, 1 << 30)  # fewer operators, the same arithmetic
    cuts, first, config = [], None, AutoConfig.from_pretrained(args.model)
    for attention in ("sdpa", "tree"):
        flags = our_flags(args, attn_implementation=attention, micro_batch_tokens=args.micro_batch_tokens or 8192)
        steps = prepare_steps(flags)
        for steps.collate.share in (True, False):
            name = f"ours, `{attention}`" + ", sharing off" * (not steps.collate.share)
            cuts.append((name, flags, [batch for step in range(args.steps) for batch in steps[step]]))
    pairs = [pair for step in range(args.steps) for pair in steps.pairs.read(steps.indices(step))]
    cuts += [(f"TRL's rows, {n} pairs a forward pass", cuts[0][1], rows_as_trl_pads(pairs, n)) for n in (2, 8)]
    print("| | tokens a pair | with padding | of these to the head | TFLOP a pair | times ours |\n|---|" + "---:|" * 5)
    for name, flags, batches in cuts:
        counts = []
        with FakeTensorMode(allow_non_fake_inputs=True):
            for n_layers in (1, 2):  # all layers are alike
                training = Training(flags, steps, n_layers=n_layers)
                with FlopCounterMode(display=False) as counter:
                    training.gradients(batches)
                counts.append(counter.get_total_flops())
        each = (counts[0] + (config.num_hidden_layers - 1) * (counts[1] - counts[0])) / n_pairs
        sizes = [(batch["n_tokens"], batch["input_ids"].numel(), len(batch["target_ids"])) for batch in batches]
        n_tokens, n_places, n_scored = np.sum(sizes, axis=0) / n_pairs
        found = [(name, n_scored, each)]
        if "TRL" in name:  # without Triton its head takes prompts and padding, too: the policy's 4 products, a 5th
            every = 5 * 2 * (n_places - n_scored) * config.vocab_size * config.hidden_size
            found.append((f"{name}, on a CPU", n_places, each + every))
        for name, n_scored, each in found:
            first = first or each
            cells = f"{n_tokens:.0f} | {n_places:.0f} | {n_scored:.0f} | {each / 1e12:.4g} | {each / first:.2f}"
            print(f"| {name} | {cells} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "docs" / "sample" / "model"), help="hub name or local folder")
    parser.add_argument("--data", default="coig-p", help="file that dpo_train.py reads; coig-p: generated")
    parser.add_argument("--pairs", type=int, help="in one step (default: 32; 512 for --memory, 64 for --flops)")
    parser.add_argument("--steps", type=int, default=3, help="the first one is a warm-up")
    parser.add_argument("--max_length", type=int, help="tokens of prompt + response (default: 512; 1024 if counting)")
    parser.add_argument("--micro_batch_tokens", type=int, help="of ours (default: the trainer's)")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--fp32", action="store_true", help="float32 throughout (default: bf16 autocast)")
    parser.add_argument("--only", default="ours.*|trl.*", help="regular expression: the configurations to run")
    parser.add_argument("--seed", type=int, default=42)
    for count, text in ((memory, "of a step on a GPU, counted without one"), (flops, "of a pair, ours and TRL's")):
        parser.add_argument(f"--{count.__name__}", dest="count", action="store_const", const=count, help=text)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "tree"], help="for --memory")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.pairs = args.pairs or {memory: 512, flops: 64}.get(args.count, 32)
    args.max_length = args.max_length or (1024 if args.count else 512)
    if args.worker:
        work(args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if args.data == "coig-p":
            args.data = str(Path(folder) / "pairs.jsonl")
            write_coig_p_shaped(Path(args.data), n_queries=max(100, args.pairs * args.steps // 5))
        if args.count:
            args.count(args)
            return 0
        names = [name for name in CONFIGS if re.fullmatch(args.only, name)]
        names = [name for name in names if args.pairs % CONFIGS[name].get("micro_batch", 1) == 0]
        if importlib.util.find_spec("trl") is None:
            print("TRL isn't installed (`uv run --with trl tests/benchmark.py ...`): ours only", file=sys.stderr)
            names = [name for name in names if not name.startswith("trl")]
        return show([found for name in names if (found := start(name, args))], args)


def start(name: str, args: argparse.Namespace) -> dict | None:
    words = [sys.executable, __file__, "--worker", name]
    for flag in ("model", "data", "pairs", "steps", "max_length", "micro_batch_tokens", "learning_rate", "seed"):
        if getattr(args, flag) is not None:
            words += [f"--{flag}", str(getattr(args, flag))]
    # Large pages in the CPU allocator help; our script asks for them by itself, so TRL is given them, too.
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(words + ["--fp32"] * args.fp32, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        why = "killed, out of memory?" if done.returncode == -9 else (done.stderr.strip().splitlines() or ["?"])[-1]
        print(f"{name}: failed ({why})", file=sys.stderr)
        return None
    found = json.loads(lines[-1].removeprefix("RESULT "))
    found["pairs_per_second"] = args.pairs * (args.steps - 1) / sum(found["seconds"][1:])
    print(f"{name}: {found['pairs_per_second']:.3f} pairs/s, {found['peak_gb']:.1f} GB", file=sys.stderr)
    return found


def show(results: list[dict], args: argparse.Namespace) -> int:
    if not results:
        return 1
    n = args.pairs * args.steps
    first = results[0]
    # Adam's first steps have the gradient's sign: the least of them flip by rounding. In bf16 much else is rounded.
    tolerance = 1e-4 if args.fp32 else 2e-2
    print(
        "| | seconds a step | pairs/s | tokens a pair | with padding | peak GB | speed (first: 1) | loss differs by |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    worst = 0.0
    for found in results:
        off = max(abs(a - b) for a, b in zip(found["losses"], first["losses"], strict=True))
        worst = max(worst, off)
        seconds, ratio = args.pairs / found["pairs_per_second"], found["pairs_per_second"] / first["pairs_per_second"]
        print(
            f"| {found['name']} | {seconds:.2f} | {found['pairs_per_second']:.3f} | {found['tokens'] / n:.0f} "
            f"| {found['padded'] / n:.0f} | {found['peak_gb']:.2f} | {ratio:.2f} | {off:.1e} |"
        )
    print(f"\nlosses of the first: {' '.join(f'{loss:.6f}' for loss in first['losses'])}")
    if worst > tolerance:
        print(f"losses differ by {worst:.1e}, more than {tolerance:.0e}")
    return int(worst > tolerance)


if __name__ == "__main__":
    sys.exit(main())
