"""A training on fake tensors, which have shapes, dtypes and devices and no values: what it takes, without taking it."""

import bisect
import contextlib
import weakref
from functools import partial
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import dpo_train
import loss


class Storages(TorchDispatchMode):
    """Bytes of the storages that operators have returned and that are still there, and their peak: in blocks of 512
    bytes, as CUDA's allocator hands them out. What a kernel takes and frees inside itself is not seen."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(result if isinstance(result, list | tuple) else [result])
        return result

    def add(self, tensors) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                size = -(-storage.nbytes() // 512) * 512
                self.seen.add(storage._cdata)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, size).atexit = False

    def freed(self, name: int, size: int) -> None:
        self.seen.remove(name)
        self.now -= size


def stand_in(device: torch.device, autocast=contextlib.nullcontext) -> SimpleNamespace:
    """What our trainer asks of an accelerator, for one process."""
    return SimpleNamespace(
        device=device, num_processes=1, process_index=0, is_main_process=True, autocast=autocast,
        no_sync=lambda _: contextlib.nullcontext(), reduce=lambda tensor, _: tensor, unwrap_model=lambda model: model,
        backward=lambda loss: loss.backward(),
    )  # fmt: skip


class Training:
    """Models of a configuration without its weights, and what surrounds them in `dpo_train.train`."""

    def __init__(self, flags: dpo_train.Flags, steps, device: str = "cpu", autocast=None, n_layers: int | None = None):
        dtype = torch.bfloat16 if flags.mixed_precision == "bf16" else None
        autocast = autocast or partial(torch.autocast, device, dtype, enabled=dtype is not None)
        self.flags, self.accelerator = flags, stand_in(torch.device(device), autocast)
        config = AutoConfig.from_pretrained(flags.model_name_or_path)
        config._attn_implementation, config.dtype = flags.attn_implementation, torch.float32
        config.num_hidden_layers = n_layers or config.num_hidden_layers
        config.layer_types = config.layer_types[: config.num_hidden_layers]
        with unset_fake_temporarily(), torch.device("meta"):
            policy = AutoModelForCausalLM.from_config(config)
            reference = policy if flags.precompute_ref_log_probs else AutoModelForCausalLM.from_config(config).eval()
            if reference is not policy:
                dpo_train.freeze(reference, flags.mixed_precision)
        for model in {policy, reference}:
            model.to_empty(device=device).tie_weights()
        if flags.gradient_checkpointing:
            (getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable)()
        self.policy, self.scorer = policy, dpo_train.ResponseScorer(policy.train())
        self.reference = dpo_train.ReferenceLogps(steps.pairs, steps.collate, reference, self.accelerator)
        self.reference.known[:] = flags.precompute_ref_log_probs
        self.meter = dpo_train.Meter(steps, self.accelerator)
        self.optimizer = torch.optim.AdamW(policy.parameters(), flags.learning_rate, fused=True)

    def gradients(self, batches: list[dict]) -> None:
        n_pairs = sum(len(batch["pair_index"]) for batch in batches)
        dpo_train.forward_backward(batches, n_pairs, self.scorer, self.reference, self.meter, self.flags)

    def step(self, batches: list[dict]) -> None:
        """As in `dpo_train.train`."""
        self.gradients(batches)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.scorer.parameters(), 1.0)
        self.optimizer.found_inf = self.meter.end_step(0, grad_norm).float()
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextlib.contextmanager
def as_on_a_gpu():
    """On CPU tensors, tiles of the size and attention over trees of the form that a GPU would get."""
    before = loss.TILES["cpu"], loss.plan_attention
    loss.TILES["cpu"] = loss.TILES["cuda"]
    loss.plan_attention = lambda segments, dtype, device: partial(
        loss._attend_at_once, loss._gather_plan(segments, device)
    )
    yield
    loss.TILES["cpu"], loss.plan_attention = before


def full_micro_batch(steps, n_tokens: int) -> dict:
    """As full as they come: of the most pairs that one can hold."""
    steps.collate.micro_batch_tokens, order = n_tokens, steps.indices(0)

    def cut(n: int) -> list[dict]:
        return steps.collate(steps.pairs.read(order[:n]))

    return cut(bisect.bisect_left(range(1, len(order)), 2, key=lambda n: len(cut(n))))[0]


def peak(flags: dpo_train.Flags, steps, batch: dict, fake: bool = True) -> int:
    """Most bytes in a step's last micro-batch and its update, with gradients and AdamW's moments there already."""
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
        training = Training(flags, steps)
        with Storages() as storages:
            for model in {training.policy, training.reference.scorer.model}:
                storages.add(model.parameters())
            for weight in training.policy.parameters():
                weight.grad = torch.zeros_like(weight)
            training.optimizer.step()
            storages.peak = 0
            training.step([batch])
            return storages.peak
