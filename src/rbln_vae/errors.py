"""The exceptions of the package.

Wrong arguments raise `ValueError` or `TypeError`; all other errors are one of these classes.
They derive from `RuntimeError`, because code written for optimum-rbln catches that.
"""

from __future__ import annotations


class RBLNError(RuntimeError):
    """The base of the package's own exceptions."""


class RBLNCompileError(RBLNError):
    """A model can't be compiled; the message names the operation and its submodule."""


class RBLNArtifactError(RBLNError):
    """A compiled file is damaged, incomplete, or has another format or version."""


class RBLNRuntimeError(RBLNError):
    """A compiled model can't run in the way it was loaded."""


class RBLNCancelledError(RBLNError):
    """A run was stopped at its caller's request; the model can be used again."""


class RBLNTargetUnavailableError(RBLNError):
    """The target can't run on this machine; the message says what to install."""


class RBLNDatasetError(RBLNError):
    """A data set can't be encoded or read; all written files stay complete."""
