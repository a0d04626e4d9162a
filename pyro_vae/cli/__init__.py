"""`pyro-vae`: train, evaluate, compare, sample, impute and plot from the command line."""

from __future__ import annotations

import sys

import click

from pyro_vae.cli.evaluate import compare, evaluate
from pyro_vae.cli.generate import impute, sample
from pyro_vae.cli.plot import plot
from pyro_vae.cli.train import train
from pyro_vae.errors import PyroVAEError

FAILURE, INTERRUPTED = 1, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="pyro-vae")
def cli() -> None:
    """Train variational autoencoders and evaluate their log p(x).

    A run lives in a folder: configuration, metrics, checkpoint, evaluation, figures.

    \b
        pyro-vae train --data digits --out runs/a
        pyro-vae evaluate runs/a --num-samples 1000
        pyro-vae plot runs/a
        pyro-vae compare runs/a runs/b

    Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted.
    """


for command in (train, evaluate, compare, sample, impute, plot):
    cli.add_command(command)


def main() -> None:
    """Entry point. Exit codes: 1 for an error of ours, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except (PyroVAEError, OSError) as error:  # a full disk is no bug of ours
        click.echo(f"Error: {error}", err=True)
        sys.exit(FAILURE)
