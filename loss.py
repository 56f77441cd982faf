"""The two formulas of a DPO run, as pure functions of tensors.

`response_logps`: log pi(y|x) of whole responses, from hidden states and the LM head, without the [tokens, vocabulary]
logits ever existing at once. `dpo_loss`: equation 7 of the DPO paper (Rafailov et al., 2023, arXiv 2305.18290).
"""

import torch
import torch.nn.functional as F

# Tokens and words of one tile of logits, on a CPU (docs/performance.md has what was tried) and on a GPU.
TILES = (1024, 4096), (2048, 8192)


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The DPO loss of each pair, and the implicit rewards of its two responses.

    Args:
        policy_chosen_logps: [P] log pi_theta(y_w|x), summed over the response's tokens, in nats.
        policy_rejected_logps: [P] log pi_theta(y_l|x).
        ref_chosen_logps: [P] log pi_ref(y_w|x).
        ref_rejected_logps: [P] log pi_ref(y_l|x).
        beta: how strongly the policy is held to the reference: a higher beta means less deviation from it.
        label_smoothing: the assumed share of pairs whose labels are swapped, in [0, 0.5) (conservative DPO).
        loss_type: "sigmoid", the paper's loss.

    Returns:
        losses, chosen_rewards, rejected_rewards: [P] each, in nats; only the losses carry a gradient. No mean is taken.

    Raises:
        ValueError: for an unknown loss_type.
    """
    if loss_type != "sigmoid":
        raise ValueError(f"unknown loss_type {loss_type!r}; there is: sigmoid")
    chosen_logratios = policy_chosen_logps - ref_chosen_logps  # log pi_theta(y_w|x) / pi_ref(y_w|x)
    rejected_logratios = policy_rejected_logps - ref_rejected_logps  # log pi_theta(y_l|x) / pi_ref(y_l|x)
    margins = beta * (chosen_logratios - rejected_logratios)
    # Eq. 7, -log sigmoid(margin); with smoothing, labels are taken to be swapped with that probability.
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def response_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    response_index: torch.Tensor,
    n_responses: int,
    compute_dtype: torch.dtype | None = None,
    weight_grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """Summed log-probabilities of responses: log pi(y|x) = sum over t of log softmax(W h_t)[y_t].

    Args:
        hidden: [N, H] the hidden states that predict the N response tokens.
        weight: [V, H] the LM head.
        target_ids: [N] the response tokens.
        response_index: [N] which of the M responses each token belongs to.
        n_responses: M.
        compute_dtype: of the matrix products (None: hidden's). The log-softmax is float32, or hidden's if wider.
        weight_grad: [V, H] float32. If given, the backward pass adds the weight's gradient to it, and autograd gets
            none: in place, it costs no second tensor of that size. For one process only, since DDP looks at autograd's.

    Returns:
        [M] in nats, float64: in float32, sums around -1,000 are 1e-4 apart, which shows in the loss's fifth digit.
    """
    token_logps = _TokenLogps.apply(hidden, weight, target_ids, compute_dtype or hidden.dtype, weight_grad)  # [N]
    zeros = token_logps.new_zeros(n_responses, dtype=torch.float64)
    return zeros.index_add(0, response_index, token_logps.double())


class _TokenLogps(torch.autograd.Function):
    """[N] log-probabilities of the target tokens, in tiles of tokens by vocabulary.

    The forward pass keeps the logsumexp of each token, the backward pass computes the logits of each tile once more:
    d logp / d logit_v = [v is the target] - softmax_v. The largest thing that ever exists is the weight's gradient.
    Nothing in here asks the GPU for a value.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target_ids, compute_dtype, weight_grad):
        ctx.weight_grad = weight_grad
        ctx.dtypes = hidden.dtype, weight.dtype
        exact = torch.promote_types(hidden.dtype, torch.float32)
        hidden, weight = hidden.to(compute_dtype), weight.to(compute_dtype)
        logsumexp = torch.full(target_ids.shape, -torch.inf, dtype=exact, device=hidden.device)
        target_logit = torch.zeros_like(logsumexp)
        for tokens, words, logits, _ in _tiles(hidden, weight, exact):
            column, inside = _column_of_target(target_ids[tokens], words)
            target_logit[tokens] += logits.gather(1, column).squeeze(1) * inside
            top = logits.amax(1)
            tile_logsumexp = logits.sub_(top[:, None]).exp_().sum(1).log_().add_(top)
            logsumexp[tokens] = torch.logaddexp(logsumexp[tokens], tile_logsumexp)
        ctx.save_for_backward(hidden, weight, target_ids, logsumexp)
        return target_logit - logsumexp

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target_ids, logsumexp = ctx.saved_tensors
        exact = logsumexp.dtype
        grad = grad.to(exact)
        grad_hidden = torch.zeros_like(hidden, dtype=exact) if ctx.needs_input_grad[0] else None
        grad_weight = ctx.weight_grad
        if grad_weight is None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=exact)
        for tokens, words, logits, low in _tiles(hidden, weight, exact):
            scale = grad[tokens, None]
            column, inside = _column_of_target(target_ids[tokens], words)
            grad_logits = logits.sub_(logsumexp[tokens, None]).exp_().mul_(-scale)
            grad_logits.scatter_add_(1, column, scale * inside[:, None])
            low.copy_(grad_logits)  # the products below are in compute_dtype, their sums over tiles are exact
            if grad_hidden is not None:
                grad_hidden[tokens] += low @ weight[words]
            if grad_weight is not None:
                grad_weight[words] += low.T @ hidden[tokens]
        grads = zip((grad_hidden, grad_weight if ctx.weight_grad is None else None), ctx.dtypes, strict=True)
        return *(None if tensor is None else tensor.to(dtype) for tensor, dtype in grads), None, None, None


def _tiles(hidden: torch.Tensor, weight: torch.Tensor, exact: torch.dtype):
    """Slices of tokens and of vocabulary; their logits in `exact`, and a buffer of that shape in hidden's dtype.

    All tiles live in the same two buffers (one, where the dtypes agree): done with before the next one.
    """
    n_tokens, n_words = len(hidden), len(weight)
    tile_tokens, tile_words = TILES[hidden.device.type == "cuda"]
    size = min(n_tokens, tile_tokens) * min(n_words, tile_words)
    low_buffer = hidden.new_empty(size)
    exact_buffer = low_buffer if hidden.dtype == exact else low_buffer.to(exact)
    for word in range(0, n_words, tile_words):
        words = slice(word, min(word + tile_words, n_words))
        for token in range(0, n_tokens, tile_tokens):
            tokens = slice(token, min(token + tile_tokens, n_tokens))
            shape = tokens.stop - tokens.start, words.stop - words.start
            low, logits = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (low_buffer, exact_buffer))
            torch.mm(hidden[tokens], weight[words].T, out=low)
            yield tokens, words, logits.copy_(low), low


def _column_of_target(target_ids: torch.Tensor, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's target in this tile, [n, 1], and whether it is there at all, [n]; if not, column 0 stands in."""
    inside = (target_ids >= words.start) & (target_ids < words.stop)
    return torch.where(inside, target_ids - words.start, 0)[:, None], inside
