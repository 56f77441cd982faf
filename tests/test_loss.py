"""loss.py against numbers derived by hand, against the naive way in float64, and against TRL over eight steps."""

import itertools
import json
import math
from importlib.util import find_spec

import make_trl_fixture as trl_fixture
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_train
import loss
from loss import LOSSES, dpo_loss, response_logps

# Three pairs: log-probabilities of policy and reference, chosen and rejected, and the responses' tokens. Their
# log-ratios are c = -10 + 12 = 2, r = -20 + 18 = -2;  c = -3, r = -1;  c = r = 0, as at the start of a run.
POLICY = torch.tensor([[-10.0, -20.0], [-3.0, -3.0], [-7.0, -9.0]])
REFERENCE = torch.tensor([[-12.0, -18.0], [0.0, -2.0], [-7.0, -9.0]])
LENGTHS = torch.tensor([[4, 2], [2, 1], [5, 3]])


def losses_of(policy=POLICY, **settings):
    return dpo_loss(*policy.unbind(1), *REFERENCE.unbind(1), *LENGTHS.unbind(1), **settings)


BY_HAND = {
    ("sigmoid", 0.0): [0.126928, 1.313262, 0.693147],
    ("sigmoid", 0.25): [0.626928, 1.063262, 0.693147],
    ("sigmoid_norm", 0.0): [0.386871, 0.825939, 0.693147],
    ("hinge", 0.0): [0.0, 2.0, 1.0],
    ("ipo", 0.0): [0.25, 2.25, 1.0],
    ("robust", 0.0): [0.126928, 1.313262, 0.693147],
    ("robust", 0.25): [-0.873072, 1.813262, 0.693147],
    ("apo_zero", 0.0): [0.537883, 1.195115, 1.0],
    ("apo_down", 0.0): [0.850262, 0.913485, 1.0],
}


@pytest.mark.parametrize("loss_type, label_smoothing", BY_HAND)
def test_losses_by_hand(loss_type, label_smoothing):
    """beta = 0.5, so that beta (c - r), the margin, is 2, -1, 0. Of the three pairs, s being the logistic function:

    sigmoid       -log s(2) = log(1 + e^-2) = 0.126928;  log(1 + e) = 1.313262;  log 2 = 0.693147
      eps = 0.25  0.75 x 0.126928 + 0.25 x (0.126928 + 2) = 0.626928, since -log s(-z) = -log s(z) + z;
                  0.75 x 1.313262 + 0.25 x (1.313262 - 1) = 1.063262;  log 2
    sigmoid_norm  c / n_c - r / n_r = 2/4 + 2/2 = 1.5;  -3/2 + 1/1 = -0.5;  0.  Times beta 0.75, -0.25, 0:
                  log(1 + e^-0.75) = 0.386871;  log(1 + e^0.25) = 0.825939;  log 2
    hinge         max(0, 1 - 2) = 0;  1 + 1 = 2;  1
    ipo           1 / (2 beta) = 1:  (1.5 - 1)^2 = 0.25;  (-0.5 - 1)^2 = 2.25;  1
    robust        eps = 0: sigmoid.  eps = 0.25: (0.75 x 0.126928 - 0.25 x 2.126928) / 0.5 = -0.873072;
                  (0.75 x 1.313262 - 0.25 x 0.313262) / 0.5 = 1.813262;  (0.75 - 0.25) log 2 / 0.5 = log 2
    apo_zero      1 - s(1) + s(-1) = 1 - 0.731059 + 0.268941 = 0.537883;
                  1 - s(-1.5) + s(-0.5) = 1 - 0.182426 + 0.377541 = 1.195115;  1 - 0.5 + 0.5 = 1
    apo_down      s(1) + 1 - s(2) = 0.731059 + 1 - 0.880797 = 0.850262;
                  s(-1.5) + 1 - s(-1) = 0.182426 + 1 - 0.268941 = 0.913485;  0.5 + 1 - 0.5 = 1

    The rewards are beta c and beta r, whatever the loss.
    """
    losses, chosen, rejected = losses_of(beta=0.5, label_smoothing=label_smoothing, loss_type=loss_type)
    expected = torch.tensor(BY_HAND[loss_type, label_smoothing])
    torch.testing.assert_close(losses, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(chosen, torch.tensor([1.0, -1.5, 0.0]))
    torch.testing.assert_close(rejected, torch.tensor([-1.0, -0.5, 0.0]))


def test_each_loss_is_tested():
    assert {loss_type for loss_type, _ in BY_HAND} == set(LOSSES)
    assert {flags["loss_type"] for flags in trl_fixture.CASES.values()} == set(LOSSES)


def test_gradient_is_the_papers():
    """Section 4: d loss / d log pi(y_w|x) = -beta s(-margin), and the opposite for y_l. Rewards carry none."""
    policy = POLICY.clone().requires_grad_()
    losses, chosen, rejected = dpo_loss(*policy.unbind(1), *REFERENCE.unbind(1), beta=0.5)  # needs no lengths
    losses.sum().backward()
    expected = -0.5 * torch.sigmoid(-torch.tensor([2.0, -1.0, 0.0]))
    torch.testing.assert_close(policy.grad, torch.stack([expected, -expected], 1))
    assert not chosen.requires_grad and not rejected.requires_grad


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_sft_term_by_hand(loss_type):
    """Negative log-likelihoods of the chosen responses a token: 10/4 = 2.5, 3/2 = 1.5, 7/5 = 1.4; times 0.1 they are
    what is added, and d / d log pi(y_w|x) is -0.1 / 4, -0.1 / 2, -0.1 / 5. The rejected ones take no part."""
    settings, gradients = {"beta": 0.5, "loss_type": loss_type}, []
    for sft_weight in (0.0, 0.1):
        policy = POLICY.clone().requires_grad_()
        losses, chosen, _ = losses_of(policy, **settings, sft_weight=sft_weight)
        losses.sum().backward()
        gradients.append(policy.grad)
    torch.testing.assert_close(losses, losses_of(**settings)[0] + torch.tensor([0.25, 0.15, 0.14]))
    torch.testing.assert_close(chosen, torch.tensor([1.0, -1.5, 0.0]))
    more = torch.tensor([[-0.025, 0.0], [-0.05, 0.0], [-0.02, 0.0]])
    torch.testing.assert_close(gradients[1] - gradients[0], more, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_far_margins_stay_finite(loss_type, label_smoothing):
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    zero, one = torch.zeros(2), torch.ones(2)
    losses, _, _ = dpo_loss(far, -far, zero, zero, one, one, label_smoothing=label_smoothing, loss_type=loss_type)
    losses.sum().backward()
    assert losses.isfinite().all() and far.grad.isfinite().all()
    if (loss_type, label_smoothing) == ("sigmoid", 0.0):
        torch.testing.assert_close(losses, torch.tensor([0.0, 2000.0]))


def test_unknown_loss_type():
    with pytest.raises(KeyError, match="simpo"):
        dpo_loss(*torch.zeros(4, 1), loss_type="simpo")


# --- log-probabilities of responses


def naive_response_logps(hidden, weight, target_ids, response_index, n_responses):
    """One token and one word at a time, in Python's floats."""
    totals = [0.0] * n_responses
    for h, target, response in zip(hidden.tolist(), target_ids.tolist(), response_index.tolist(), strict=True):
        logits = [sum(a * b for a, b in zip(h, w, strict=True)) for w in weight.tolist()]
        totals[response] += logits[target] - math.log(sum(math.exp(logit) for logit in logits))
    return torch.tensor(totals, dtype=torch.float64)


def example(dtype=torch.float64, n_tokens=23, n_words=37, width=8):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n_tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(n_words, width, generator=generator, dtype=torch.float64).to(dtype)
    target_ids = torch.randint(n_words, (n_tokens,), generator=generator)
    target_ids[:3] = torch.tensor([0, n_words - 1, 0])  # the first and the last word of the vocabulary count
    response_index = torch.arange(n_tokens) * 4 // n_tokens
    return hidden, weight, target_ids, response_index, 4


@pytest.mark.parametrize("tiles", [(2048, 8192), (5, 7), (1, 1)])
def test_response_logps_against_the_naive_loop(tiles, monkeypatch):
    monkeypatch.setitem(loss.TILES, "cpu", tiles)
    inputs = example()
    torch.testing.assert_close(response_logps(*inputs), naive_response_logps(*inputs), atol=1e-10, rtol=0)


@pytest.mark.parametrize("tiles", [(2048, 8192), (5, 7)])
def test_response_logps_gradients(tiles, monkeypatch):
    monkeypatch.setitem(loss.TILES, "cpu", tiles)
    hidden, weight, target_ids, response_index, n = example()
    upstream = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)

    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    (response_logps(*ours, target_ids, response_index, n) * upstream).sum().backward()
    plain = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    token_logps = (plain[0] @ plain[1].T).log_softmax(-1).gather(1, target_ids[:, None])[:, 0]
    (torch.zeros(n, dtype=torch.float64).index_add(0, response_index, token_logps) * upstream).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=0)


def test_only_the_products_are_bf16():
    """Log-softmax and sums over the rounded logits are float32 and float64. In bf16 they would be off by whole nats."""
    hidden, weight, target_ids, response_index, n = example(torch.float32, n_tokens=400)
    logits = hidden.bfloat16() @ weight.bfloat16().T
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        token_logps = logits.to(dtype).log_softmax(-1).gather(1, target_ids[:, None])[:, 0]
        found.append(torch.zeros(n, dtype=dtype).index_add(0, response_index, token_logps))
    ours = response_logps(hidden, weight, target_ids, response_index, n, torch.bfloat16)
    torch.testing.assert_close(ours, found[0], atol=1e-4, rtol=0)
    assert ours.dtype == torch.float64 and (found[1].double() - found[0]).abs().max() > 1


class LargestTensor(TorchDispatchMode):
    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.n_elements = max(self.n_elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_the_logits_never_exist_at_once(monkeypatch):
    monkeypatch.setitem(loss.TILES, "cpu", (16, 32))
    inputs = example(torch.float32, n_tokens=500, n_words=300)
    hidden, weight = (tensor.requires_grad_() for tensor in inputs[:2])
    with LargestTensor() as largest:
        response_logps(hidden, weight, *inputs[2:]).sum().backward()
    assert largest.n_elements == 500 * 8  # the gradient of the hidden states; the logits would be 500 * 300


# --- eight steps, as TRL takes them


def train_ours(case, model_dir, data_file, folder):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    flags = {"model_name_or_path": model_dir, "dataset_name": data_file, "output_dir": folder}
    flags |= trl_fixture.FLAGS | trl_fixture.CASES[case]
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    dpo_train.train(dpo_train.parse_flags(words))
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in trl_fixture.COMPARED} for line in lines if "grad_norm" in line]


def largest_difference(ours, theirs):
    assert len(ours) == len(theirs) == trl_fixture.STEPS
    return max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True) for name in trl_fixture.COMPARED)


def read_trl_fixture():
    return json.loads(trl_fixture.FIXTURE.read_text())


@pytest.mark.parametrize("case", trl_fixture.CASES)
def test_eight_steps_are_those_of_trl(case, model_dir, data_file, tmp_path):
    """Loss, gradient norm before clipping, log-probabilities and rewards: make_trl_fixture.py wrote TRL's."""
    assert largest_difference(train_ours(case, model_dir, data_file, tmp_path / "run"), read_trl_fixture()[case]) < 1e-3


@pytest.mark.parametrize("case", trl_fixture.CASES)
@pytest.mark.skipif(not find_spec("trl"), reason="uv run --with trl==1.16.0 python -m pytest tests/test_loss.py")
def test_eight_steps_are_those_of_trl_here_and_now(case, model_dir, data_file, tmp_path):
    theirs = trl_fixture.train_trl(case, model_dir, data_file)
    assert largest_difference(theirs, read_trl_fixture()[case]) < 1e-3
    assert largest_difference(train_ours(case, model_dir, data_file, tmp_path / "run"), theirs) < 1e-3


def test_the_comparison_with_trl_can_fail():
    """In eight steps, any two of the losses lead to clearly other log-probabilities."""
    found = read_trl_fixture()
    for one, other in itertools.combinations(trl_fixture.CASES, 2):
        chosen = [[line["logps/chosen"] for line in found[case]] for case in (one, other)]
        differences = [abs(a - b) for a, b in zip(*chosen, strict=True)]
        assert differences[0] < 1e-4 and max(differences) > 0.05, (one, other)
