"""Where TorchServe 0.12 and its documentation disagree: one table of every difference, and what follows from it.

The setting ``contract`` chooses the column. Nothing else in the code asks which contract is followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
from attrs import frozen

from torchmgmt.http import operations as ops
from torchmgmt.http.errors import KeyRequired, KeyRequiredAsBadRequest
from torchmgmt.http.operations import Operation
from torchmgmt.http.parameters import Parameter
from torchmgmt.settings import Address, Settings

__all__ = ["CONTRACTS", "Contract", "contract_of", "needs_key"]


@frozen
class Contract:
    """One column of the table; each field is a row."""

    synchronous_by_default: bool
    """Whether a registration that does not say ``synchronous`` waits for its workers."""
    code_for_none_to_wait_for: int
    """The code of an asynchronous registration that starts no worker."""
    key_refusal: type[KeyRequired]
    """What is raised, and so the code and the text, when a key is missing, wrong or expired."""
    needs_key_on_loopback: bool
    """Whether callers on this machine need a key, too, where the setting disable_token_authorization is not given."""
    most_on_a_page: int
    """Models on one page of the list, however many are asked for."""

    def operations(self) -> dict[Operation, Operation]:
        """Return each operation of the management address as declared -> as this contract has it."""
        return {operation: self._adapt(operation) for operation in ops.MANAGEMENT}

    def _adapt(self, operation: Operation) -> Operation:
        if operation is not ops.REGISTER:
            return operation
        return attrs.evolve(operation, parameters=self._with_defaults(operation.parameters))

    def _with_defaults(self, parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
        return tuple(
            attrs.evolve(parameter, default=self.synchronous_by_default)
            if parameter.name == "synchronous"
            else parameter
            for parameter in parameters
        )

    def code_of_registration(self, *, synchronous: bool, workers: int) -> int:
        """Return the code of a registration that went well."""
        if synchronous:
            return 200
        return 202 if workers else self.code_for_none_to_wait_for


CONTRACTS: Mapping[str, Contract] = {
    "documented": Contract(
        synchronous_by_default=False,
        code_for_none_to_wait_for=202,
        key_refusal=KeyRequired,
        needs_key_on_loopback=False,
        most_on_a_page=1000,
    ),
    # Read off a running server 0.12.0; the page off its ApiUtils.getModelList.
    "torchserve-0.12": Contract(
        synchronous_by_default=True,
        code_for_none_to_wait_for=200,
        key_refusal=KeyRequiredAsBadRequest,
        needs_key_on_loopback=True,
        most_on_a_page=100,
    ),
}
"""Value of the setting ``contract`` -> its column."""


def contract_of(settings: Settings) -> Contract:
    """Return the contract that the settings choose."""
    return CONTRACTS[settings.contract]


def needs_key(settings: Settings, address: Address) -> bool:
    """Whether every caller of ``address`` needs a key: by setting, by contract, or because other machines reach it."""
    if settings.disable_token_authorization is not None:
        return not settings.disable_token_authorization
    return contract_of(settings).needs_key_on_loopback or not address.is_loopback
