"""A step on a GPU without a GPU: tensors that have shapes, dtypes and devices, and no values.

What they can't show: speed, memory, and what kernels compute. Backward passes run on `meta` only: without a driver,
autograd knows no CUDA.
"""

import contextlib
import math
from functools import partial

import pytest
import torch
from test_tree import compute_as
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer

import loss
from dataset import StepBatches, TreeCollator, load_rows, prepare
from dpo_train import Compute, Flags, forward_backward, freeze, load_model, reference_from_model, reference_from_table
from loss import ResponseScorer, attend_at_once, attend_by_segment

CUDA = torch.device("cuda", 0)
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.torch_attn._varlen_attn}


class OneDevice(TorchDispatchMode):
    """Fails where an operator other than a copy meets tensors of two devices, numbers apart, or products of two dtypes.

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
            dtypes = {tensor.dtype for tensor in inputs if tensor.is_floating_point()}
            assert len(dtypes) == 1, f"{function} of dtypes {dtypes}"
            self.dtypes.setdefault(function.overloadpacket.__name__, set()).update(dtypes)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def autocast_without_a_driver(device, dtype):
    """`torch.autocast("cuda")` switches itself off where there is no driver, and knows no `meta`."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    torch.set_autocast_enabled(kind, dtype != torch.float32)
    torch.set_autocast_dtype(kind, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(kind, before[0])
        torch.set_autocast_dtype(kind, before[1])


@pytest.fixture
def parts(model_dir, small_data_file, monkeypatch):
    """A policy and its reference, without values, and the steps, on the host."""
    monkeypatch.setattr(loss, "autocast", autocast_without_a_driver)
    monkeypatch.setattr(torch._C, "_get_cudnn_sdp_enabled", lambda: False)  # to choose a kernel would ask the driver
    data = prepare(load_rows(str(small_data_file)), AutoTokenizer.from_pretrained(model_dir), 128, None, 8).train
    models = (load_model(str(model_dir), Flags()).to("meta") for _ in range(2))
    return *models, StepBatches(data, TreeCollator(160), 4, 42)


def no_backward(total):
    assert total.device.type == "cuda" and total.dtype == torch.float64 and total.requires_grad


def step(policy, reference, steps, compute, with_table=False):
    """As in `train`, from the pairs to the update."""
    with unset_fake_temporarily():
        freeze(reference, compute.dtype)
    for model in (policy, reference):
        model.to_empty(device=compute.device).tie_weights()
    reference = partial(reference_from_model, ResponseScorer(reference, compute.dtype))
    if with_table:
        table = torch.zeros(len(steps.pairs), 2, dtype=torch.float64, device=compute.device)
        reference = partial(reference_from_table, table)
    optimizer = torch.optim.AdamW(policy.parameters(), fused=compute.device.type == "cuda")
    batches = [compute.to_device(batch) for batch in steps[0]]
    scorer = ResponseScorer(policy.train(), compute.dtype)
    sums = forward_backward(batches, 4, scorer, reference, compute, Flags())
    if compute.device.type == "cuda":
        for weight in policy.parameters():
            weight.grad = torch.zeros_like(weight)
    torch.nn.utils.clip_grad_norm_(policy.parameters(), math.inf)
    optimizer.step()
    assert len(batches) > 1 and sums.device == compute.device
    assert all(weight.grad.device == compute.device for weight in policy.parameters())


@pytest.mark.parametrize("dtype, attend, with_table", [
    (torch.bfloat16, attend_at_once, False), (torch.bfloat16, attend_at_once, True),
    (torch.bfloat16, attend_by_segment, False), (torch.float32, attend_by_segment, False),
])  # fmt: skip
def test_a_step_stays_on_the_gpu_and_computes_in_its_precision(parts, monkeypatch, dtype, attend, with_table):
    monkeypatch.setattr(torch.Tensor, "backward", no_backward)
    with FakeTensorMode(allow_non_fake_inputs=True), OneDevice() as seen:
        step(*parts, compute_as(attend, dtype, CUDA), with_table)
    assert seen.dtypes["mm"] == {dtype} and ("_varlen_attn" in seen.dtypes) == (attend is attend_at_once)


@pytest.mark.parametrize("attend", [attend_at_once, attend_by_segment])
def test_a_backward_pass_stays_on_its_device(parts, attend):
    """On `meta`, whose tensors no operator mixes with those of the host."""
    with OneDevice():
        step(*parts, compute_as(attend, torch.float32, torch.device("meta")))


@pytest.mark.parametrize("name", ["position_ids", "predictor_index", "target_ids", "response_index", "chosen_index"])
def test_what_is_left_on_the_host_is_found(parts, monkeypatch, name):
    load = Compute.to_device

    def forget(compute, batch):
        tensors, plan = load(compute, batch)
        return tensors | {name: batch.tensors[name]}, plan

    monkeypatch.setattr(Compute, "to_device", forget)
    monkeypatch.setattr(torch.Tensor, "backward", no_backward)
    found = pytest.raises((AssertionError, RuntimeError), match="cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), OneDevice(), found:
        step(*parts, compute_as(attend_at_once, torch.bfloat16, CUDA))
