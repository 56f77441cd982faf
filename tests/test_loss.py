"""loss.py against numbers derived by hand, against plain float64, and against TRL over eight steps."""

import itertools
import json
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


def test_each_loss_is_compared():
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


# --- log-probabilities of responses


def example(dtype=torch.float64, n_tokens=23, n_words=37, width=8):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator).bfloat16().to(dtype) for n in (n_tokens, n_words))
    target_ids = torch.randint(n_words, (n_tokens,), generator=generator)
    target_ids[:6] = torch.tensor([0, n_words - 1, 6, 7, 8, 0])  # both ends of the vocabulary and of tiles count
    return hidden.requires_grad_(), weight.requires_grad_(), target_ids, torch.arange(n_tokens) * 4 // n_tokens, 4


def plain_response_logps(hidden, weight, target_ids, response_index, n_responses, dtype=torch.float64):
    """With all logits at once, a log-softmax in `dtype`, and PyTorch's own backward pass."""
    token_logps = (hidden @ weight.T).to(dtype).log_softmax(-1).gather(1, target_ids[:, None])[:, 0]
    return hidden.new_zeros(n_responses, dtype=dtype).index_add(0, response_index, token_logps)


def with_gradients(response_logps, inputs, *dtype):
    logps = response_logps(*inputs, *dtype)
    upstream = torch.tensor([1.0, -2.0, 0.5, 0.0]).to(logps.dtype)
    return [logps, *(grad.double() for grad in torch.autograd.grad((logps * upstream).sum(), inputs[:2]))]


@pytest.mark.parametrize("n_words", [1, 5, 7, 36, 37, 4096])
def test_log_probabilities_and_gradients_for_any_tiles(n_words, monkeypatch):
    monkeypatch.setattr(loss, "TILE_WORDS", n_words)
    ours = with_gradients(response_logps, example(), torch.float64)
    for a, b in zip(ours, with_gradients(plain_response_logps, example()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_only_the_products_are_bf16(monkeypatch):
    """Log-softmax and sums are float32 and float64; in bf16 they would be off by whole nats. Gradients are off by
    roundings that cancel, not by a factor."""
    monkeypatch.setattr(loss, "TILE_WORDS", 100)
    inputs = example(torch.float32, n_tokens=400, n_words=500, width=16)
    exact = [x.detach().double().requires_grad_() for x in inputs[:2]]
    _, *gradients = with_gradients(plain_response_logps, (*exact, *inputs[2:]))
    rounded = [x.bfloat16() for x in inputs[:2]]
    ours, *our_gradients = with_gradients(response_logps, inputs, torch.bfloat16)
    of_rounded = plain_response_logps(*rounded, *inputs[2:])
    torch.testing.assert_close(ours, of_rounded, atol=1e-3, rtol=0)
    in_bf16 = plain_response_logps(*rounded, *inputs[2:], torch.bfloat16)
    assert ours.dtype == torch.float64 and (in_bf16.double() - of_rounded).abs().max() > 1
    for a, b in zip(our_gradients, gradients, strict=True):
        assert (a - b).norm() < 1e-2 * b.norm() and ((a - b) * b).sum().abs() < 1e-3 * (b * b).sum()


@pytest.mark.parametrize("n_tokens, n_words, hidden_size", [(128, 8192, 256), (256, 151_936, 896)])
def test_gradients_of_the_head_in_bf16_have_no_bias(n_tokens, n_words, hidden_size, request, monkeypatch):
    """Against float32, by the number of tiles. Signed: how much too long the gradient is along itself, and the mean of
    the errors in units of the mean magnitude; relative: the norm of the error. The larger one is Qwen2.5-0.5B's."""
    if n_words > 10_000:
        request.getfixturevalue("slow")
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(n_tokens, hidden_size, generator=random)
    weight = 0.02 * torch.randn(n_words, hidden_size, generator=random)
    targets = torch.randint(n_words, (n_tokens,), generator=random)
    response = torch.arange(n_tokens) // (n_tokens // 8)
    signs = torch.tensor([0.0625, -0.0625]).repeat(4)  # chosen up, rejected down; by what bf16 holds exactly

    def gradients(dtype, n_tiles) -> list[torch.Tensor]:
        monkeypatch.setattr(loss, "TILE_WORDS", n_words // n_tiles + 1)
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        (response_logps(*leaves, targets, response, 8, dtype) * signs).sum().backward()
        return [leaf.grad.double() for leaf in leaves]

    exact = gradients(torch.float32, 1)
    for n_tiles in (1, 19, 149):
        for name, right, rough in zip(("hidden", "weight"), exact, gradients(torch.bfloat16, n_tiles), strict=True):
            error = rough - right
            along, mean = (error * right).sum() / right.pow(2).sum(), error.mean() / right.abs().mean()
            relative = error.norm() / right.norm()
            print(f"{n_tiles} tiles, gradient of {name}: signed {along:.1e}, mean {mean:.1e}, relative {relative:.1e}")
            assert abs(along) < 3e-4 and abs(mean) < 3e-4 and relative < 5e-3


class LargestTensor(TorchDispatchMode):
    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.n_elements = max(self.n_elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_the_logits_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(loss, "TILE_WORDS", 8)
    with LargestTensor() as largest:
        with_gradients(response_logps, example(torch.float32, n_tokens=500, n_words=300), torch.float32)
    assert largest.n_elements == 500 * 8  # of a tile, as of the hidden states; all logits would be 500 * 300


# --- eight steps, as TRL takes them


def train_ours(case, model_dir, small_data_file, folder):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    flags = {"model_name_or_path": model_dir, "dataset_name": small_data_file, "output_dir": folder}
    flags |= trl_fixture.FLAGS | trl_fixture.CASES[case]
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    dpo_train.train(dpo_train.parse_flags(words))
    start, *lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return start["loss_at_start"], [line for line in lines if "grad_norm" in line]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) == trl_fixture.STEPS
    for a, b in zip(ours, theirs, strict=True):
        assert {name: a[name] for name in trl_fixture.COMPARED} == pytest.approx(b, abs=1e-3)


@pytest.mark.parametrize("case", trl_fixture.CASES)
def test_eight_steps_are_those_of_trl(case, model_dir, small_data_file, tmp_path):
    """Loss, gradient norm before clipping, log-probabilities and rewards: make_trl_fixture.py wrote TRL's. They are
    computed anew by uv run --with trl==1.16.0 python -m pytest tests/test_loss.py"""
    theirs = json.loads(trl_fixture.FIXTURE.read_text())[case]
    loss_at_start, ours = train_ours(case, model_dir, small_data_file, tmp_path / "run")
    assert_equal(ours, theirs)
    sft_term = trl_fixture.CASES[case].get("sft_weight", 0) * ours[0]["nll_loss"]
    assert ours[0]["loss"] == pytest.approx(loss_at_start + sft_term, rel=1e-5)  # as the picture's dashed line says
    if find_spec("trl"):
        assert_equal(trl_fixture.train_trl(case, model_dir, small_data_file), theirs)


def test_the_comparison_with_trl_can_fail():
    """In eight steps, any two of the losses lead to clearly other log-probabilities."""
    found = json.loads(trl_fixture.FIXTURE.read_text())
    for one, other in itertools.combinations(trl_fixture.CASES, 2):
        chosen = [[line["logps/chosen"] for line in found[case]] for case in (one, other)]
        differences = [abs(a - b) for a, b in zip(*chosen, strict=True)]
        assert differences[0] < 1e-4 and max(differences) > 0.05, (one, other)
