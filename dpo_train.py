"""Direct Preference Optimization (arXiv 2305.18290) of a causal language model, in one script.

    python dpo_train.py --demo                                   # the bundled small model and data
    python dpo_train.py                                          # Qwen2.5-0.5B on COIG-P, one GPU
    accelerate launch dpo_train.py --output_dir output/dpo       # several GPUs
    python dpo_train.py --output_dir output/dpo --resume_from_checkpoint latest

Read `train` first: one run from top to bottom. `dataset.py` makes the micro-batches, `loss.py` has the formulas.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # micro-batches differ in shape
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages on CPUs; torch reads it once, at its first allocation
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import accelerate
import datasets
import huggingface_hub
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser, PreTrainedModel

from dataset import Pairs, StepBatches, TreeCollator, UserError, end_of_turn_id, first_line, load_rows, prepare
from loss import LOSSES, ResponseScorer, dpo_loss
from plot_loss import PlotError, plot_runs, read_run

SAMPLE = Path(__file__).resolve().parent / "docs" / "sample"

# ---------------------------------------------------------------------------------------------------------------------
# Flags


def flag(default: Any, text: str, **more) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class Flags:
    """Names as in transformers' TrainingArguments and TRL's DPOConfig wherever the same thing exists there."""

    # models and data
    model_name_or_path: str = flag("Qwen/Qwen2.5-0.5B", "the policy's start: hub name or local folder")
    ref_model_name_or_path: str | None = flag(None, "the frozen reference; None: the policy's start")
    dataset_name: str = flag("m-a-p/COIG-P", "hub name, local folder (git clone), or .parquet, .json, .jsonl file")
    dataset_split: str = flag("train", "split of a hub data set or folder")
    domains: str | None = flag(None, "only these values of the column `domain`, e.g. chat,math; None: all")
    max_length: int = flag(1024, "tokens of prompt + response; longer pairs are cut, see dataset.py")
    max_train_samples: int | None = flag(None, "train on this many pairs at most; None: all")
    max_eval_samples: int = flag(512, "hold out this many pairs at most, by prompt, and at most a tenth; 0: none")
    output_dir: str | None = flag(None, "where everything is written; None: output/dpo, or the next free output/dpo-N")
    # loss
    beta: float = flag(0.1, "how strongly the policy is held to the reference; higher means less deviation")
    loss_type: str = flag("sigmoid", "the loss, see loss.py; sigmoid is the DPO paper's", choices=list(LOSSES))
    label_smoothing: float = flag(0.0, "assumed share of pairs with swapped labels, 0 to below 0.5")
    sft_weight: float = flag(0.0, "adds this many times the chosen response's negative log-likelihood a token")
    # steps and optimizer
    train_batch_size: int = flag(64, "pairs in one optimizer step, over all processes")
    micro_batch_tokens: int | None = flag(
        None, "tokens in one forward pass of one process: sets the memory, not the result; None: GPU 8192, CPU 2048"
    )
    group_by_prompt: bool = flag(True, "a prompt's pairs in one step, which is fast; false: spread over the epoch")
    learning_rate: float = flag(1e-6, "peak learning rate of AdamW")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = flag("cosine", "schedule")
    warmup_ratio: float = flag(0.1, "share of the steps in which the learning rate rises from 0")
    warmup_steps: int = flag(0, "the same in steps; goes before the ratio if above 0")
    weight_decay: float = flag(0.0, "of AdamW")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: not clipped")
    num_train_epochs: float = flag(1.0, "passes over the pairs")
    max_steps: int = flag(-1, "stop after this many steps; goes before the epochs if above 0")
    seed: int = flag(42, "of the order of the pairs")
    # computing
    mixed_precision: Literal["bf16", "no"] = flag("bf16", "bf16 autocast over float32 weights, or float32 throughout")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, slower")
    attn_implementation: Literal["auto", "tree", "sdpa"] = flag(
        "auto", "sdpa: with a mask, auto on a GPU; tree: without one, auto on a CPU, on a GPU not run by us yet"
    )
    precompute_ref_log_probs: bool = flag(False, "one pass with the reference before training, then no second model")
    # logs and checkpoints
    logging_steps: int = flag(10, "write metrics every this many steps (step 1 always)")
    eval_steps: int = flag(500, "evaluate every this many steps, besides the start and the end; 0: only those")
    save_steps: int = flag(1000, "write a checkpoint every this many steps; 0: none")
    save_total_limit: int = flag(2, "checkpoints to keep")
    resume_from_checkpoint: str | None = flag(None, "`latest` (of --output_dir) or a checkpoint's folder")
    report_to: str = flag("none", "also log to tensorboard, wandb, swanlab, mlflow ...: whatever accelerate knows")
    # other
    eval_only: bool = flag(False, "train nothing: compare --model_name_or_path with --ref_model_name_or_path")
    max_new_tokens: int = flag(128, "length of the answers shown before and after; 0: no answers")
    demo: bool = flag(False, "train the bundled small model on bundled pairs: no network, two minutes on a CPU")


PATHS = ("model_name_or_path", "ref_model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint")
DEMO = {
    "model_name_or_path": str(SAMPLE / "model"), "dataset_name": str(SAMPLE / "pairs.jsonl"), "learning_rate": 2e-4,
    "train_batch_size": 32, "max_length": 256, "mixed_precision": "no", "logging_steps": 1, "eval_steps": 20,
    "save_steps": 50, "max_new_tokens": 64,
}  # fmt: skip
MUST_MATCH_ON_RESUME = (
    "beta", "loss_type", "label_smoothing", "sft_weight", "train_batch_size", "group_by_prompt", "learning_rate",
    "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs",
    "max_steps", "mixed_precision", "seed",
)  # fmt: skip


class OneLineParser(HfArgumentParser):
    def error(self, message):  # argparse prints forty lines of usage first
        raise UserError(f"{message} (--help lists the flags)")


def parse_flags(argv: list[str] | None = None) -> Flags:
    """Flags from the command line; `--demo` changes defaults, so that flags given beside it still hold.

    Raises UserError for values that can't be meant, before anything is loaded.
    """
    parser = OneLineParser(Flags, prog="dpo_train.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    argv = sys.argv[1:] if argv is None else argv
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    (flags,) = parser.parse_dict(vars(parser.parse_args(argv)))
    for name in PATHS:
        setattr(flags, name, getattr(flags, name) and os.path.expanduser(getattr(flags, name)))
    above_0 = ("beta", "train_batch_size", "num_train_epochs", "logging_steps", "save_total_limit", "max_train_samples")
    at_least_0 = (
        "learning_rate", "weight_decay", "max_grad_norm", "max_eval_samples", "eval_steps", "save_steps",
        "warmup_steps", "max_new_tokens", "seed", "sft_weight",
    )  # fmt: skip
    smoothing, least, resume = flags.label_smoothing, 2 * flags.max_length, flags.resume_from_checkpoint
    trackers = ["none", *map(str, accelerate.tracking.get_available_trackers())]
    rules = [
        *((name, getattr(flags, name) is None or getattr(flags, name) > 0, "must be above 0") for name in above_0),
        *((name, getattr(flags, name) >= 0, "must be 0 or above") for name in at_least_0),
        ("label_smoothing", 0 <= smoothing < 0.5, "must be from 0 to below 0.5"),
        ("label_smoothing", not smoothing or flags.loss_type in ("sigmoid", "robust"), "for sigmoid and robust only"),
        ("warmup_ratio", 0 <= flags.warmup_ratio < 1, "must be from 0 to below 1"),
        ("warmup_steps", flags.max_steps < 0 or flags.warmup_steps < flags.max_steps, "must be below --max_steps"),
        ("max_steps", flags.max_steps == -1 or flags.max_steps > 0, "must be above 0, or -1 for all"),
        ("max_length", flags.max_length >= 16, "must be at least 16"),
        ("micro_batch_tokens", flags.micro_batch_tokens is None or flags.micro_batch_tokens >= least,
         f"must be at least {least}, twice --max_length: a pair's two responses stay together"),
        ("eval_only", not flags.eval_only or flags.ref_model_name_or_path and flags.max_eval_samples,
         "needs --ref_model_name_or_path, the model to compare with, and --max_eval_samples above 0"),
        ("resume_from_checkpoint", resume != "latest" or flags.output_dir, "needs --output_dir"),
        ("report_to", flags.report_to in trackers, f"not installed (there is: {', '.join(trackers)}): pip install it"),
    ]  # fmt: skip
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"--{name} {getattr(flags, name)}: {rule}")
    return flags


def public(flags: Flags) -> dict[str, Any]:
    """All flags; of local paths only the last part, since folders of a machine are nobody's business."""
    shown = asdict(flags)
    return shown | {name: Path(shown[name]).name for name in PATHS if shown[name] and Path(shown[name]).exists()}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def search_cache_only_if_hub_is_away(names: Sequence[str | None]) -> str | None:
    """If the hub is needed and does not answer, the libraries search their cache only, at once and not after minutes;
    returns what to say about it."""
    seconds, hub = huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT, huggingface_hub.constants.ENDPOINT
    if any(name and not Path(name).exists() for name in names):
        try:
            huggingface_hub.get_session().head(hub, timeout=seconds)
        except Exception as error:  # of whichever HTTP library the hub's client uses
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
            why = f"{type(error).__name__}; HF_HUB_ETAG_TIMEOUT is {seconds} seconds"
            return f"no answer from {hub} ({why}): only the cache of earlier downloads is searched"
    return None


def load(kind: type, flag_name: str, name: str, **options) -> Any:
    """`kind.from_pretrained(name)`; if that fails, one line that says what to do."""
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # dozens of types, from the hub, from config files, from weights
        reason = first_line(error)
        remedy = "expected config.json, the tokenizer's files, and whole .safetensors files (after `git lfs pull`)"
        if not Path(name).exists():
            remedy = "set HF_ENDPOINT to a mirror of the hub, or give a local folder (git clone), or try `--demo`"
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                reason = f"{huggingface_hub.constants.ENDPOINT} can't be reached, and it is not in the cache"
        raise UserError(f"{flag_name} {name} can't be loaded ({reason}): {remedy}") from None


def choose_attention(flags: Flags) -> str:
    automatic = "sdpa" if torch.cuda.is_available() else "tree"
    return automatic if flags.attn_implementation == "auto" else flags.attn_implementation


def load_model(name: str, flags: Flags, flag_name: str = "--model_name_or_path") -> PreTrainedModel:
    """A causal LM in float32, without dropout. As stored, in bf16, its weights would be too coarse to learn in.

    Raises UserError if it can't be loaded, or if some weights are missing, which would then be random.
    """
    model, report = load(
        AutoModelForCausalLM, flag_name, name, dtype=torch.float32, attn_implementation=choose_attention(flags),
        use_safetensors=True, output_loading_info=True,  # safetensors: a pickle could run code
    )  # fmt: skip
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{flag_name} {name}: {len(missing)} of its weights are missing in its files: {missing[0]} ...")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if flags.gradient_checkpointing:  # acts in training mode only; older transformers know only the second name
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    return model.eval()


def freeze(model: PreTrainedModel, mixed_precision: str) -> None:
    """Make it the reference. What autocast would cast anew for each micro-batch is cast once, to the same values."""
    model.requires_grad_(False)
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear) and mixed_precision == "bf16":
            module.to(torch.bfloat16)


def weights_hash(model: torch.nn.Module) -> str:
    """A hash of names, shapes and values of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_models(tokenizer, steps: StepBatches, accelerator: Accelerator, flags: Flags):
    """Policy, reference, and the hashes of their weights. With --precompute_ref_log_probs, a reference that is the
    policy's start is the policy itself, which does not move before the table is filled: no second model in memory."""
    policy = reference = load_model(flags.model_name_or_path, flags).to(accelerator.device)
    if flags.ref_model_name_or_path not in (None, flags.model_name_or_path):
        reference = load_model(flags.ref_model_name_or_path, flags, "--ref_model_name_or_path").to(accelerator.device)
        check_model(reference, tokenizer, steps, accelerator, flags)
    elif not flags.precompute_ref_log_probs or flags.eval_only:
        reference = copy.deepcopy(policy)
    check_model(policy, tokenizer, steps, accelerator, flags)
    hashes = {"policy's start (hash)": weights_hash(policy), "reference (hash)": weights_hash(reference)}
    if reference is not policy:
        freeze(reference, flags.mixed_precision)
    transformers.logging.disable_progress_bar()  # from here on its bars, of saving, would tear ours
    return policy, reference, hashes


def check_model(model: PreTrainedModel, tokenizer, steps: StepBatches, accelerator: Accelerator, flags: Flags) -> None:
    """Is this a model whose log-probabilities over a tree are its own, in float32 and in the run's precision?

    It is not if its attention ignores the mask or looks back less far than --max_length, or if its logits are more than
    hidden states times LM head. Raises UserError then, or if its vocabulary is too small.
    """
    if model.get_output_embeddings().weight.shape[0] < len(tokenizer):
        raise UserError(f"{model.name_or_path}: its vocabulary is smaller than that of the policy's tokenizer")
    window = getattr(model.config, "sliding_window", None) or flags.max_length
    layers = getattr(model.config, "layer_types", ["sliding_attention"])
    if window < flags.max_length and "sliding_attention" in layers:
        raise UserError(f"--max_length {flags.max_length}: {model.name_or_path} looks back {window} tokens only")
    reason = None
    try:
        own, exactly, roughly = logps_both_ways(model, steps, accelerator, flags.max_length)
        for logps, rtol, atol in ((exactly, 2e-5, 1e-2), (roughly, 2e-2, 0.5)):
            if not torch.allclose(logps, own, rtol, atol):
                texts = [", ".join(f"{value:.3f}" for value in values) for values in (logps, own)]
                reason = f"log-probabilities over shared prompts ({texts[0]}) differ from its own ({texts[1]})"
    except (ValueError, TypeError, NotImplementedError) as error:  # of its forward pass
        reason = first_line(error)
    if reason:
        text = "its attention or its LM head is of another kind"
        raise UserError(f"{type(model).__name__} can't be trained here: {reason}; {text}")


@torch.no_grad()
def logps_both_ways(model: PreTrainedModel, steps: StepBatches, accelerator: Accelerator, max_length: int):
    """[2] log-probabilities of two responses to a prompt that fills up `max_length`: by the model's own logits, over a
    tree, and over a tree under autocast."""
    (pair,) = steps.pairs.read([0])
    responses = [np.asarray(pair[name])[-64:] for name in ("chosen_ids", "rejected_ids")]
    prompt = np.resize(pair["prompt_ids"], max_length - max(map(len, responses)))
    pair = {"index": 0, "prompt_ids": prompt, "chosen_ids": responses[0], "rejected_ids": responses[1]}
    batch, own = to_device(steps.collate([pair])[0], accelerator.device), []
    for ids in responses:
        row = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))[None].to(accelerator.device)
        logits = model(input_ids=row, use_cache=False, logits_to_keep=len(ids) + 1).logits[0, :-1].float()
        own.append(logits.log_softmax(-1).gather(1, row[0, -len(ids) :, None]).sum().item())
    exactly = gather_pairs(ResponseScorer(model)(batch), batch)[0].cpu()
    with accelerator.autocast():
        roughly = gather_pairs(ResponseScorer(model)(batch), batch)[0].cpu()
    return torch.tensor(own, dtype=torch.float64), exactly, roughly


# Of Qwen2.5-0.5B, without and with checkpointing: a little over what `tests/benchmark.py --memory` counts.
BYTES_PER_TOKEN = {False: 2.0e6, True: 0.4e6}


def rehearse(policy: PreTrainedModel, reference: PreTrainedModel, collate: TreeCollator, accelerator, flags) -> None:
    """Forward and backward of the largest micro-batch there can be, with gradients in place, room taken for AdamW, and
    the reference's forward pass between: if memory runs out, then now and not after an hour.

    Raises UserError with the number of tokens that should fit.
    """
    n_tokens, weights, device = collate.micro_batch_tokens, list(policy.parameters()), accelerator.device
    n_weights, resident = sum(weight.numel() for weight in weights), torch.cuda.memory_allocated()
    n = flags.max_length - 1
    sides = [np.full(n, number) for number in range((n_tokens - 1) // n)]  # each is in two pairs, but encoded once
    pairs = [{"index": i, "prompt_ids": [0], "chosen_ids": sides[i], "rejected_ids": sides[i + 1]}
             for i in range(len(sides) - 1)]  # fmt: skip
    try:
        room_for_adam = torch.empty(2 * n_weights, device=device)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        batch = to_device(collate(pairs)[0], device)
        with accelerator.autocast():
            logps = ResponseScorer(policy.train())(batch)
            with torch.no_grad():
                ResponseScorer(reference)(batch)
            (logps.sum() * 0.0).backward()
        del room_for_adam
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info()  # what others have taken is not ours, nor what lies beyond our share
        limit = min(free + torch.cuda.memory_reserved(), torch.cuda.get_per_process_memory_fraction() * total)
        per_token = BYTES_PER_TOKEN[flags.gradient_checkpointing] * n_weights / 494e6
        room = limit - resident - 14 * n_weights  # gradients, AdamW, and the weights cast to bf16
        fits = min(int(0.8 * n_tokens), int(room / per_token)) // 256 * 256
        advice = [f"--micro_batch_tokens {fits}"] * (fits >= 2 * flags.max_length)
        advice += ["--gradient_checkpointing"] * (not flags.gradient_checkpointing)
        raise UserError(
            f"the GPU's memory is too small for --micro_batch_tokens {n_tokens}: try "
            + " or ".join([*advice, "a smaller --max_length", "a larger GPU"])
        ) from None
    finally:
        policy.eval()
        for weight in weights:
            weight.grad = None


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities and metrics of pairs

METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "logps/accuracies", "nll_loss", "lengths/chosen", "lengths/rejected",
)  # fmt: skip


def to_device(batch: dict, device: torch.device) -> dict:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def micro_batches(pairs: Pairs, indices: Sequence[int], collate: TreeCollator, accelerator: Accelerator, name: str):
    """This process's micro-batches of these pairs, on its device; all processes get equally many."""
    rank, world = accelerator.process_index, accelerator.num_processes
    starts = range(0, len(indices), 256)
    for start in tqdm(starts, name, leave=False, disable=rank > 0 or not sys.stderr.isatty()):
        for batch in collate(pairs.read(indices[start : start + 256]), world)[rank::world]:
            yield to_device(batch, accelerator.device)


def gather_pairs(values: torch.Tensor, batch: dict) -> torch.Tensor:
    """[M] of responses to [P, 2] of pairs, chosen first."""
    return torch.stack([values[batch["chosen_index"]], values[batch["rejected_index"]]], dim=1)


def pair_metrics(policy_logps: torch.Tensor, ref_logps: torch.Tensor, batch: dict, flags: Flags):
    """Losses [P], and METRICS [P, K] without gradient, from log-probabilities [P, 2] in nats, chosen first."""
    lengths = gather_pairs(batch["response_lengths"], batch)  # [P, 2] in tokens
    losses, *rewards = dpo_loss(
        *policy_logps.unbind(1), *ref_logps.unbind(1), *lengths.unbind(1),
        flags.beta, flags.label_smoothing, flags.loss_type, flags.sft_weight,
    )  # fmt: skip
    logps = policy_logps.detach().unbind(1)
    by_reward, by_logp = (0.5 + 0.5 * torch.sign(chosen - rejected) for chosen, rejected in (rewards, logps))
    nll = -logps[0] / lengths[:, 0]
    columns = [losses.detach(), *rewards, rewards[0] - rewards[1], by_reward, *logps, by_logp, nll, *lengths.unbind(1)]
    return losses, torch.stack(columns, dim=1)


class ReferenceLogps:
    """The reference's log-probabilities, [n, 2] over all pairs of a set, each computed once in a run."""

    def __init__(self, pairs: Pairs, collate: TreeCollator, model: PreTrainedModel, accelerator: Accelerator):
        self.pairs, self.collate, self.scorer, self.accelerator = pairs, collate, ResponseScorer(model), accelerator
        self.logps = torch.zeros(len(pairs), 2, dtype=torch.float64, device=accelerator.device)
        self.known = np.zeros(len(pairs), dtype=bool)

    @torch.no_grad()
    def __call__(self, batch: dict) -> torch.Tensor:
        """[P, 2] for the pairs of a micro-batch, from the table or, the first time, from the model."""
        if self.known[batch["index_on_host"]].all():
            return self.logps[batch["pair_index"]]
        with self.accelerator.autocast():
            logps = gather_pairs(self.scorer(batch), batch)
        if batch["weight"]:
            self.logps[batch["pair_index"]] = logps
            self.known[batch["index_on_host"]] = True
        return logps

    def fill(self, stop: "StopSignals") -> None:
        """Compute all that isn't known yet, the work divided between the processes; less if asked to stop."""
        missing = np.flatnonzero(~self.known)
        missing = missing[np.argsort(self.pairs.keys[missing], kind="stable")]  # a prompt's pairs together
        for batch in micro_batches(self.pairs, missing, self.collate, self.accelerator, "Reference"):
            self(batch)
            if stop.requested():
                break
        self.share()
        self.scorer = None

    def share(self) -> None:
        """Give every process what each of them has computed."""
        if self.accelerator.num_processes > 1:
            known = torch.from_numpy(self.known).to(self.logps)
            count = self.accelerator.reduce(known, "sum")
            self.logps = self.accelerator.reduce(self.logps * known[:, None], "sum") / count.clamp(min=1)[:, None]
            self.known = (count > 0).cpu().numpy()

    def state_dict(self) -> dict[str, torch.Tensor]:
        self.share()
        return {"logps": self.logps.cpu(), "known": torch.from_numpy(self.known)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.logps.copy_(state["logps"])
        self.known = state["known"].numpy().copy()


def summarize(table: np.ndarray, keys: np.ndarray) -> dict[str, Any]:
    """Means of METRICS [n, K]; accuracy where the chosen response is the longer or the shorter one, with the number of
    these pairs; standard errors of the accuracies, over prompts, since a prompt's pairs are not independent."""
    column = dict(zip(METRICS, table.T, strict=True))
    found = {name: float(values.mean()) for name, values in column.items()}
    prompts, prompt = np.unique(keys, return_inverse=True)
    found |= {"pairs": len(keys), "prompts": len(prompts)}
    longer = np.sign(column["lengths/chosen"] - column["lengths/rejected"])
    for name, sign in (("chosen_longer", 1), ("chosen_shorter", -1)):
        right = column["rewards/accuracies"][longer == sign]
        found[f"pairs/{name}"] = len(right)
        found[f"rewards/accuracies_{name}"] = float(right.mean()) if len(right) else None
    for name in ("rewards/accuracies", "logps/accuracies"):
        by_prompt = np.bincount(prompt, column[name] - found[name])
        found[f"{name}_se"] = float(np.sqrt((by_prompt**2).sum()) / len(keys))
    return found


@torch.no_grad()
def evaluate_policy(scorer, ref_logps: ReferenceLogps, tokenizer, flags: Flags, with_answers: bool = False) -> dict:
    """Held-out figures of a policy as it is now, together and by domain, and its answers if asked for.

    They are the same for any number of processes and any cut into micro-batches.
    """
    pairs, accelerator = ref_logps.pairs, ref_logps.accelerator
    if not len(pairs):
        return {}
    scorer.eval()
    table = torch.zeros(len(pairs), len(METRICS), dtype=torch.float64, device=accelerator.device)
    for batch in micro_batches(pairs, range(len(pairs)), ref_logps.collate, accelerator, "Evaluating"):
        with accelerator.autocast():
            policy_logps = gather_pairs(scorer(batch), batch)
        _, metrics = pair_metrics(policy_logps, ref_logps(batch), batch, flags)
        if batch["weight"]:
            table[batch["pair_index"]] = metrics
    table = accelerator.reduce(table, "sum").cpu().numpy()
    found = {"metrics": summarize(table, pairs.keys), "domains": {}}
    for name in sorted(set(pairs.domains)):
        here = pairs.domains == name
        found["domains"][name] = summarize(table[here], pairs.keys[here])
    if with_answers and accelerator.is_main_process and flags.max_new_tokens:
        with accelerator.autocast():
            found["answers"] = answer(accelerator.unwrap_model(scorer).model, tokenizer, pairs, flags.max_new_tokens)
    scorer.train()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# One step, and what is said about it


def forward_backward(
    batches: list[dict], n_pairs: int, scorer: torch.nn.Module, ref_logps: ReferenceLogps, meter: "Meter", flags: Flags
) -> None:
    """The gradients of one step's loss: the mean over exactly the step's `n_pairs` pairs, however they are cut.

    `batches` are this process's micro-batches of the step; `n_pairs` counts the pairs of all processes.
    """
    accelerator = ref_logps.accelerator
    with accelerator.autocast():  # around all micro-batches: weights are cast to bf16 once a step
        for batch in batches:
            is_last = batch is batches[-1]
            batch = to_device(batch, accelerator.device)
            with contextlib.nullcontext() if is_last else accelerator.no_sync(scorer):
                policy_logps = gather_pairs(scorer(batch), batch)  # [P, 2]
                losses, metrics = pair_metrics(policy_logps, ref_logps(batch), batch, flags)  # [P], [P, K]
                # DDP averages the gradients over the processes; the loss is a mean over the pairs of all of them.
                accelerator.backward(losses.sum() * batch["weight"] * accelerator.num_processes / n_pairs)
            if batch["weight"]:
                meter.add(metrics, batch)


class Meter:
    """What has happened since the last log line. It stays on the device: a GPU is waited for only when it is read."""

    def __init__(self, steps: StepBatches, accelerator: Accelerator):
        self.steps, self.accelerator, device = steps, accelerator, accelerator.device
        self.step_sums = torch.zeros(len(METRICS) + 2, dtype=torch.float64, device=device)  # METRICS, pairs, tokens
        self.sums = torch.zeros(len(METRICS) + 3, dtype=torch.float64, device=device)  # the same, skipped steps
        self.losses = torch.zeros(len(steps.pairs), dtype=torch.float64, device=device)  # of each pair, the last one
        self.first_bad, self.bad_in_a_row, self.most_in_a_row = torch.tensor([-1, 0, 0], device=device)
        self.clock = time.perf_counter()

    def add(self, metrics: torch.Tensor, batch: dict) -> None:
        """The METRICS [P, K] of a micro-batch of the present step."""
        self.step_sums[:-2] += metrics.sum(0)
        self.step_sums[-2] += len(metrics)
        self.step_sums[-1] += batch["n_tokens"]
        self.losses[batch["pair_index"]] = metrics[:, 0]

    def end_step(self, step: int, grad_norm: torch.Tensor) -> torch.Tensor:
        """Whether the step's gradient is not finite: then the step is to be skipped, and is only counted."""
        is_bad = ~torch.isfinite(grad_norm)
        self.sums[:-1] += torch.where(is_bad, 0.0, self.step_sums)
        self.sums[-1] += is_bad * self.accelerator.is_main_process
        self.step_sums.zero_()
        is_first = is_bad & (self.bad_in_a_row == 0) & (self.most_in_a_row < 5)
        self.first_bad = torch.where(is_first, step, self.first_bad)
        self.bad_in_a_row = torch.where(is_bad, self.bad_in_a_row + 1, 0)
        self.most_in_a_row = torch.maximum(self.most_in_a_row, self.bad_in_a_row)
        return is_bad

    def read(self) -> dict[str, Any]:
        """Means over the pairs of all processes, rates and `skipped_steps` since the last reading; then begin anew."""
        *totals, n_pairs, n_tokens, n_skipped = self.accelerator.reduce(self.sums, "sum").tolist()
        seconds = time.perf_counter() - self.clock
        line = {name: total / n_pairs if n_pairs else None for name, total in zip(METRICS, totals, strict=True)}
        line |= {"pairs_per_second": n_pairs / seconds, "tokens_per_second": n_tokens / seconds}
        self.sums.zero_()
        self.clock = time.perf_counter()
        return line | {"skipped_steps": int(n_skipped)}

    def check(self) -> str | None:
        """What to say about the first step that was skipped, if there is one.

        Raises UserError after five skipped steps in a row.
        """
        if self.first_bad < 0:
            return None
        indices = self.steps.indices(int(self.first_bad))
        is_good = np.isfinite(self.accelerator.reduce(self.losses, "sum")[indices].cpu().numpy())
        rows = sorted(self.steps.pairs.rows[indices if is_good.all() else indices[~is_good]].tolist())
        text = f"the loss or its gradient at step {int(self.first_bad) + 1} is not finite (rows {rows[:8]} of the data)"
        if self.most_in_a_row < 5:
            return f"{text}: the step was skipped, and later ones are counted in skipped_steps"
        raise UserError(
            f"{text}, and so on for {int(self.most_in_a_row)} steps in a row; none has changed the weights. Look at "
            "the rows, lower --learning_rate or try --mixed_precision no: in a new run, which may start from a "
            "checkpoint's folder as --model_name_or_path, with --ref_model_name_or_path as it was"
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside doesn't count as training time."""
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.accelerator.reduce(self.sums, "sum").cpu(), "seconds": time.perf_counter() - self.clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"] * self.accelerator.is_main_process)  # they are those of all processes
        self.clock = time.perf_counter() - state["seconds"]


class RunLog:
    """metrics.jsonl, trackers, progress bar and printed lines of a run: all in the main process."""

    def __init__(self, path: Path, accelerator: Accelerator, step: int, total_steps: int):
        self.path, self.accelerator, self.total_steps, self.warned = path, accelerator, total_steps, set()
        self.bar = tqdm(
            total=total_steps, initial=step, disable=not (accelerator.is_main_process and sys.stderr.isatty()),
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )  # fmt: skip

    def say(self, text: str) -> None:
        self.bar.clear()
        self.accelerator.print(text)

    def warn(self, name: str, text: str | None) -> None:
        """Say it, if there is anything to say, once in a run."""
        if text and name not in self.warned:
            self.warned.add(name)
            self.say(f"warning: {text}")

    def write(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            except OSError as error:  # a full disk: training is worth more than its log
                self.warn("metrics", f"{self.path} can't be written to ({first_line(error)})")
            numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
            self.accelerator.log(numbers, step=line["step"])

    def training(self, line: dict[str, Any]) -> None:
        self.write(line)
        if line["loss"] is not None:  # else all steps were skipped
            text = f"loss {line['loss']:.4f}  acc {line['rewards/accuracies']:.2f}"
            text += f"  {line['pairs_per_second']:.2f} pairs/s"
            self.bar.set_postfix_str(text)
            if self.bar.disable:
                more = f"margin {line['rewards/margins']:.3f}  lr {line['learning_rate']:.2e}"
                self.say(f"step {line['step']}/{self.total_steps}  {text}  {more}")

    def evaluation(self, step: int, epoch: float, found: dict[str, Any]) -> None:
        if found:
            now = found["metrics"]
            self.write({"step": step, "epoch": epoch} | {f"eval_{name}": value for name, value in now.items()})
            by_reward, by_logp = now["rewards/accuracies"], now["logps/accuracies"]
            text = f"loss {now['loss']:.4f}  acc {by_reward:.3f} by reward, {by_logp:.3f} by logp"
            self.say(f"step {step}, held out: {text}  margin {now['rewards/margins']:.3f}")


def loss_at_start(flags: Flags) -> float:
    """The loss where policy and reference agree, without the SFT term: ln 2 for sigmoid."""
    zero, one = torch.zeros(1), torch.ones(1)
    return dpo_loss(zero, zero, zero, zero, one, one, flags.beta, flags.label_smoothing, flags.loss_type)[0].item()


def check_first_step(line: dict[str, Any], flags: Flags) -> None:
    """Where policy and reference are the same model, each reward is 0 and the loss known.

    Raises UserError if it isn't so.
    """
    tolerance = 10 * flags.beta * (1e-3 if flags.mixed_precision == "no" else 0.05)
    if line["loss"] is not None and max(abs(line["rewards/chosen"]), abs(line["rewards/rejected"])) > tolerance:
        expected = loss_at_start(flags) + flags.sft_weight * line["nll_loss"]
        raise UserError(
            f"the loss at the first step is {line['loss']:.4f} and not {expected:.4f}, though policy and reference "
            f"have the same weights (rewards {line['rewards/chosen']:.4f}, {line['rewards/rejected']:.4f}): they must "
            "compute in the same precision and without dropout"
        )


def warnings_about(line: dict[str, Any], flags: Flags, warmup_steps: int) -> Iterator[tuple[str, str]]:
    """What a log line gives reason to warn of: (name, text)."""
    if line["loss"] is None:
        return
    if line["step"] >= 10 and abs(line["rewards/margins"]) < 2e-4:
        reasons = {  # the first that holds
            "--learning_rate is 0": flags.learning_rate == 0,
            f"the learning rate is still rising, until step {warmup_steps} (--warmup_ratio, --warmup_steps)":
                line["step"] <= warmup_steps,
            "the gradients are 0": line["grad_norm"] == 0,
            f"--beta {flags.beta} is so small that the rewards, beta times log-ratio, hardly differ": flags.beta < 0.01,
            f"--learning_rate {flags.learning_rate} hardly moves the log-probabilities; try ten times as much": True,
        }  # fmt: skip
        why = next(text for text, holds in reasons.items() if holds)
        yield "stuck", f"the loss stays where it began, at {loss_at_start(flags):.4f}: {why}"
    sunk = -line["rewards/chosen"] / flags.beta / line["lengths/chosen"]
    if sunk > 0.1:
        yield "sinking", (
            f"the chosen responses have become less likely than under the reference, by {sunk:.2f} nats a token (more "
            "than 0.1): DPO raises only the margin. --sft_weight 0.1, a lower --learning_rate, fewer steps or a higher "
            "--beta help"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder, its checkpoints, and stopping


def claim_output_dir(flags: Flags) -> Path:
    """The run's folder, which is now there; another run's folder is never written to.

    Raises UserError if it holds another run, or can't be written to.
    """
    resume = flags.resume_from_checkpoint
    if flags.output_dir is None and resume is None:
        name = "eval" if flags.eval_only else "demo" if flags.demo else "dpo"
        for folder in [Path("output", name if n == 1 else f"{name}-{n}") for n in range(1, 1000)]:
            with contextlib.suppress(FileExistsError):  # made by this run or by another one: never by both
                folder.mkdir(parents=True)
                return folder
    folder = Path(flags.output_dir) if flags.output_dir else Path(resume).parent
    its_own = resume == "latest" or resume and Path(resume).resolve().parent == folder.resolve()
    used = ("metrics.jsonl", "report.md", "model.safetensors")
    if (find_checkpoints(folder) or any((folder / name).exists() for name in used)) and not its_own:
        raise UserError(f"--output_dir {folder} holds another run: give another, or --resume_from_checkpoint latest")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder} can't be written to")
    return folder


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def read_checkpoint(folder: Path, settings: dict[str, Any], flags: Flags) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from, if any, and what to go on with.

    Raises UserError if there is none, if it is damaged, older than another one here, or another run's.
    """
    if flags.resume_from_checkpoint is None:
        return None, {"step": 0, "before": {}, "settings": settings}
    there = find_checkpoints(folder)
    if flags.resume_from_checkpoint == "latest" and not there:
        raise UserError(f"--resume_from_checkpoint latest: there is no checkpoint in {folder}")
    chosen = there[0] if flags.resume_from_checkpoint == "latest" else Path(flags.resume_from_checkpoint)
    if chosen.resolve() in [path.resolve() for path in there[1:]]:
        raise UserError(f"{chosen}: {there[0]} is newer and would be lost; take `latest`, or give another --output_dir")
    try:
        state = torch.load(chosen / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is no archive makes torch raise
        raise UserError(f"{chosen} is no whole checkpoint ({first_line(error)}): remove it, take `latest`") from None
    for name, value in settings.items():
        if (old := state["settings"].get(name)) != value:
            hint = " (the file, the tokenizer, --max_length, --max_*_samples or --domains)" * (name == "data")
            raise UserError(f"{chosen} belongs to another run: {name}{hint} was {old} and is {value} now")
    return chosen, state


def save_model(model: PreTrainedModel, tokenizer, folder: Path) -> None:
    """What `from_pretrained` needs. The generation config names the end-of-turn token: that is where to stop."""
    eos = [token for token in dict.fromkeys([end_of_turn_id(tokenizer), tokenizer.eos_token_id]) if token is not None]
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = eos[-1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_checkpoint(folder: Path, state: dict, stateful: dict, scorer, tokenizer, flags: Flags, log: RunLog) -> None:
    """A checkpoint is complete or absent: written aside, synced to the disk, then renamed.

    All processes together. A disk that is full costs the checkpoint, not the run.
    """
    state = state | {name: owner.state_dict() for name, owner in stateful.items()}
    if log.accelerator.is_main_process:
        final = folder / f"checkpoint-{state['step']}"
        aside = folder / f".{final.name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            save_model(log.accelerator.unwrap_model(scorer).model, tokenizer, aside)
            torch.save(state, aside / "state.pt")
            os.sync()  # the files must be on the disk before their name is
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in find_checkpoints(folder)[flags.save_total_limit :]:
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, as each library puts it
            shutil.rmtree(aside, ignore_errors=True)
            last = next((str(path) for path in find_checkpoints(folder)), "none")
            log.say(f"warning: no checkpoint at step {state['step']} ({first_line(error)}); the last one: {last}")
    log.accelerator.wait_for_everyone()


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines behind a step, which the resumed run will write again, and a line that was cut off."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    aside = path.with_name(f".{path.name}.tmp")
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)


class StopSignals:
    """Notes SIGTERM and Ctrl-C, so that the run can stop between two steps; the same once more ends the process."""

    def __init__(self, accelerator: Accelerator):
        self.caught, self.is_main = False, accelerator.is_main_process
        # Processes agree through a group of their own on CPUs: a question to the GPU in each step would stall it.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def give_back(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        self.caught = True
        signal.signal(number, signal.SIG_DFL)
        if self.is_main:
            print("\nstopping after this step, with a checkpoint (again: exit at once)", file=sys.stderr)

    def requested(self) -> bool:
        """Whether any process was asked to stop: the same answer in all of them."""
        count = torch.tensor(int(self.caught))
        if self.group is not None:
            torch.distributed.all_reduce(count, group=self.group)
        return bool(count)


def leave_signals_to_main(worker: int) -> None:
    """Ctrl-C and SIGTERM go to whole process groups: a loader that died of them would end the run in the middle."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Stopped(UserError):
    """Asked to stop, and did: said by the main process alone."""


# ---------------------------------------------------------------------------------------------------------------------
# Before and after


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer, pairs: Pairs, max_new_tokens: int) -> list[dict[str, Any]]:
    """What the model answers to six prompts, from as many domains as there are: greedy, one at a time.

    `repetition` is the share of the answer's 4-grams of tokens that stood in it before; `stopped`, whether it ended its
    turn by itself.
    """
    _, first = np.unique(pairs.keys, return_index=True)  # one pair of each prompt
    seen: Counter[str] = Counter()
    turns = []
    for i in sorted(first.tolist()):
        turns.append((seen[pairs.domains[i]], i))
        seen[pairs.domains[i]] += 1
    answers, end_id, its_own_config = [], end_of_turn_id(tokenizer), model.generation_config
    # Its own config may ask for penalties or for sampling.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end_id, pad_token_id=end_id)
    for pair in pairs.read(sorted(i for _, i in sorted(turns)[:6])):
        prompt = torch.tensor(np.asarray(pair["prompt_ids"]), dtype=torch.long, device=model.device)[None]
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens)
        ids = output[0, prompt.shape[1] :].tolist()
        grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        answers.append(
            {
                "domain": str(pairs.domains[pair["index"]]),
                "prompt": tokenizer.decode(prompt[0], skip_special_tokens=True).strip(),
                "answer": tokenizer.decode(ids, skip_special_tokens=True),
                "chosen": tokenizer.decode(pair["chosen_ids"], skip_special_tokens=True),
                "n_tokens": len(ids),
                "stopped": end_id in ids,
                "repetition": (len(grams) - len(set(grams))) / max(1, len(grams)),
            }
        )
    model.generation_config = its_own_config
    return answers


FIGURES = (  # of the report: what, its metric, its format
    ("loss (nats)", "loss", ".4f"),
    ("accuracy by reward", "rewards/accuracies", ".3f"),
    ("accuracy by log-probability", "logps/accuracies", ".3f"),
    ("margin (nats, beta included)", "rewards/margins", ".3f"),
    ("log-probability of chosen (nats)", "logps/chosen", ".2f"),
    ("log-probability of rejected (nats)", "logps/rejected", ".2f"),
    ("negative log-likelihood of chosen (nats a token)", "nll_loss", ".3f"),
    ("pairs whose chosen response is the longer one", "pairs/chosen_longer", "d"),
    ("accuracy by reward in these", "rewards/accuracies_chosen_longer", ".3f"),
    ("pairs whose chosen response is the shorter one", "pairs/chosen_shorter", "d"),
    ("accuracy by reward in these", "rewards/accuracies_chosen_shorter", ".3f"),
)


def write_report(path: Path, before: dict, after: dict, flags: Flags, steps: int) -> list[str]:
    """Write `report.md`, before and after side by side; returns its table of figures as lines for the terminal."""
    names = public(flags)
    title = f"{names['model_name_or_path']} on {names['dataset_name']}, {steps} steps."
    if flags.eval_only:
        title = f"{names['ref_model_name_or_path']} (before) and {names['model_name_or_path']} (after)."
    lines, table = ["# Before and after", "", title, ""], []
    if before:
        old, new = before["metrics"], after["metrics"]
        table = [f"| held out, {old['pairs']} pairs of {old['prompts']} prompts | before | after |", "|---|---:|---:|"]
        for name, key, form in FIGURES:
            if old[key] is not None:
                errors = [f" ± {side[f'{key}_se']:.3f}" if f"{key}_se" in side else "" for side in (old, new)]
                table.append(f"| {name} | {old[key]:{form}}{errors[0]} | {new[key]:{form}}{errors[1]} |")
        lengths = f"{old['lengths/chosen']:.0f} (chosen) and {old['lengths/rejected']:.0f} (rejected) tokens on average"
        lines += [*table, "", f"± is one standard error over prompts. The held-out responses have {lengths}."]
    else:
        lines += ["No pairs were held out (`--max_eval_samples 0`): nothing to compare."]
    if len(before.get("domains", {})) > 1:
        lines += ["", "| before → after | pairs | " + " | ".join(name for name, _, _ in FIGURES[:4]) + " |"]
        lines += ["|---|---:|" + "---:|" * 4]
        for domain, old in before["domains"].items():
            cells = [f"{old[key]:{form}} → {after['domains'][domain][key]:{form}}" for _, key, form in FIGURES[:4]]
            lines.append(f"| {domain or '(none)'} | {old['pairs']} | " + " | ".join(cells) + " |")
    if before.get("answers"):
        lines += ["", f"## Answers to held-out prompts (greedy, at most {flags.max_new_tokens} tokens)", ""]
        lines += ["| | before | after |", "|---|---:|---:|"]
        for name, key, form in (("tokens", "n_tokens", ".0f"), ("ended by themselves", "stopped", ".0%"),
                                ("repeated 4-grams", "repetition", ".0%")):  # fmt: skip
            averages = (np.mean([float(one[key]) for one in side["answers"]]) for side in (before, after))
            lines.append(f"| {name} | " + " | ".join(f"{average:{form}}" for average in averages) + " |")
        for old, new in zip(before["answers"], after["answers"], strict=True):
            lines += ["", f"### {old['domain'] or 'Prompt'}"]
            texts = (old["prompt"], old["answer"], new["answer"], old["chosen"])
            for name, text in zip(("Prompt", "Before", "After", "Preferred in the data"), texts, strict=True):
                fence = next("`" * n for n in range(3, 1000) if "`" * n not in text)
                lines += ["", f"**{name}**", "", fence + "text", text, fence]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def compare_models(policy: PreTrainedModel, ref_logps: ReferenceLogps, tokenizer, log: RunLog, flags: Flags) -> None:
    """--eval_only: the report of a run that would have begun as the reference and ended as the policy."""
    before = evaluate_policy(ref_logps.scorer, ref_logps, tokenizer, flags, with_answers=True)
    after = evaluate_policy(ResponseScorer(policy), ref_logps, tokenizer, flags, with_answers=True)
    if log.accelerator.is_main_process:
        path = log.path.with_name("report.md")
        log.say("\n".join(["", *write_report(path, before, after, flags, 0), "", f"report {path}"]))


def write_results(model: PreTrainedModel, before: dict, after: dict, tokenizer, log: RunLog, flags: Flags) -> None:
    """The trained model, the report and the picture."""
    folder = log.path.parent
    save_model(model, tokenizer, folder)
    lines = write_report(folder / "report.md", before, after, flags, log.total_steps)
    for old, new in list(zip(before.get("answers", []), after.get("answers", []), strict=False))[:3]:
        question = old["prompt"].removesuffix("assistant").strip().splitlines()[-1:]
        lines += ["", f"prompt  {''.join(question)}", f"before  {old['answer']}", f"after   {new['answer']}"]
    log.say("\n".join(["", *lines, "", f"{folder}: the model, report.md, loss.png"]))
    try:
        plot_runs([read_run(folder)], folder / "loss.png")
    except PlotError as error:
        log.say(f"warning: no picture ({error})")


# ---------------------------------------------------------------------------------------------------------------------
# One run


def start_accelerator(flags: Flags) -> Accelerator:
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(f"{name} is not supported, only one process or DDP: `accelerate launch --multi_gpu`")
    # On Hopper and newer, cuDNN's attention is preferred and builds a graph for each new shape: here, for nearly each
    # micro-batch. (From reading torch's sources; not measured.)
    torch.backends.cuda.enable_cudnn_sdp(False)
    accelerate.utils.set_seed(flags.seed)
    try:
        return Accelerator(
            log_with=None if flags.report_to == "none" else flags.report_to,
            project_dir=".",  # some trackers want one now; where they write is set below
            mixed_precision=flags.mixed_precision,
            # Otherwise accelerate lets several processes on CPUs run side by side and know nothing of each other, and
            # takes a Mac's GPU, which has no float64.
            cpu=not torch.cuda.is_available(),
            # `accelerate config` may have left both in the environment, to divide gradients and to compile the model.
            gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
            kwargs_handlers=[
                accelerate.DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                # The others wait while the first process tokenizes a million rows: longer than NCCL's 10 minutes.
                accelerate.InitProcessGroupKwargs(timeout=timedelta(hours=3)),
            ],
        )
    except ValueError as error:
        raise UserError(f"accelerate can't start with these flags: {first_line(error)}") from None


TRACKERS = {  # the variable that names a project, and what accelerate's tracker calls the name of a run
    "wandb": ("WANDB_PROJECT", "name"), "swanlab": ("SWANLAB_PROJECT", "experiment_name"),
    "trackio": ("TRACKIO_PROJECT", "name"), "mlflow": ("MLFLOW_EXPERIMENT_NAME", "run_name"),
}  # fmt: skip


def start_tracker(accelerator: Accelerator, flags: Flags) -> None:
    """Project "dpo", or as the tracker's variable says; the run is named after its folder."""
    if flags.report_to != "none":
        variable, run_name = TRACKERS.get(flags.report_to, ("", ""))
        options = {flags.report_to: {run_name: Path(flags.output_dir).name}} if run_name else {}
        config = {name: str(value) if value is None else value for name, value in public(flags).items()}
        accelerator.project_configuration.logging_dir = flags.output_dir
        accelerator.init_trackers(os.environ.get(variable, "dpo"), config=config, init_kwargs=options)


def header(flags: Flags, summary: str, policy: PreTrainedModel, tokenizer, steps: StepBatches, n_steps: int) -> str:
    """What will be trained, on what, how: the lines before the first step."""
    (pair,) = steps.pairs.read([int(steps.indices(0)[0])])
    names, defaults = public(flags), asdict(Flags())
    sides = ("prompt", "chosen", "rejected")
    n_tokens, n_weights = steps.collate.micro_batch_tokens, sum(weight.numel() for weight in policy.parameters())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = {
        "model": f"{names['model_name_or_path']}, {n_weights:,} weights",
        "reference": names["ref_model_name_or_path"] or "the same, frozen",
        "data": summary,
        "steps": f"{n_steps:,} of {flags.train_batch_size} pairs, in micro-batches of up to {n_tokens:,} tokens, "
                 f"{steps.n_processes} process(es)",
        "device": f"{device}, attention {choose_attention(flags)}, torch {torch.__version__}, "
                  f"transformers {transformers.__version__}",
        "flags": " ".join(f"--{name} {value}" for name, value in names.items() if value != defaults[name]),
        **{side: repr(tokenizer.decode(pair[f"{side}_ids"]))[-140:] for side in sides},
    }  # fmt: skip
    return "\n".join(f"{name:10}{text}" for name, text in lines.items())


def prepare_steps(tokenizer, accelerator: Accelerator, flags: Flags):
    """The tokenized pairs, split by prompt, and the micro-batches of each step."""
    with accelerator.local_main_process_first():
        data = prepare(
            load_rows(flags.dataset_name, flags.dataset_split), tokenizer, flags.max_length,
            1 if flags.eval_only else flags.max_train_samples, flags.max_eval_samples,
            flags.domains.split(",") if flags.domains else None,
        )  # fmt: skip
    # By count, 8,192 tokens make a peak of 25 GB on a GPU. A CPU gains nothing from large micro-batches.
    n_tokens = flags.micro_batch_tokens or max(2 * flags.max_length, 8192 if torch.cuda.is_available() else 2048)
    collate = TreeCollator(n_tokens, one_row=choose_attention(flags) == "tree")
    place = accelerator.process_index, accelerator.num_processes
    return data, StepBatches(data.train, collate, flags.train_batch_size, flags.seed, flags.group_by_prompt, *place)


def train(flags: Flags) -> Path:
    """One run, from flags to files; returns the output folder."""
    accelerator = start_accelerator(flags)
    device, is_main, say = accelerator.device, accelerator.is_main_process, accelerator.print
    (flags.output_dir,) = accelerate.utils.broadcast_object_list([str(claim_output_dir(flags)) if is_main else None])
    folder = Path(flags.output_dir)
    if device.type == "cpu" and not flags.demo:
        say(f"warning: torch {torch.__version__} sees no GPU: this runs on the CPU (is the driver too old for it?)")
    if away := search_cache_only_if_hub_is_away([getattr(flags, name) for name in PATHS[:3]]):
        say(f"warning: {away}")

    # Rows to token ids, split by prompt; the policy, and the reference, which is the policy's start if none is given.
    tokenizer = load(AutoTokenizer, "--model_name_or_path", flags.model_name_or_path)
    data, steps = prepare_steps(tokenizer, accelerator, flags)
    total_steps = flags.max_steps if flags.max_steps > 0 else math.ceil(flags.num_train_epochs * steps.steps_per_epoch)
    warmup_steps = flags.warmup_steps or math.ceil(flags.warmup_ratio * total_steps)
    if flags.warmup_steps >= total_steps:
        raise UserError(f"--warmup_steps {warmup_steps}: the run has only {total_steps} steps")
    policy, reference, hashes = load_models(tokenizer, steps, accelerator, flags)
    if device.type == "cuda" and not flags.eval_only:
        rehearse(policy, reference, steps.collate, accelerator, flags)

    # The checkpoint to go on from, which must belong to this run.
    settings = hashes | {"data": f"{data.train.fingerprint} {data.held_out.fingerprint}"}
    settings |= {f"--{name}": getattr(flags, name) for name in MUST_MATCH_ON_RESUME}
    checkpoint, state = read_checkpoint(folder, settings, flags)
    step = state["step"]
    log = RunLog(folder / "metrics.jsonl", accelerator, step, total_steps)
    say(header(flags, data.summary(), policy, tokenizer, steps, total_steps))
    n_bytes = 4 * sum(weight.numel() for weight in policy.parameters())  # of the model; AdamW's moments are two more
    if flags.save_steps and (free := shutil.disk_usage(folder).free) < n_bytes * (4 + 3 * flags.save_total_limit):
        say(f"warning: {free / 1e9:.1f} GB are free; each of the checkpoints will take {n_bytes * 3e-9:.1f}")

    # The reference's log-probabilities: computed as they are needed, or all before the policy moves.
    train_ref, eval_ref = (
        ReferenceLogps(pairs, steps.collate, reference, accelerator) for pairs in (data.train, data.held_out)
    )
    if flags.eval_only:
        compare_models(policy, eval_ref, tokenizer, log, flags)
        return folder
    start_tracker(accelerator, flags)
    stop = StopSignals(accelerator)
    if checkpoint is not None:
        train_ref.load_state_dict(state.pop("reference"))
    if flags.precompute_ref_log_probs:
        eval_ref.fill(stop)
        train_ref.fill(stop)
    del reference  # precomputed, it is no longer in memory

    # The policy and what else changes from step to step, as they are at the start or in the checkpoint.
    if checkpoint is not None:
        policy = load_model(str(checkpoint), flags, "--resume_from_checkpoint").to(device)
    scorer = accelerator.prepare(ResponseScorer(policy.train()))
    rate = {"lr": flags.learning_rate, "weight_decay": flags.weight_decay}
    optimizer = torch.optim.AdamW(scorer.parameters(), betas=(0.9, 0.999), eps=1e-8, fused=True, **rate)
    # Not prepared: a prepared scheduler steps once per process, and the learning rate would fall N times too fast.
    scheduler = transformers.get_scheduler(flags.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    meter = Meter(steps, accelerator)
    stateful = {"optimizer": optimizer, "scheduler": scheduler, "meter": meter}
    if checkpoint is not None:
        for name, owner in stateful.items():
            owner.load_state_dict(state.pop(name))
        if is_main:
            cut_metrics(log.path, step)
        log.write({"step": step, "event": "resumed", "checkpoint": checkpoint.name})
    stateful["reference"] = train_ref
    go_on = f"go on with the same flags and --output_dir {folder} --resume_from_checkpoint latest"
    if flags.precompute_ref_log_probs and stop.requested():
        save_checkpoint(folder, state, stateful, scorer, tokenizer, flags, log)
        raise Stopped(f"stopped while precomputing; {go_on}")
    if step == 0:
        log.write({"step": 0, "event": "start", "loss_at_start": loss_at_start(flags), "flags": public(flags)})
        with meter.paused():
            state["before"] = evaluate_policy(scorer, eval_ref, tokenizer, flags, with_answers=True)
        log.evaluation(0, 0.0, state["before"])
    loader = torch.utils.data.DataLoader(
        steps, sampler=range(step, total_steps), batch_size=None, collate_fn=list, pin_memory=device.type == "cuda",
        num_workers=int(device.type == "cuda"), worker_init_fn=leave_signals_to_main,
    )  # fmt: skip

    for batches in loader:
        forward_backward(batches, len(steps.indices(step)), scorer, train_ref, meter, flags)
        grad_norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), flags.max_grad_norm or math.inf)
        is_bad = meter.end_step(step, grad_norm)
        optimizer.found_inf = is_bad.float()  # then the fused AdamW changes nothing
        optimizer.step()
        optimizer.zero_grad()
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        step += 1
        epoch = step / steps.steps_per_epoch
        if step % steps.steps_per_epoch == 0:
            train_ref.share()

        if step == 1 or step % flags.logging_steps == 0 or step == total_steps:
            log.warn("skipped", meter.check())
            line = {"step": step, "epoch": epoch} | meter.read()
            line |= {"grad_norm": float(grad_norm) if grad_norm.isfinite() else None, "learning_rate": learning_rate}
            if device.type == "cuda":
                line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            if step == 1 and len(set(hashes.values())) == 1:
                check_first_step(line, flags)
            log.training(line)
            for name, text in warnings_about(line, flags, warmup_steps):
                log.warn(name, text)
        if flags.eval_steps and step % flags.eval_steps == 0 and step < total_steps:
            with meter.paused():
                log.evaluation(step, epoch, evaluate_policy(scorer, eval_ref, tokenizer, flags))
        stopping = stop.requested() and step < total_steps
        if stopping or flags.save_steps and (step % flags.save_steps == 0 or step == total_steps):
            with meter.paused():
                save_checkpoint(folder, state | {"step": step}, stateful, scorer, tokenizer, flags, log)
        log.bar.update()
        if stopping:
            log.bar.close()
            raise Stopped(f"stopped after step {step}; {go_on}")

    log.bar.close()
    stop.give_back()
    after = evaluate_policy(scorer, eval_ref, tokenizer, flags, with_answers=True)
    log.evaluation(step, step / steps.steps_per_epoch, after)
    if is_main:
        write_results(accelerator.unwrap_model(scorer).model, state["before"], after, tokenizer, log, flags)
    accelerator.end_training()
    return folder


def main(argv: list[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
    rank, flags, text = os.environ.get("RANK", "0"), Flags(), None
    try:
        flags = parse_flags(argv)
        train(flags)
    except torch.OutOfMemoryError as error:
        text = f"{first_line(error)} Lower --micro_batch_tokens; a checkpoint can be resumed with it"
    except (UserError, OSError, SafetensorError) as error:  # the last two: a full disk
        if rank == "0" or not isinstance(error, Stopped):
            text = str(error)
    except KeyboardInterrupt:
        text = "stopped"
    else:
        return 0
    if text:
        print(f"dpo_train.py{'' if rank == '0' else f' (process {rank})'}: {text}", file=sys.stderr)
    if flags.output_dir:
        with contextlib.suppress(OSError):
            os.rmdir(flags.output_dir)  # only if nothing has been written
    return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # into a pipe or a file, too, a line comes when it is said
    sys.exit(main())
