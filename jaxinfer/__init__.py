"""jaxinfer: a differentiable graph optimizer for JAX. The same results, less work.

``import jaxinfer as autoinfer`` and ``from jaxinfer import autoinfer`` give the same names.
"""

from jaxinfer import autoinfer
from jaxinfer.autoinfer import *  # noqa: F403  # its __all__ is the one list of public names

__all__ = ["autoinfer"]
__all__ += autoinfer.__all__
