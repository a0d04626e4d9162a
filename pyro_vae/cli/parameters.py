"""Kinds of arguments and options that several commands take, and how they are listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import click

from pyro_vae.data import Data, Split
from pyro_vae.errors import ConfigError

RUN = click.Path(path_type=Path, exists=True, file_okay=False)


class Sizes(click.ParamType):
    """Layer sizes separated by commas."""

    name = "sizes"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        parts = value if isinstance(value, tuple | list) else str(value).split(",")
        words = [str(part).strip() for part in parts]
        sizes = tuple(int(word) if word.isdecimal() else 0 for word in words)
        if not all(sizes):
            self.fail(f"{value!r} is no list of positive whole numbers like 200,200", param, ctx)
        return sizes


class DataSet(click.ParamType):
    """The name of a data set; or a file's path, made one that is found from other folders too."""

    name = "data"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        path = Path(str(value))
        return str(path.absolute()) if path.suffix and path.is_file() else str(value)


class Scale(click.ParamType):
    """A positive number, or one of the words of `likelihoods.Normal`."""

    name = "scale"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        try:
            return float(value)
        except (TypeError, ValueError):
            return str(value)


class Sections(click.Command):
    """A command whose options are listed under headings; one named here begins the next."""

    headings: ClassVar = {
        "out": "Run", "data": "Data", "model": "Model", "objective": "Objective",
        "epochs": "Training",
    }  # fmt: skip

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        heading = "Options"
        for param in self.get_params(ctx):
            heading = self.headings.get(param.name or "", heading)
            if record := param.get_help_record(ctx):
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def part_of(data: Data, name: str) -> Split:
    """The part of the data that a user named."""
    split = getattr(data, name)
    if split is None:
        raise ConfigError(f'these data have no "{name}" part; choose another split')
    return split.fixed()
