"""The exceptions of the package.

Wrong arguments raise `ValueError` or `TypeError`; everything else that can go wrong
raises one of these. All of them are `RuntimeError`, which code written for
optimum-rbln catches.
"""

from __future__ import annotations


class RBLNError(RuntimeError):
    """The base of the package's own exceptions."""


class RBLNCompileError(RBLNError):
    """A model can't be compiled; the message names the operation and where it stands."""


class RBLNArtifactError(RBLNError):
    """A compiled file is damaged, incomplete, foreign, or of a newer format."""


class RBLNRuntimeError(RBLNError):
    """A compiled model can't run as it was loaded."""


class RBLNCancelledError(RBLNError):
    """A run was stopped because its caller asked for that; the model can be used again."""


class RBLNTargetUnavailableError(RBLNError):
    """The target can't run on this machine; the message says what to install."""


class RBLNDatasetError(RBLNError):
    """A data set can't be encoded or read as asked; what was written stays whole."""
