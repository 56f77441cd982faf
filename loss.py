"""The two formulas of a DPO run, as pure functions of tensors.

`response_logps`: log pi(y|x) of whole responses, from hidden states and the LM head, without the [tokens, vocabulary]
logits ever existing at once. `dpo_loss`: equation 7 of the DPO paper (Rafailov et al., 2023, arXiv 2305.18290).
"""

import torch
import torch.nn.functional as F

TILE_TOKENS, TILE_VOCABULARY = 2048, 8192  # one tile of logits: 64 MB in float32


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
) -> torch.Tensor:
    """Summed log-probabilities of responses: log pi(y|x) = sum over t of log softmax(W h_t)[y_t].

    Args:
        hidden: [N, H] the hidden states that predict the N response tokens.
        weight: [V, H] the LM head.
        target_ids: [N] the response tokens.
        response_index: [N] which of the M responses each token belongs to.
        n_responses: M.
        compute_dtype: of the matrix products (None: hidden's). Sums and log-softmax are float32, or hidden's if wider.

    Returns:
        [M] in nats, float32 (float64 for float64 input).
    """
    token_logps = _TokenLogps.apply(hidden, weight, target_ids, compute_dtype or hidden.dtype)  # [N]
    return token_logps.new_zeros(n_responses).index_add(0, response_index, token_logps)


class _TokenLogps(torch.autograd.Function):
    """[N] log-probabilities of the target tokens, in tiles of tokens by vocabulary.

    The forward pass keeps the logsumexp of each token, the backward pass computes the logits of each tile once more:
    d logp / d logit_v = [v is the target] - softmax_v. The largest thing that ever exists is the weight's gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target_ids, compute_dtype):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        hidden_cast, weight_cast = hidden.to(compute_dtype), weight.to(compute_dtype)
        logsumexp = torch.full(target_ids.shape, -torch.inf, dtype=exact, device=hidden.device)
        target_logit = torch.zeros_like(logsumexp)
        for tokens, words, logits in _tiles(hidden_cast, weight_cast, exact):
            _add_at_targets(target_logit[tokens], target_ids[tokens], words, logits)
            top = logits.amax(1)
            tile_logsumexp = logits.sub_(top[:, None]).exp_().sum(1).log_().add_(top)
            logsumexp[tokens] = torch.logaddexp(logsumexp[tokens], tile_logsumexp)
        ctx.save_for_backward(hidden, weight, target_ids, logsumexp)
        ctx.compute_dtype, ctx.exact = compute_dtype, exact
        return target_logit - logsumexp

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target_ids, logsumexp = ctx.saved_tensors
        hidden_cast, weight_cast = hidden.to(ctx.compute_dtype), weight.to(ctx.compute_dtype)
        grad_hidden, grad_weight = (
            torch.zeros_like(tensor, dtype=ctx.exact) if needed else None
            for tensor, needed in zip((hidden, weight), ctx.needs_input_grad, strict=False)
        )
        for tokens, words, logits in _tiles(hidden_cast, weight_cast, ctx.exact):
            scale = grad[tokens].to(ctx.exact)
            grad_logits = logits.sub_(logsumexp[tokens, None]).exp_().mul_(-scale[:, None])
            rows, columns = _targets_in(target_ids[tokens], words)
            grad_logits[rows, columns] += scale[rows]
            grad_logits = grad_logits.to(ctx.compute_dtype)
            if grad_hidden is not None:
                grad_hidden[tokens] += grad_logits @ weight_cast[words]
            if grad_weight is not None:
                grad_weight[words] += grad_logits.T @ hidden_cast[tokens]
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
        )


def _tiles(hidden: torch.Tensor, weight: torch.Tensor, exact: torch.dtype):
    """Slices of tokens and of vocabulary with their logits, all tiles in one buffer: done with before the next one."""
    n_tokens, n_words = len(hidden), len(weight)
    buffer = hidden.new_empty(min(n_tokens, TILE_TOKENS), min(n_words, TILE_VOCABULARY))
    for word in range(0, n_words, TILE_VOCABULARY):
        words = slice(word, min(word + TILE_VOCABULARY, n_words))
        for token in range(0, n_tokens, TILE_TOKENS):
            tokens = slice(token, min(token + TILE_TOKENS, n_tokens))
            shape = tokens.stop - tokens.start, words.stop - words.start
            logits = buffer.view(-1)[: shape[0] * shape[1]].view(shape)
            torch.mm(hidden[tokens], weight[words].T, out=logits)
            yield tokens, words, logits.to(exact)


def _targets_in(target_ids: torch.Tensor, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
    rows = ((target_ids >= words.start) & (target_ids < words.stop)).nonzero()[:, 0]
    return rows, target_ids[rows] - words.start


def _add_at_targets(target_logit: torch.Tensor, target_ids: torch.Tensor, words: slice, logits: torch.Tensor) -> None:
    rows, columns = _targets_in(target_ids, words)
    target_logit[rows] = logits[rows, columns]
