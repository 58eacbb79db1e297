"""Sampling: what the field's options mean, and noise that no schedule can change."""

import pytest
import torch

from workbench.core import Sampling
from workbench.runtime.sampling import request_seed, sample

VOCAB = 50


def draw(logits, params, *, seeds=None, positions=None, histories=None):
    n = logits.shape[0]
    return sample(logits, params, seeds=seeds or list(range(n)), positions=positions or [7] * n, histories=histories or [[]] * n)


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def test_temperature_zero_is_argmax():
    logits = logits_of(5)
    assert torch.equal(draw(logits, [Sampling()] * 5), logits.argmax(-1))


def test_a_rows_token_depends_on_its_own_seed_and_position_alone():
    logits, params = logits_of(6), [Sampling(temperature=0.9, top_p=0.8)] * 6
    together = draw(logits, params, seeds=[1, 2, 3, 4, 5, 6], positions=[10, 11, 12, 13, 14, 15])
    for i in range(6):
        alone = draw(logits[i : i + 1], params[:1], seeds=[i + 1], positions=[10 + i])
        assert int(alone) == int(together[i])
    mixed = draw(logits, [Sampling(), *params[1:]], seeds=[1, 2, 3, 4, 5, 6], positions=[10, 11, 12, 13, 14, 15])
    assert torch.equal(mixed[1:], together[1:]) and int(mixed[0]) == int(logits[0].argmax())


def test_frequencies_follow_the_softmax_at_the_temperature():
    logits, n, temperature = logits_of(1), 20_000, 0.7
    tokens = draw(logits.expand(n, -1), [Sampling(temperature=temperature)] * n, seeds=list(range(n)), positions=[3] * n)
    counts = torch.bincount(tokens, minlength=VOCAB) / n
    expected = (logits[0] / temperature).softmax(-1)
    # four standard errors of a binomial share
    assert bool(((counts - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt() + 1e-4).all())


@pytest.mark.parametrize("params, allowed", [(dict(top_k=3), 3), (dict(top_k=1), 1), (dict(top_p=1e-9), 1)])
def test_top_k_and_top_p_keep_only_the_largest(params, allowed):
    logits, n = logits_of(1), 500
    tokens = draw(logits.expand(n, -1), [Sampling(temperature=2.0, **params)] * n, seeds=list(range(n)), positions=[3] * n)
    assert set(tokens.tolist()) <= set(logits[0].topk(allowed).indices.tolist())
    assert len(set(tokens.tolist())) == allowed


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    n = 400
    tokens = draw(probabilities.log().expand(n, -1), [Sampling(temperature=1.0, top_p=0.75)] * n, seeds=list(range(n)), positions=[1] * n)
    assert set(tokens.tolist()) == {0, 1}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.05]])
    penalised = [Sampling(repetition_penalty=1.2)]
    assert int(draw(logits, penalised, histories=[[0]])) == 1
    negative = torch.tensor([[-1.0, -1.05]])
    assert int(draw(negative, penalised, histories=[[0]])) == 1
    assert int(draw(negative, penalised, histories=[[]])) == 0


def test_request_seeds_differ_by_replay_seed_sampling_seed_and_id():
    seeds = {request_seed(a, b, c) for a in (0, 1) for b in (0, 1) for c in ("x", "y")}
    assert len(seeds) == 8 and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(temperature=-1.0), "temperature must be at least 0"),
        (dict(top_p=0.0), r"top_p must lie in \(0, 1\]"),
        (dict(top_k=0), "top_k must be at least 1"),
        (dict(repetition_penalty=0.0), "repetition_penalty must be above 0"),
    ],
)
def test_bad_sampling_options_name_the_rule_and_the_value(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
