"""loss.py against numbers derived by hand, and against the naive way in float64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import loss
from loss import dpo_loss, response_logps


def test_dpo_loss_by_hand():
    """beta = 0.5, two pairs.

    Pair 1: log-ratios chosen -10 - (-12) = 2, rejected -20 - (-18) = -2; rewards 1 and -1; margin 2;
    loss -log sigmoid(2) = log(1 + e^-2) = 0.126928.
    Pair 2: log-ratios chosen -1 - 0 = -1, rejected -1 - (-2) = 1; rewards -0.5 and 0.5; margin -1;
    loss -log sigmoid(-1) = log(1 + e) = 1.313262.
    """
    policy_chosen, policy_rejected = torch.tensor([-10.0, -1.0]), torch.tensor([-20.0, -1.0])
    ref_chosen, ref_rejected = torch.tensor([-12.0, 0.0]), torch.tensor([-18.0, -2.0])
    losses, chosen, rejected = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.5)
    torch.testing.assert_close(losses, torch.tensor([0.126928, 1.313262]), atol=1e-6, rtol=0)
    torch.testing.assert_close(chosen, torch.tensor([1.0, -0.5]))
    torch.testing.assert_close(rejected, torch.tensor([-1.0, 0.5]))


def test_label_smoothing_by_hand():
    """Margin 2 with smoothing 0.25: 0.75 log(1 + e^-2) + 0.25 log(1 + e^2) = 0.75 * 0.126928 + 0.25 * 2.126928."""
    zero = torch.zeros(1)
    losses, _, _ = dpo_loss(zero + 2, zero - 2, zero, zero, beta=0.5, label_smoothing=0.25)
    assert losses.item() == pytest.approx(0.75 * 0.126928 + 0.25 * 2.126928, abs=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_equal_models_lose_ln_2(label_smoothing):
    chosen, rejected = torch.randn(5) * 100, torch.randn(5) * 100
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen, rejected, chosen, rejected, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(losses, torch.full((5,), math.log(2)))
    assert not chosen_rewards.any() and not rejected_rewards.any()


def test_gradient_is_the_papers():
    """Section 4: d loss / d log pi(y_w|x) = -beta sigmoid(-margin), and the opposite for y_l. Rewards carry none."""
    policy = torch.tensor([[-3.0, -4.0], [-7.0, -2.0]], requires_grad=True)
    reference = torch.tensor([[-3.5, -3.0], [-6.0, -2.5]])
    losses, chosen, rejected = dpo_loss(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], beta=0.2)
    losses.sum().backward()
    margin = 0.2 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    expected = -0.2 * torch.sigmoid(-margin)
    torch.testing.assert_close(policy.grad, torch.stack([expected, -expected], 1).detach())
    assert not chosen.requires_grad and not rejected.requires_grad


def test_far_margins_stay_finite():
    far = torch.tensor([1e4, -1e4])
    losses, _, _ = dpo_loss(far, -far, far * 0, far * 0)
    torch.testing.assert_close(losses, torch.tensor([0.0, 2000.0]))


def test_unknown_loss_type():
    with pytest.raises(ValueError, match="unknown loss_type 'hinge'; there is: sigmoid"):
        dpo_loss(*torch.zeros(4, 1), loss_type="hinge")


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
    monkeypatch.setattr(loss, "TILES", (tiles, tiles))
    inputs = example()
    torch.testing.assert_close(response_logps(*inputs), naive_response_logps(*inputs), atol=1e-10, rtol=0)


@pytest.mark.parametrize("tiles", [(2048, 8192), (5, 7)])
def test_response_logps_gradients(tiles, monkeypatch):
    monkeypatch.setattr(loss, "TILES", (tiles, tiles))
    hidden, weight, target_ids, response_index, n = example()
    upstream = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)

    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    (response_logps(*ours, target_ids, response_index, n) * upstream).sum().backward()
    plain = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    token_logps = (plain[0] @ plain[1].T).log_softmax(-1).gather(1, target_ids[:, None])[:, 0]
    (torch.zeros(n, dtype=torch.float64).index_add(0, response_index, token_logps) * upstream).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=0)
    torch.autograd.gradcheck(lambda h, w: response_logps(h, w, target_ids, response_index, n), ours)


def test_bf16_products_have_exact_sums():
    """With bf16 products the log-softmax is float32, the sums float64: off by the logits' rounding alone."""
    hidden, weight, target_ids, response_index, n = example(torch.float32, n_tokens=400)
    exact = response_logps(hidden.double(), weight.double(), target_ids, response_index, n)
    ours = response_logps(hidden, weight, target_ids, response_index, n, torch.bfloat16)
    assert ours.dtype == torch.float64
    coarse = torch.zeros(n, dtype=torch.bfloat16)
    for i, token in enumerate((hidden.bfloat16() @ weight.bfloat16().T).log_softmax(-1)):  # the mistake
        coarse[response_index[i]] += token[target_ids[i]]
    error, mistake = (ours - exact).abs().max(), (coarse.double() - exact).abs().max()
    assert error < 0.3 < 1 < mistake  # nats, over 100 tokens


class LargestTensor(TorchDispatchMode):
    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.n_elements = max(self.n_elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_the_logits_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(loss, "TILES", ((16, 32), (16, 32)))
    inputs = example(torch.float32, n_tokens=500, n_words=300)
    hidden, weight = (tensor.requires_grad_() for tensor in inputs[:2])
    with LargestTensor() as largest:
        response_logps(hidden, weight, *inputs[2:]).sum().backward()
    assert largest.n_elements == 500 * 8  # the gradient of the hidden states; the logits would be 500 * 300
