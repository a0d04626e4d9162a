"""What stands between training and disaster: NaN is diagnosed, Ctrl-C waits for the step's end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae import programs
from pyro_vae.errors import NonFiniteError, PyroVAEError
from pyro_vae.objectives import Objective

REMEDY = (
    "Try a lower learning rate, gradient_clip, a larger min_scale of the likelihood, or a KL "
    "warm-up; the last checkpoint is intact."
)


class Interruption:
    """Within it, SIGINT and SIGTERM only set `requested`, so that a step is never torn apart.

    A second signal acts at once. Outside the main thread, where signals never arrive, it does
    nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def diagnose(
    objective: Objective, model: nn.Module, guide: nn.Module, batch: tuple[Any, ...], step: int
) -> NonFiniteError:
    """The error for a loss that is NaN or infinite at `step`: says which site, term or gradient.

    Called before the gradients of the step before are cleared: if those, or the parameters, are
    already not finite, that step is to blame.
    """
    named = [*guide.named_parameters(), *model.named_parameters()]
    if (name := _first_bad((n, p.grad) for n, p in named)) is not None:
        return NonFiniteError(
            f'the gradient of "{name}" became NaN or infinite at step {step - 1}. {REMEDY}'
        )
    if (name := _first_bad(named)) is not None:
        return NonFiniteError(
            f'the update of step {step - 1} made "{name}" NaN or infinite. {REMEDY}'
        )
    largest = max(named, key=lambda item: float(item[1].detach().abs().max()))
    return NonFiniteError(
        f"the loss became NaN or infinite at step {step}: "
        f"{_blame(objective, model, guide, batch)}. The largest parameter is "
        f'{float(largest[1].detach().abs().max()):.3g}, in "{largest[0]}". {REMEDY}'
    )


def check_parameters(module: nn.Module, step: int) -> None:
    """Raise `NonFiniteError` if a parameter is NaN or infinite."""
    if (name := _first_bad(module.named_parameters())) is not None:
        raise NonFiniteError(f'the update of step {step} made "{name}" NaN or infinite. {REMEDY}')


@torch.no_grad()
def _blame(objective: Objective, model: nn.Module, guide: nn.Module, batch: tuple[Any, ...]) -> str:
    """The first site of a fresh run whose value or log-density is not finite, in words."""
    try:
        run = programs.Pair(model, guide, batch).run()
        for who, sites, term in (("guide", run.guide, "KL"), ("model", run.model, None)):
            for name, site in sites.items():
                observed = "reconstruction" if site["is_observed"] else "KL"
                for what, value in (
                    ("value", site["value"]),
                    ("log-density", programs.log_prob(site)),
                ):
                    if not torch.isfinite(value).all():
                        return (
                            f'the {what} at site "{name}" of the {who} is not finite '
                            f"(term: {term or observed})"
                        )
        terms = objective.terms(model, guide, *batch)
    except (ValueError, ArithmeticError) as error:
        if isinstance(error, PyroVAEError):
            raise
        return f"the program itself fails: {error}"
    bad = [n for n in ("reconstruction", "kl") if not torch.isfinite(getattr(terms, n))]
    return f"term: {' and '.join(bad)}" if bad else "a fresh draw on the same batch is finite"


def _first_bad(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    return next((n for n, t in named if t is not None and not torch.isfinite(t).all()), None)
