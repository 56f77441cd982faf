"""Pairs per second and peak memory: this trainer, the same with sharing off, and TRL, on the same token ids.

    uv run tests/benchmark.py                                                # ours only: the sample model, a smoke run
    uv run --with trl tests/benchmark.py --model Qwen/Qwen2.5-0.5B --pairs 32 --max_length 512
    uv run --with trl tests/benchmark.py --model PATH --data COIG-P.jsonl --only "ours|trl 2.*" --steps 4
    uv run tests/benchmark.py --model PATH --bytes_per_token                 # what a token costs in activations

Each line of the table is a process of its own (so that peaks of memory don't mix), started with the same environment.
All of them train on the same steps of the same pairs, every pair new, in the same order, with fused AdamW over float32
weights: our tokens are handed to TRL. The first step is a warm-up; speeds are over the others. Losses must agree.

`--data coig-p` writes pairs of COIG-P's shape (pairs and queries by domain: arXiv 2504.05535, table 2), of sentences
put together at random: good for speed and memory, meaningless for what a model learns.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COIG_P = {  # domain: (pairs, queries)
    "chat": (702_398, 37_323), "math": (155_872, 27_259), "logic": (54_617, 8_816),
    "novel": (34_483, 6_682), "role": (19_363, 4_930), "code": (40_213, 7_774),
}  # fmt: skip
RESPONSES, SCORE_GAP = 15, 2  # of a query; above which a pair is made
PROMPT_CHARACTERS, RESPONSE_CHARACTERS = (3.65, 0.8, 8, 200), (5.3, 1.05, 15, 900)  # log-normal: mean, sd; least, most


@dataclass
class Config:
    trainer: str
    flags: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`ours sdpa`, `trl 2 checkpointing precomputed`: what is on, in short."""
        short = {
            "gradient_checkpointing": "checkpointing",
            "precompute_ref_log_probs": "precomputed",
            "torch_compile": "compiled",
        }
        words = [short.get(name, name) if value is True else str(value) for name, value in self.flags.items() if value]
        return " ".join([self.trainer, *words])


CONFIGS = [
    Config("ours"),
    *(Config("ours", {"attn_implementation": name}) for name in ("sdpa", "tree", "flex")),  # flex: GPU only
    Config("ours", {"torch_compile": True}),
    Config("ours", {"precompute_ref_log_probs": True}),
    Config("ours", {"gradient_checkpointing": True}),
    Config("ours, sharing off"),
    *(
        Config("trl", {"micro_batch": size, "gradient_checkpointing": checkpointing, "precompute_ref_log_probs": ready})
        for size in (1, 2, 4, 8, 16, 32)
        for checkpointing in (False, True)
        for ready in (False, True)
    ),
]


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


# ---------------------------------------------------------------------------------------------------------------------
# One configuration, in a process of its own


def batches(args: argparse.Namespace) -> list[list[dict]]:
    """The pairs of each step, as our trainer will take them."""
    from dataset import epoch_order, load_rows, prepare
    from dpo_train import load_tokenizer

    n = args.pairs * args.steps
    data = prepare(load_rows(args.data), load_tokenizer(args.model), args.max_length, n, 0)
    if len(data.train) < n:
        raise SystemExit(f"{args.data} has {len(data.train)} pairs that can train: fewer than {args.steps} steps need")
    order = epoch_order(data.train.keys, args.seed, 0)
    return [data.train.read(order[i : i + args.pairs]) for i in range(0, n, args.pairs)]


def run_ours(args: argparse.Namespace, share: bool, changes: dict) -> dict:
    import dpo_train

    collators, real = [], dpo_train.TreeCollator

    def collator(*positional, **named):
        collators.append(real(*positional, share=share, **named))
        return collators[-1]

    dpo_train.TreeCollator = collator
    dpo_train.save_model = lambda *_: None  # the same model either way; its writing isn't what is measured
    folder = Path(tempfile.mkdtemp()) / "run"
    dpo_train.REFERENCE_CACHE = folder.parent / "reference"
    words = {
        "model_name_or_path": args.model, "dataset_name": args.data, "max_length": args.max_length, "seed": args.seed,
        "max_train_samples": args.pairs * args.steps, "train_batch_size": args.pairs, "max_eval_samples": 0,
        "learning_rate": args.learning_rate, "lr_scheduler_type": "constant", "warmup_ratio": 0, "save_steps": 0,
        "mixed_precision": "no" if args.fp32 else "bf16", "logging_steps": 1, "output_dir": folder,
        "micro_batch_tokens": args.micro_batch_tokens, **changes,
    }  # fmt: skip
    dpo_train.train(dpo_train.parse_flags([w for k, v in words.items() if v is not None for w in (f"--{k}", str(v))]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    cut = [batch for pairs in batches(args) for batch in collators[0](pairs)]
    n_tokens = sum(int((batch["branch_ids"] >= 0).sum()) for batch in cut)
    return {
        "seconds": [args.pairs / line["pairs_per_second"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "tokens": n_tokens,
        "padded": sum(batch["input_ids"].numel() for batch in cut),
    }


def run_trl(args: argparse.Namespace, micro_batch: int, gradient_checkpointing: bool, precompute_ref_log_probs: bool):
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, TrainerCallback
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

    pairs = [
        {name: [int(token) for token in pair[name]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for step in batches(args) for pair in step
    ]  # fmt: skip
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro_batch, max_steps=args.steps,
        gradient_accumulation_steps=args.pairs // micro_batch, max_length=None, bf16=not args.fp32,
        gradient_checkpointing=gradient_checkpointing, use_cpu=not torch.cuda.is_available(), report_to="none",
        precompute_ref_log_probs=precompute_ref_log_probs, optim="adamw_torch_fused", logging_steps=1, beta=0.1,
        save_strategy="no", learning_rate=args.learning_rate, lr_scheduler_type="constant", warmup_steps=0,
        disable_tqdm=True, model_init_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"},
    )  # fmt: skip
    started = now()
    trainer = Trainer(
        model=args.model, args=config, train_dataset=Dataset.from_list(pairs), callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )  # fmt: skip
    before = now() - started if precompute_ref_log_probs else 0.0
    trainer.train()
    rows = [len(pair["prompt_ids"]) + len(pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    forwards = [rows[i : i + 2 * micro_batch] for i in range(0, len(rows), 2 * micro_batch)]
    return {
        "seconds": Clock.seconds,
        "before": before,
        "losses": [float(line["loss"]) for line in trainer.state.log_history if "loss" in line],
        "tokens": sum(rows),
        "padded": sum(len(one) * max(one) for one in forwards),
    }


def work(args: argparse.Namespace) -> None:
    config = next(config for config in CONFIGS if config.name == args.worker)
    if config.trainer == "trl":
        found = run_trl(args, **config.flags)
    else:
        found = run_ours(args, "off" not in config.trainer, config.flags)
    import torch

    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps(found | {"peak_gb": peak / 1e9, "name": config.name}), flush=True)


def bytes_per_token(args: argparse.Namespace) -> None:
    """What autograd keeps of a forward pass for each token: the slope between two lengths, so that weights don't count.

    Tensors are counted by storage, each once. Saved tensors are the same on a CPU and on a GPU, but for what an
    attention kernel keeps for itself.
    """
    import dpo_train

    flags = dpo_train.parse_flags(["--model_name_or_path", args.model, "--attn_implementation", "sdpa"])
    model = dpo_train.load_model(args.model, flags).train()
    slope, weights = kept_of_forward(model, args)
    print(f"{slope / 1e6:.3f} MB a token, and {weights / 1e9:.2f} GB of weights as they compute")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kept, layer = kept_of_forward(model, args)[0], slope / model.config.num_hidden_layers
    print(f"{(kept + layer) / 1e6:.3f} MB with checkpointing: {kept / 1e6:.3f}, and one layer's at a time")


def kept_of_forward(model, args: argparse.Namespace) -> tuple[float, float]:
    """Bytes kept for each token, and apart from that."""
    import torch

    import dpo_train
    from dataset import TreeCollator

    scorer, kept = dpo_train.ResponseScorer(model), {}
    for n_tokens in (args.max_length, 2 * args.max_length):
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        pair = {"index": 0, "prompt_ids": [0], "chosen_ids": [0] * (n_tokens // 2)}
        (batch,) = TreeCollator(n_tokens)([pair | {"rejected_ids": [1] * (n_tokens // 2 - 1)}])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
                logps = scorer(batch)
        kept[n_tokens] = sum(storage.nbytes() for storage in storages.values())
        del logps
    (n, fewer), (_, more) = kept.items()
    return (more - fewer) / n, 2 * fewer - more


# ---------------------------------------------------------------------------------------------------------------------
# The table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "docs" / "sample" / "model"), help="hub name or local folder")
    parser.add_argument("--data", default="coig-p", help="file that dpo_train.py reads; coig-p: generated")
    parser.add_argument("--pairs", type=int, default=32, help="in one step")
    parser.add_argument("--steps", type=int, default=3, help="the first one is a warm-up")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of prompt + response")
    parser.add_argument("--micro_batch_tokens", type=int, help="of ours (default: the trainer's)")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--fp32", action="store_true", help="float32 throughout (default: bf16 autocast)")
    parser.add_argument("--only", default="ours.*|trl.*", help="regular expression: the configurations to run")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, help="add the results to this .jsonl file")
    parser.add_argument("--list", action="store_true", help="name the configurations and stop")
    parser.add_argument("--bytes_per_token", action="store_true", help="of activations, instead of the table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    configs = [config for config in CONFIGS if re.fullmatch(args.only, config.name)]
    if args.list:
        print("\n".join(config.name for config in configs))
        return 0
    if args.bytes_per_token:
        bytes_per_token(args)
        return 0
    if args.worker:
        work(args)
        return 0
    if subprocess.run([sys.executable, "-c", "import trl"], capture_output=True).returncode:
        print("TRL isn't installed (`uv run --with trl tests/benchmark.py ...`): ours only", file=sys.stderr)
        configs = [config for config in configs if config.trainer != "trl"]
    configs = [config for config in configs if args.pairs % config.flags.get("micro_batch", 1) == 0]
    with tempfile.TemporaryDirectory() as folder:
        if args.data == "coig-p":
            args.data = str(Path(folder) / "pairs.jsonl")
            write_coig_p_shaped(Path(args.data), n_queries=max(100, args.pairs * args.steps // 5))
        results = [found for config in configs if (found := start(config, args))]
    if args.output and results:
        with args.output.open("a") as file:
            file.writelines(json.dumps(vars(args) | found, default=str) + "\n" for found in results)
    return show(results, args)


def start(config: Config, args: argparse.Namespace) -> dict | None:
    words = [sys.executable, __file__, "--worker", config.name]
    for name in ("model", "data", "pairs", "steps", "max_length", "micro_batch_tokens", "learning_rate", "seed"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    # Large pages in the CPU allocator help; our script asks for them by itself, so TRL is given them, too.
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(words + ["--fp32"] * args.fp32, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        why = "killed, out of memory?" if done.returncode == -9 else (done.stderr.strip().splitlines() or ["?"])[-1]
        print(f"{config.name}: failed ({why})", file=sys.stderr)
        return None
    found = json.loads(lines[-1].removeprefix("RESULT "))
    found["pairs_per_second"] = args.pairs * (args.steps - 1) / sum(found["seconds"][1:])
    print(f"{config.name}: {found['pairs_per_second']:.3f} pairs/s, {found['peak_gb']:.1f} GB", file=sys.stderr)
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
