"""Drawing tokens, batched: repetition penalty, temperature, top-k, top-p, then Gumbel-max over counter-based noise.

The noise of a row depends on (seed, position, token id) alone, so neither the schedule nor the rest of the batch can change it.
Legend: N rows, V vocabulary.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.counter import gumbel_noise
from workbench.core import Sampling


def request_seed(replay_seed: int, sampling_seed: int, request_id: str) -> int:
    """A 63-bit noise key that depends on nothing but its arguments."""
    text = f"{replay_seed}:{sampling_seed}:{request_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def sample(
    logits: Tensor, params: Sequence[Sampling], *, seeds: Sequence[int], positions: Sequence[int], histories: Sequence[Sequence[int]]
) -> Tensor:
    """Token ids [N] (int64) from logits [N, V].

    `positions` are the absolute positions that the new tokens will take, `histories` the tokens so far (prompt and generated), which
    the repetition penalty (arXiv 1909.05858) acts on. Penalty, temperature, top-k and top-p apply in that order.
    """
    if all(p.is_greedy for p in params):
        return logits.argmax(-1)
    device = logits.device
    logits = _penalise(logits.float(), params, histories)
    greedy = logits.argmax(-1)
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if not drawn:
        return greedy
    rows = torch.tensor(drawn, device=device)
    temperature = torch.tensor([params[i].temperature for i in drawn], device=device, dtype=torch.float32)
    scaled = logits[rows] / temperature[:, None]
    scaled = _truncate(scaled, [params[i] for i in drawn])
    noise = gumbel_noise(
        torch.tensor([seeds[i] for i in drawn], dtype=torch.int64, device=device),
        torch.tensor([positions[i] for i in drawn], dtype=torch.int64, device=device),
        logits.shape[-1],
    )
    greedy[rows] = (scaled + noise).argmax(-1)
    return greedy


def _penalise(logits: Tensor, params: Sequence[Sampling], histories: Sequence[Sequence[int]]) -> Tensor:
    """Divide positive and multiply negative logits of tokens that have occurred by the row's repetition penalty."""
    rows = [i for i, p in enumerate(params) if p.repetition_penalty != 1]
    if not rows:
        return logits
    logits = logits.clone()
    for i in rows:
        seen = torch.tensor(sorted(set(histories[i])), dtype=torch.int64, device=logits.device)
        values = logits[i, seen]
        penalty = params[i].repetition_penalty
        logits[i, seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def _truncate(scaled: Tensor, params: Sequence[Sampling]) -> Tensor:
    """Mask all but the `top_k` largest, then all but the smallest set whose probability reaches `top_p`; the largest always stays."""
    if all(p.top_k is None and p.top_p == 1 for p in params):
        return scaled
    vocab = scaled.shape[-1]
    top_k = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=scaled.device)
    top_p = torch.tensor([p.top_p for p in params], device=scaled.device, dtype=torch.float32)
    ordered, order = scaled.sort(dim=-1, descending=True)
    rank = torch.arange(vocab, device=scaled.device)
    ordered = ordered.masked_fill(rank[None, :] >= top_k[:, None], float("-inf"))
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    keep = (before < top_p[:, None]) | (rank == 0)
    ordered = ordered.masked_fill(~keep, float("-inf"))
    return torch.empty_like(scaled).scatter_(-1, order, ordered)
