"""What stands between training and disaster: NaN is diagnosed, Ctrl-C waits for the step's end."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterable, Sequence
from types import FrameType, TracebackType
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae import programs
from pyro_vae.errors import NonFiniteError, PyroVAEError
from pyro_vae.objectives import Objective

REMEDY = (
    "Look for a division by zero, a logarithm of zero or an overflow there; try a lower learning "
    "rate, gradient_clip, a larger min_scale of the likelihood, or a KL warm-up. The checkpoint in "
    "the run folder, if there is one, is from before and intact."
)

# batches on end: were they no better and no worse than the first, one run in so many would warn
DIVERGED = 100

TERMS = {"reconstruction": "reconstruction", "kl": "KL"}


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
            # None is a handler that was not set from Python, and cannot be put back from it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Guard:
    """Finds out what became NaN or infinite, and says it as a `NonFiniteError`.

    Args:
        objective, model, guide: in training.
    """

    def __init__(self, objective: Objective, model: nn.Module, guide: nn.Module) -> None:
        self.objective, self.model, self.guide = objective, model, guide

    def check_update(self, step: int) -> None:
        """Raise if a gradient of `step`, or a parameter after it, is not finite."""
        named = self._parameters()
        if (name := _first_bad((n, p.grad) for n, p in named)) is not None:
            raise NonFiniteError(
                f'the gradient of "{name}" became NaN or infinite at step {step}, which was found '
                'only after the update. With device="cpu", where each step is looked at, the error '
                f"names term and site; a run can be resumed there. {REMEDY}"
            )
        if (name := _first_bad(named)) is not None:
            raise NonFiniteError(
                f'the update of step {step} made "{name}" NaN or infinite. {REMEDY}'
            )

    def check_gradient(self, batch: tuple[Any, ...], step: int) -> None:
        """Raise if the gradient of `step`, taken on `batch`, is not finite; before the update."""
        name = _first_bad((n, p.grad) for n, p in self._parameters())
        if name is not None:
            raise NonFiniteError(
                f'the gradient of "{name}" became NaN or infinite at step {step}, though the loss '
                f"is finite: {self._blame_gradient(batch)}. {REMEDY}"
            )

    def bad_gradient(self, batch: tuple[Any, ...], step: int) -> NonFiniteError:
        """The error for a gradient of `step` that a compiled step found not finite on `batch`.

        Raises:
            NonFiniteError: with fresh draws it is not finite either; the message says where.
        """
        parameters = [p for _, p in self._parameters() if p.requires_grad]
        with torch.enable_grad(), pyro.validation_enabled(False):
            loss = self.objective.terms(self.model, self.guide, *batch).loss / len(batch[0])
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.check_gradient(batch, step)
        self.check_norm(nn.utils.get_total_norm([g for g in gradients if g is not None]), step)
        return NonFiniteError(
            f"the gradient became NaN or infinite at step {step}, and was not applied; with fresh "
            f"draws on the same batch it is finite. {REMEDY}"
        )

    def check_norm(self, norm: Tensor, step: int) -> None:
        """Raise if the norm of the gradient of `step` cannot be clipped, for it overflowed."""
        if torch.isfinite(norm):
            return
        gradients = [(n, p.grad) for n, p in self._parameters() if p.grad is not None]
        name, size = _largest(gradients)
        raise NonFiniteError(
            f"the norm of the gradient overflowed at step {step}: its largest entry is {size:.3g}, "
            f'in that of "{name}". {REMEDY}'
        )

    def bad_loss(self, batch: tuple[Any, ...], step: int, where: str) -> NonFiniteError:
        """The error for terms that are not finite on `batch`; `step` is the last update.

        Args:
            where: of the batch, in words.

        Raises:
            NonFiniteError: that last update was the culprit.
        """
        # the gradients of that update are still there
        self.check_update(step)
        name, size = _largest(self._parameters())
        return NonFiniteError(
            f"the loss became NaN or infinite {where}: {self._blame(batch)}. "
            f'The largest parameter is {size:.3g}, in "{name}". {REMEDY}'
        )

    @staticmethod
    def warn_of_divergence(first: float, loss: float) -> None:
        """Say that training has been worse than none for `DIVERGED` batches on end."""
        warnings.warn(
            f"training diverges: {DIVERGED} batches on end had a larger loss than the first had "
            f"before any update ({loss:.4g}, it was {first:.4g}). Try a lower learning rate, "
            "gradient_clip, or data nearer to the scale that the model starts at",
            RuntimeWarning,
            stacklevel=2,
        )

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{who}.{name}", parameter)
            for who, program in (("guide", self.guide), ("model", self.model))
            for name, parameter in program.named_parameters()
        ]

    def _blame_gradient(self, batch: tuple[Any, ...]) -> str:
        """The terms, and their sites, whose gradient on a batch is not finite, in words."""
        try:
            with torch.enable_grad(), pyro.validation_enabled(False):
                terms = self.objective.terms(self.model, self.guide, *batch)
                run = programs.Pair(self.model, self.guide, batch).run()
            bad = [term for term in TERMS if self._bad_gradient(getattr(terms, term))]
            words = [f"term: {TERMS[term]}, {self._bad_sites(term, run)}" for term in bad]
        except PyroVAEError:
            raise
        except (ValueError, ArithmeticError, RuntimeError) as error:
            return f"the program itself fails when it is run again: {error}"
        return "; ".join(words) or "with fresh draws on the same batch every term's is finite"

    def _bad_sites(self, term: str, run: programs.Run) -> str:
        """The sites of a term whose own log-density has a bad gradient; all of them, if none."""
        sites = run.observed if term == "reconstruction" else run.latent
        own = {name: [programs.log_prob(site)] for name, site in sites}
        if term == "kl":
            own = {name: [*own[name], programs.log_prob(run.guide[name])] for name in own}
        bad = [name for name, values in own.items() if any(map(self._bad_gradient, values))]
        names = [f'"{name}"' for name in bad or own]
        return f"at site{'s' if len(names) > 1 else ''} {', '.join(names)}"

    def _bad_gradient(self, value: Tensor) -> bool:
        parameters = [p for _, p in self._parameters() if p.requires_grad]
        if not value.requires_grad:
            return False
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            value.sum(), parameters, retain_graph=True, allow_unused=True
        )
        return any(g is not None and not _finite(g) for g in gradients)

    def _blame(self, batch: tuple[Any, ...]) -> str:
        """The first site of a fresh run whose value or log-density is not finite, in words."""
        try:
            with torch.no_grad(), pyro.validation_enabled(False):
                run = programs.Pair(self.model, self.guide, batch).run()
                site = _bad_site("guide", run.guide) or _bad_site("model", run.model)
                terms = self.objective.terms(self.model, self.guide, *batch)
        except PyroVAEError:
            raise
        except (ValueError, ArithmeticError) as error:
            return f"the program itself fails: {error}"
        bad = [n for n in ("reconstruction", "kl", "loss") if not _finite(getattr(terms, n))]
        return site or (f"term: {bad[0]}" if bad else "a fresh draw on the same batch is finite")


def _bad_site(who: str, sites: Any) -> str | None:
    for name, site in sites.items():
        term = "reconstruction" if site["is_observed"] else "KL"
        for what, value in (("value", site["value"]), ("log-density", programs.log_prob(site))):
            if not _finite(value):
                return f'the {what} at site "{name}" of the {who} is not finite (term: {term})'
    return None


def _finite(value: Tensor) -> bool:
    # a sum is the cheapest screen: it hides no NaN or infinity, and may overflow without one
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def _first_bad(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    return next((name for name, t in named if t is not None and not _finite(t)), None)


def _largest(named: Iterable[tuple[str, Tensor]]) -> tuple[str, float]:
    sizes = [(name, float(t.detach().abs().max())) for name, t in named if t.numel()]
    return max(sizes, key=lambda item: item[1], default=("", 0.0))
