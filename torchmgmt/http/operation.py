"""What one operation of an address is: method, path, parameters, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

from attrs import field, frozen

from torchmgmt.http.parameters import Parameter

__all__ = ["NAME", "KeyName", "Link", "Operation"]

NAME = "/\0"
"""What no name may have in it."""


class KeyName(Enum):
    """What a key of token authorization opens; the value is its name in the key file."""

    MANAGEMENT = "management"
    INFERENCE = "inference"
    API = "API"
    """Makes new management and inference keys, and opens nothing else."""


@frozen
class Link:
    """How an answer leads to another operation: what of the request or the answer is a parameter of that one."""

    operation_id: str
    parameters: Mapping[str, str]
    """Name -> expression as OpenAPI has them: ``$request.query.model_name``, ``$response.body#/0/modelName``."""


@frozen(eq=False)  # each is itself, and a key of tables
class Operation:
    """One operation: what is called how, and what it answers with when all is well."""

    id: str
    method: str
    path: str
    summary: str
    parameters: Sequence[Parameter] = ()
    takes_body: bool = False
    """Whether the parameters may also come as a JSON object or a form."""
    needs_model_api: bool = False
    """Whether it is served only where the setting ``enable_model_api`` is on."""
    needs_keys: bool = False
    """Whether it is served only where there are keys (token authorization)."""
    key: KeyName | None = KeyName.MANAGEMENT
    """Which one a caller sends where keys are required. None: served to everybody, always."""
    tag: str = "Management"
    """The group of operations that generated clients put it into."""
    answers: Mapping[int, str] = field(factory=lambda: {200: "Status"})
    """Code -> name of the schema of its body."""
    errors: Sequence[int] = ()
    """Codes of its errors, beside those that the server may give to any request."""
    links: Sequence[Link] = ()
    """What an answer of a code below 300 leads to."""
    is_prediction: bool = False
    """Whether it hands a body of any kind to a model, whose handler decides about the answer and its code."""
    for_kserve: bool = False
    """Whether its errors carry their message under ``error``, too."""
