"""What a datum's importance weights say of their own mean: error, bias, effective size, tail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_ESS = 100.0


@dataclass(frozen=True)
class Summary:
    """Figures of the weights of each datum, `(N,)` each, float64; nats where they are logs.

    Attributes:
        log_mean: log (1/K) sum_k w_k, the estimate of log p(x).
        se: standard error of `log_mean`, by the delta method: sqrt(cv²/K).
        bias: of `log_mean`, to first order: -cv²/(2K).
        jackknife: `log_mean` with its 1/K bias removed.
        ess: Kish's effective sample size, (sum w)² / sum w².
        khat: shape of a generalised Pareto fitted to the largest weights.
        max_weight: the largest weight's share of their sum.
    """

    log_mean: Tensor
    se: Tensor
    bias: Tensor
    jackknife: Tensor
    ess: Tensor
    khat: Tensor
    max_weight: Tensor


def summarize(log_w: Tensor, wide: Tensor | None = None) -> Summary:
    """Figures of log weights `(N, K)`; computed in float64.

    Args:
        wide: `(K,)`, true for the draws of the second component of a mixture proposal, whose
            numbers of draws are fixed in advance; the variance is then that within components
            (Owen & Zhou 2000).
    """
    log_w = log_w.double()
    K = log_w.shape[1]
    top = log_w.max(1, keepdim=True).values
    # data outside the model's support have no finite weight: their figures stay minus infinity
    w = (log_w - torch.where(top.isfinite(), top, 0.0)).exp()
    total = w.sum(1, keepdim=True)
    share = w / total
    log_mean = log_w.logsumexp(1) - math.log(K)
    variance = _variance_of_mean(share, wide)
    return Summary(
        log_mean=log_mean,
        se=variance.sqrt(),
        bias=-variance / 2,
        jackknife=_jackknife(log_mean, share),
        ess=1 / share.square().sum(1),
        khat=pareto_khat(log_w),
        max_weight=share.max(1).values,
    )


def _variance_of_mean(share: Tensor, wide: Tensor | None) -> Tensor:
    """Estimated variance of sum_k w_k over its squared mean, given `share` = w / sum w.

    Strata of one draw have no estimate: NaN.
    """
    strata = [share] if wide is None else [share[:, ~wide], share[:, wide]]
    parts = [s.shape[1] * s.var(1) if s.shape[1] > 1 else s.new_full(s.shape[:1], math.nan)
             for s in strata if s.shape[1]]  # fmt: skip
    return torch.stack(parts).sum(0)


def _jackknife(log_mean: Tensor, share: Tensor) -> Tensor:
    """K log Z_K - (K-1)/K sum_k log Z_{K-1, without k} (Nowozin 2018, JVI-1), in O(K).

    With w̃ the normalised weights, log Z without k is log Z + log1p(-w̃_k) + log(K/(K-1)).
    """
    K = share.shape[1]
    if K == 1:
        return torch.full_like(log_mean, math.nan)
    correction = torch.log1p(-share).mean(1) - math.log1p(-1 / K)
    return log_mean - (K - 1) * correction


def pareto_khat(log_w: Tensor) -> Tensor:
    """Shape k of the generalised Pareto fitted to the largest of the weights `(N, K)`.

    The tail is the largest ceil(min(K/5, 3 sqrt(K))) weights over the next one (Vehtari et al.
    2024); the estimate is that of Zhang & Stephens 2009 with the weak prior of Vehtari et al.
    Weights that are all alike have no tail: minus infinity. Fewer than 25 draws give NaN.
    """
    K = log_w.shape[1]
    size = math.ceil(min(K / 5, 3 * math.sqrt(K)))
    if size < 5:
        return log_w.new_full(log_w.shape[:1], math.nan, dtype=torch.float64)
    largest = log_w.double().topk(size + 1, dim=1).values
    w = (largest - largest[:, :1]).exp()
    excess = (w[:, :-1] - w[:, -1:]).flip(1)
    flat = excess[:, -1] <= 1e-12
    khat = _fit_pareto(torch.where(flat[:, None], torch.ones_like(excess), excess))
    return torch.where(flat, -math.inf, khat)


def _fit_pareto(x: Tensor) -> Tensor:
    """k of a generalised Pareto, from ascending excesses `(N, M)` (Zhang & Stephens 2009)."""
    n = x.shape[1]
    x = x.clamp_min(torch.finfo(x.dtype).tiny)
    m = 30 + int(math.sqrt(n))
    steps = torch.arange(1, m + 1, dtype=x.dtype, device=x.device)
    quartile = x[:, int(n / 4 + 0.5) - 1, None]
    theta = 1 / x[:, -1:] + (1 - (m / (steps - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-theta[:, :, None] * x[:, None, :]).mean(2)
    log_profile = n * ((-theta / k).log() - k - 1)
    weights = log_profile.softmax(1)
    best = (theta * weights).sum(1, keepdim=True)
    k = torch.log1p(-best * x).mean(1)
    return (n * k + 10 * 0.5) / (n + 10)


def khat_threshold(num_samples: int) -> float:
    """k-hat above which a mean of K weights cannot be relied on: min(1 - 1/log10 K, 0.7)."""
    return min(1 - 1 / math.log10(num_samples), 0.7) if num_samples > 1 else -math.inf


def is_flagged(summary: Summary, num_samples: int) -> Tensor:
    """Whether an estimate is to be read as a lower bound only, its error not to be trusted.

    True where k-hat exceeds its threshold or the effective sample size is below 100, or either is
    unknown. The variance of the weights is infinite from k = 1/2 on: between that and the
    threshold of 0.7 the mean still converges well, but its standard error is on the low side.
    """
    reliable = (summary.khat <= khat_threshold(num_samples)) & (summary.ess >= MIN_ESS)
    return ~reliable


def checkpoints(num_samples: int) -> list[int]:
    """Numbers of draws at which convergence is looked at: powers of two, then all."""
    return [2**i for i in range(num_samples.bit_length()) if 2**i < num_samples] + [num_samples]


def running_log_mean(log_w: Tensor) -> Tensor:
    """log-mean-exp of the first k weights of `(N, K)`, for every k of `checkpoints`."""
    ks = checkpoints(log_w.shape[1])
    return torch.stack([log_w[:, :k].logsumexp(1) - math.log(k) for k in ks], 1)
