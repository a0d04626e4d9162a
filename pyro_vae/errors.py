"""What can go wrong, as types: every error names the value and the place it came from.

Each also derives from the builtin that a Python user would expect to catch.
"""


class PyroVAEError(Exception):
    """Base of every error that this library raises on purpose."""


class DataError(PyroVAEError, ValueError):
    """Data that cannot be used: empty, not finite, unreadable, or not what was asked for."""


class ShapeError(DataError):
    """An array whose shape does not fit the model; the message gives both shapes."""


class SupportError(DataError):
    """Data outside the support of the likelihood; the message gives value, row and remedy."""


class CorruptFileError(DataError):
    """A file that is truncated, or whose checksum or format is not what it should be."""


class UnknownNameError(PyroVAEError, ValueError):
    """A name that is not in a registry; the message lists the known ones."""


class ConfigError(PyroVAEError, ValueError):
    """An option, or a combination of options, that means nothing."""


class DeviceError(PyroVAEError, RuntimeError):
    """A device that was asked for and is not there."""


class SiteError(PyroVAEError, ValueError):
    """A sample site of the model or guide that an objective or evaluator cannot treat correctly."""


class AnalyticKLError(SiteError):
    """An analytic KL was asked for at a site where none is registered or none is valid."""


class ParameterStoreError(PyroVAEError, RuntimeError):
    """Pyro's parameter store holds other parameters under the name of this module."""


class CompileError(PyroVAEError, RuntimeError):
    """A program that cannot be compiled, or whose compiled version disagrees with the eager one."""


class NonFiniteError(PyroVAEError, ArithmeticError):
    """A loss, gradient or parameter became NaN or infinite; the message says where and when."""


class CheckpointError(PyroVAEError, ValueError):
    """A checkpoint that is damaged or belongs to another architecture or run."""


class RunExistsError(PyroVAEError, FileExistsError):
    """A run folder that already holds something, and overwriting was not asked for."""


class RunPermissionError(PyroVAEError, PermissionError):
    """A run folder that cannot be written."""
