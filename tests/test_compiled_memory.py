"""The memory that a step frees, and the next one needs again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="is about the malloc of glibc"
)

# sixteen times 4 MB at once, again and again, are 16,384 pages of 4 KB
SCRIPT = """
import resource, torch
import pyro_vae
from pyro_vae.compiled.backend import inductor
{keep}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    before = faults()
    [torch.ones(2**20) for _ in range(16)]
print(faults() - before)
"""
COMPILE = """
graph = torch.fx.symbolic_trace(lambda x: x + 1)
assert inductor(graph, [torch.zeros(3)])(torch.zeros(3))[0] == 1
"""


def faults(keep: str, **environment: str) -> int:
    """Pages that a process waits for in its twentieth round."""
    unset = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(keep=keep)], env=unset | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


def test_what_a_step_frees_is_not_asked_for_again() -> None:
    assert faults(keep="assert pyro_vae.compiled.memory.keep_freed_memory()") < 50


def test_compiling_for_a_cpu_keeps_memory() -> None:
    assert faults(keep=COMPILE) < 50


# which is also what makes sure that the tests above can fail
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_the_user_s_own_choice_stands(name: str) -> None:
    keep = "assert not pyro_vae.compiled.memory.keep_freed_memory()"
    assert faults(keep=keep, **{name: str(2**17)}) > 5_000
