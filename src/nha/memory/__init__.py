"""A store of texts that were read once: `MemoryStore`."""

from nha.memory.store import Memory, MemoryStore

__all__ = ["Memory", "MemoryStore"]
