"""Programs in files: what is saved runs in any process, without the code that made it."""

from jaxinfer.storage.container import StorageError
from jaxinfer.storage.loading import Loaded, load
from jaxinfer.storage.saving import save

__all__ = ["Loaded", "StorageError", "load", "save"]
