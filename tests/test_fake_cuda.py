"""The GPU's way without a GPU: tensors that have shapes, dtypes and devices, and no values.

Backward passes don't run on them without a driver. What they can't show: speed, memory, and which kernels are taken.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_training import Storages, Training, as_on_a_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer

import dpo_train
from dataset import StepBatches, TreeCollator, load_rows, prepare

CUDA = torch.device("cuda", 0)
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.torch_attn._varlen_attn}


class OneDevice(TorchDispatchMode):
    """Fails where an operator other than a copy meets tensors of two devices, numbers apart; notes products' dtypes.

    Fake tensors refuse most of such mixes by themselves, but not an index on the CPU, which makes a GPU wait.
    """

    def __init__(self):
        super().__init__()
        self.dtypes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        devices = {tensor.device.type for tensor in inputs if tensor.ndim}
        assert copies or len(devices) < 2, f"{function} of tensors on {devices}"
        if function.overloadpacket in PRODUCTS:
            kinds = {tensor.dtype for tensor in inputs if tensor.is_floating_point()}
            assert len(kinds) == 1, f"{function} of dtypes {kinds}"
            name = function.overloadpacket.__name__
            self.dtypes.setdefault(name, set()).update(kinds)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def autocast_without_a_driver():
    """`torch.autocast("cuda")` switches itself off where there is no driver."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.fixture
def on_fake_cuda(model_dir, data_file, monkeypatch):
    """How to get a training on a fake GPU, by the name of its attention."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch._C, "_get_cudnn_sdp_enabled", lambda: False)  # as start_accelerator has it
    data = prepare(load_rows(str(data_file)), AutoTokenizer.from_pretrained(model_dir), 128, None, 8)

    @contextlib.contextmanager
    def start(attention, device="cuda"):
        words = {"model_name_or_path": model_dir, "max_length": 128, "attn_implementation": attention}
        flags = dpo_train.parse_flags([word for k, v in words.items() for word in (f"--{k}", str(v))])
        collate = TreeCollator(512, one_row=attention == "tree")
        steps = StepBatches(data.train, collate, 8, 42)
        with FakeTensorMode(allow_non_fake_inputs=True), OneDevice() as seen:
            training = Training(flags, steps, device, autocast_without_a_driver if device == "cuda" else None)
            training.accelerator.backward = lambda loss: backward(loss)
            yield training, data, steps, seen

    def backward(loss):
        assert loss.device == CUDA and loss.dtype == torch.float64 and loss.requires_grad

    return start


@pytest.mark.parametrize("attention", ["sdpa", "tree"])
def test_a_step_stays_on_the_device_and_computes_in_bf16(on_fake_cuda, attention):
    with on_fake_cuda(attention) as (training, _, steps, seen):
        training.gradients(steps[0])
        assert training.meter.sums.device == training.reference.logps.device == CUDA
        assert seen.dtypes["mm"] == {torch.bfloat16}
        assert ("_varlen_attn" in seen.dtypes) == (attention == "tree")


@pytest.mark.parametrize("attention", ["sdpa", "tree"])
def test_evaluation_stays_on_the_device(on_fake_cuda, attention):
    with on_fake_cuda(attention) as (training, data, steps, seen):
        table = np.zeros((len(data.held_out), len(dpo_train.METRICS)))

        def reduce(tensor, _):
            assert tensor.device == CUDA and tensor.shape == table.shape
            return SimpleNamespace(cpu=lambda: SimpleNamespace(numpy=lambda: table))

        training.accelerator.reduce = reduce
        reference = dpo_train.ReferenceLogps(
            data.held_out, steps.collate, training.reference.scorer.model, training.accelerator
        )
        found = dpo_train.evaluate_policy(training.scorer, reference, None, training.flags)
        assert found["metrics"]["pairs"] == len(data.held_out) and seen.dtypes["mm"] == {torch.bfloat16}


def test_a_forward_pass_keeps_what_it_keeps_on_a_cpu(on_fake_cuda):
    """Autocast's lists differ, yet as many bytes stay for the backward pass: so far, `--memory` counts a GPU's."""
    kept = []
    for device in "cpu", "cuda":
        with on_fake_cuda("tree", device) as (training, _, steps, _), Storages() as storages, as_on_a_gpu():
            batch = dpo_train.to_device(steps[0][0], training.accelerator.device)
            storages.add([*training.policy.parameters(), *batch.values()])
            before = storages.now
            with training.accelerator.autocast():
                logps = training.scorer(batch)
            kept.append(storages.now - before)
            del logps
    assert kept[0] == kept[1] > 0


@pytest.mark.parametrize("name", ["position_ids", "predictor_index", "target_ids", "response_index", "chosen_index"])
def test_what_is_left_on_the_host_is_found(on_fake_cuda, monkeypatch, name):
    to_device = dpo_train.to_device
    monkeypatch.setattr(dpo_train, "to_device", lambda batch, device: to_device(batch, device) | {name: batch[name]})
    with on_fake_cuda("sdpa") as (training, _, steps, _), pytest.raises((AssertionError, RuntimeError), match="cpu"):
        training.gradients(steps[0])


def test_a_model_of_another_dtype_is_found(on_fake_cuda):
    """The reference's layers are in bf16, and autocast is on: without it, they would meet float32."""
    with on_fake_cuda("sdpa") as (training, _, steps, _), pytest.raises((AssertionError, RuntimeError), match="dtype"):
        training.accelerator.autocast = contextlib.nullcontext
        training.gradients(steps[0])
