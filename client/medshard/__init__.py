"""medshard: a distributed, encrypted file store for medical images and insurance policies. Start at ``Vault``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medshard.vault import Vault

__all__ = ["Vault"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy: `medshard --help` must not wait for TLS and HTTP libraries.
    if name == "Vault":
        from medshard.vault import Vault

        return Vault
    raise AttributeError(name)
