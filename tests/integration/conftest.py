"""What the tests of this folder share."""

from tests.handlers import deploy, gate, light_torch, manager, swept

__all__ = ["deploy", "gate", "light_torch", "manager", "swept"]
