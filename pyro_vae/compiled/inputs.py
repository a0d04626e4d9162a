"""The inputs of a graph as they are now, if all that the graph takes for granted still holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from pyro_vae.compiled.look import Look
from pyro_vae.compiled.places import AnyPlace, Moment, same, same_values, stands_for_another
from pyro_vae.compiled.record import Recording
from pyro_vae.compiled.sharing import shared


@dataclass(frozen=True)
class Argument:
    """The graph's input that is the program's n-th tensor argument."""

    index: int


class Inputs:
    """Finds the inputs of a graph.

    Args:
        recording: of the run that the graph was made of.
        sources: where its inputs come from.
        examples: those that it was made with.
        written: the numbers of those that it writes to, and that others must not share memory with.
    """

    def __init__(
        self,
        recording: Recording,
        sources: Sequence[Argument | AnyPlace],
        examples: Sequence[Tensor],
        written: Sequence[int],
    ) -> None:
        self._objects = _Objects(recording)
        self._aside = _Aside(recording)
        self._values = _Values(recording)
        self._look_up = _LookUp(sources, examples)
        self._written = written

    def __call__(self, arguments: Sequence[Tensor]) -> list[Tensor] | None:
        """The inputs, or None if the graph was made for others."""
        if not (self._objects.stand() and self._aside.stand() and self._values.stand()):
            return None
        found = self._look_up(arguments)
        return None if found is None or shared(found, self._written) else found

    def hold(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the graph may run on these, which it found but for the arguments, as far as
        changes of tensors in place may tell."""
        return self._values.stand() and not shared(inputs, self._written)


class _Objects:
    """Python's values, and objects of any other kind: everything but tensors."""

    def __init__(self, recording: Recording) -> None:
        held = [(p, v) for p, v in recording.frozen if not isinstance(v, Tensor)]
        self._look = Look([place for place, _ in held])
        self._held = [held[n][1] for n in self._look.order]

    def stand(self) -> bool:
        """Whether they are what they were."""
        now = self._look()
        if now is None:
            return False
        # first, all at once, whether they are the objects
        return all(map(is_, now, self._held)) or all(map(same, now, self._held))


class _Aside:
    """Tensors at places that the graph does not read: those that the program asks for something
    else than their values (`len(self.data)`), and further places of those that are its inputs."""

    def __init__(self, recording: Recording) -> None:
        inputs = {id(tensor) for tensor, _ in recording.captured}
        tensors = [(place, v) for place, v in recording.frozen if isinstance(v, Tensor)]
        counts = Counter(id(value) for _, value in tensors)
        held = [(p, v) for p, v in tensors if id(v) not in inputs or counts[id(v)] > 1]
        self._look = Look([place for place, _ in held])
        values = [held[n][1] for n in self._look.order]
        first: dict[int, int] = {}
        self._first = [first.setdefault(id(value), n) for n, value in enumerate(values)]
        self._assumed = [*map(_ASSUMED, values)]

    def stand(self) -> bool:
        """Whether they are alike still, and one where they were one."""
        now = self._look()
        if now is None:
            return False
        tied = all(map(is_, now, map(now.__getitem__, self._first)))
        try:
            return tied and [*map(_ASSUMED, now)] == self._assumed
        except AttributeError:  # of what is no tensor any more
            return False


class _Values:
    """Tensors whose values are part of the graph: masks that decide shapes, numbers of places.

    Compared at every step: numpy, say, writes to memory that it shares with a tensor unseen.
    """

    def __init__(self, recording: Recording) -> None:
        self._places = [place for _, place in recording.granted]
        self._values = [tensor.clone() for tensor, _ in recording.granted]

    def stand(self) -> bool:
        """Whether they hold what they held."""
        now = [place.get() for place in self._places]
        return all(
            isinstance(tensor, Tensor)
            and _ASSUMED(tensor) == _ASSUMED(value)
            and same_values(tensor, value)
            for tensor, value in zip(now, self._values, strict=True)
        )


class _LookUp:
    """Finds the inputs of a graph, and sees that they are such as it was made for.

    At every step, and so without a loop of Python where nothing has changed.
    """

    def __init__(self, sources: Sequence[Argument | AnyPlace], examples: Sequence[Tensor]) -> None:
        found = [(n, s) for n, s in enumerate(sources) if not isinstance(s, Argument | Moment)]
        moments = [(n, s) for n, s in enumerate(sources) if isinstance(s, Moment)]
        self._places = Look([place for _, place in found])
        self._moments = Look([moment for _, moment in moments])
        order = [found[i][0] for i in self._places.order] + [n for n, _ in moments]
        self._held = [examples[n] for n in order]  # what was found last
        self._signatures = signatures(self._held)
        self._signatures_of_places = signatures(self._held[: len(found)])
        order_of = {n: i for i, n in enumerate(order)}
        self._order = [
            len(order) + s.index if isinstance(s, Argument) else order_of[n]
            for n, s in enumerate(sources)
        ]

    def __call__(self, arguments: Sequence[Tensor]) -> list[Tensor] | None:
        """The inputs; None where one is not what it was."""
        places, moments = self._places(), self._moments()
        if places is None or moments is None:
            return None
        held = places + moments
        if not all(map(is_, held, self._held)):
            if not all(isinstance(value, Tensor) for value in held):
                return None
            if signatures(held) != self._signatures or any(map(stands_for_another, held)):
                return None
            self._held = held
        # a parameter may change its layout and stay the object it is, a moment does not
        elif signatures(places) != self._signatures_of_places:
            return None
        values = [*held, *arguments]  # the arguments' layouts are known by the kind of the call
        return [*map(values.__getitem__, self._order)]


_ASSUMED = attrgetter("shape", "dtype", "device", "requires_grad")


def signature(tensor: Tensor) -> tuple[Any, ...]:
    """What a graph assumes of an input."""
    return *_ASSUMED(tensor), tensor.stride()


def signatures(tensors: Sequence[Tensor]) -> list[Any]:
    """What a graph assumes of its inputs."""
    return [*map(_ASSUMED, tensors), *map(Tensor.stride, tensors)]
