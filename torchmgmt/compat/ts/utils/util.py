"""``ts.utils.util``."""

__all__ = ["PredictionException"]


class PredictionException(Exception):
    """Raised by a handler to answer with a message and a code of its own choice."""

    def __init__(self, message: str, error_code: int = 500) -> None:
        self.message = message
        self.error_code = error_code
        super().__init__(message)

    def __str__(self) -> str:
        return f"{self.message} : {self.error_code}"
