"""The public face: light to import, true in its `__all__`, documented throughout."""

import importlib
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
import types

import pytest

import pyro_vae
from pyro_vae.errors import ConfigError

HEAVY = ("arviz", "lightning", "matplotlib", "pandas", "scipy", "sklearn", "tensorboard", "xarray")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pyro_vae.__path__, "pyro_vae.")
    if not module.name.endswith("__main__")
)
PUBLIC = [name for name in MODULES if not any(p.startswith("_") for p in name.split("."))]


def loaded_after(statement: str) -> set[str]:
    """The top-level packages in a fresh interpreter after a statement."""
    code = f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_import_is_light():
    extra = loaded_after("import pyro_vae") - loaded_after("import pyro, pyro.infer")
    assert not {name for name in extra if name.startswith(HEAVY)}


@pytest.mark.parametrize(
    ("use", "what"),
    [
        ("evidence.Annealing(chains=4).chains", "4"),
        ("inference_data.to_arviz.__name__", "to_arviz"),
        ("imputation.impute.__name__", "impute"),
        ("__version__", importlib.metadata.version("pyro-vae")),
    ],
)
def test_what_messages_name_is_there_on_a_fresh_import(use, what):
    code = f"import pyro_vae as pv; print(pv.{use})"
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == what


def test_annealing_is_asked_for_by_its_public_name():
    with pytest.raises(ConfigError, match=r"takes pyro_vae\.evidence\.Annealing"):
        pyro_vae.log_marginal(int, int, [[0.0]], method="ais", annealing=5)


def test_importing_leaves_pyro_and_torch_as_they_were():
    code = (
        "import torch, pyro; before = torch.get_rng_state(), torch.get_default_dtype(), "
        "pyro.settings.get(); import pyro_vae; after = torch.get_rng_state(), "
        "torch.get_default_dtype(), pyro.settings.get(); "
        "assert torch.equal(before[0], after[0]) and before[1:] == after[1:]; "
        "assert not pyro.get_param_store()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["pyro_vae", *MODULES])
def test_all_is_true(name):
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert len(listed) == len(set(listed))
    for public in listed:
        assert hasattr(module, public), public
    if name == "pyro_vae":
        exposed = {key for key in dir(module) if not key.startswith("_")}
        assert set(listed) <= exposed


def public_objects(module: types.ModuleType):
    """The classes and functions that a module defines, and the public methods of the classes."""
    for name, thing in vars(module).items():
        home = getattr(thing, "__module__", None)
        if name.startswith("_") or home != module.__name__ or not callable(thing):
            continue
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        yield name, thing
        if inspect.isclass(thing):
            for method, function in vars(thing).items():
                if not method.startswith("_") and inspect.isfunction(function):
                    yield f"{name}.{method}", getattr(thing, method)


@pytest.mark.parametrize("name", ["pyro_vae", *PUBLIC])
def test_every_public_name_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
    documented = {key: bool(thing.__doc__) for key, thing in public_objects(module)}
    # a method may leave its docstring to the protocol or base class that it serves
    said_before = {"forward"} | {
        method
        for owner in [*vars(module).values()]
        if inspect.isclass(owner)
        for base in owner.__mro__
        for method, function in vars(base).items()
        if inspect.isfunction(function) and function.__doc__
    }
    missing = [
        key
        for key, said in documented.items()
        if not said and ("." not in key or key.split(".")[1] not in said_before)
    ]
    assert not missing
