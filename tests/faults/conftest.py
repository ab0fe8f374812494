"""What the tests of this folder share."""

from tests.handlers import deploy, gate, manager

__all__ = ["deploy", "gate", "manager"]
