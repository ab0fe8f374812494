"""What a handler raises to answer with a code of its own choice."""

from __future__ import annotations

__all__ = ["PredictionException"]


class PredictionException(Exception):
    """Answers the requests of a batch with a message and a code; over HTTP the code is the status.

    Named as TorchServe's ``ts.utils.util.PredictionException``.
    """

    def __init__(self, message: str, error_code: int = 500) -> None:
        self.message = message
        self.error_code = error_code
        super().__init__(message)

    def __str__(self) -> str:
        return f"{self.message} : {self.error_code}"
