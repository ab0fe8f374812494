"""What a handler is told: the model at ``initialize``, the requests of a batch at ``handle``.

The attributes and methods are those of TorchServe's ``ts.context.Context``, which handlers in the field rely on.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchmgmt.exchange import ResponseProperties
from torchmgmt.handlers.metrics import Metrics
from torchmgmt.handlers.recorder import Recorder
from torchmgmt.records import ModelSpec

if TYPE_CHECKING:
    from torchmgmt.live import LiveObject

__all__ = ["Context", "RequestProcessor"]

SERVER_NAME = "torchmgmt"
_VERSION = importlib.metadata.version(
    "torchmgmt"
)  # read once, for all that are forked from the process that imports this
# What TorchServe hands to image handlers unless configured otherwise: Pillow's own bound on decompression bombs.
_LIMIT_IMAGE_PIXELS = True


class RequestProcessor:
    """The headers of one request, and what its answer is to carry beside its body."""

    def __init__(self, request_header: Mapping[str, str]) -> None:
        self._request_header = dict(request_header)
        self._status_code = 200
        self._reason_phrase: str | None = None
        self._response_header: dict[str, str] = {}

    def get_request_property(self, key: str) -> str | None:
        """Return a header of the request, whatever the case of its name; None if it has no such header."""
        return _found(self._request_header, key)

    def get_request_properties(self) -> dict[str, str]:
        """Return all headers of the request."""
        return self._request_header

    def report_status(self, code: int, reason_phrase: str | None = None) -> None:
        """Set the status of the answer."""
        self._status_code, self._reason_phrase = code, reason_phrase

    def add_response_property(self, key: str, value: str) -> None:
        """Set a header of the answer."""
        self._response_header[key] = value

    def get_response_status_code(self) -> int:
        """Return the status of the answer; 200 unless set."""
        return self._status_code

    def get_response_status_phrase(self) -> str | None:
        """Return the phrase that goes with the status; None unless set."""
        return self._reason_phrase

    def get_response_headers(self) -> dict[str, str]:
        """Return the headers set for the answer."""
        return self._response_header

    def get_response_header(self, key: str) -> str | None:
        """Return one header set for the answer, whatever the case of its name; None unless set."""
        return _found(self._response_header, key)

    def response_properties(self) -> ResponseProperties | None:
        """Return what was set for the answer; None if nothing. Raises ValueError if the status is no number."""
        if not (self._response_header or self._status_code != 200 or self._reason_phrase):
            return None
        try:
            status = int(self._status_code)
        except (TypeError, ValueError):
            raise ValueError(f"the status of an answer must be a number, not {self._status_code!r}") from None
        headers = {str(name): str(value) for name, value in self._response_header.items()}
        return ResponseProperties(status, str(self._reason_phrase or ""), headers)


class Context:
    """The model that a worker serves and the batch that it runs. One per worker; used by its main thread only."""

    def __init__(
        self,
        model_name: str,
        model_dir: str,
        manifest: Mapping[str, Any],
        batch_size: int,
        gpu: int | None,
        mms_version: str,
        limit_max_image_pixels: bool = _LIMIT_IMAGE_PIXELS,
        metrics: Metrics | None = None,
        model_yaml_config: Mapping[str, Any] | None = None,
        weights_only: bool = True,
        is_sealed: bool = False,
        pristine_dir: str | None = None,
    ) -> None:
        self.model_name = model_name
        self.manifest = manifest
        self.model_yaml_config = {} if model_yaml_config is None else model_yaml_config
        self.explain = False
        self.metrics = Metrics(model_name) if metrics is None else metrics
        self.recorder: Recorder = getattr(self.metrics, "recorder", None) or Recorder()
        """Where the handler's figures go, whatever it puts into ``metrics``."""
        self.request_ids: dict[int, str] = {}
        self.request_processor: list[RequestProcessor] = []
        self.stopping_criteria: Any = None
        self.live: LiveObject | None = None
        """What was registered in place of an archive, if it was no archive."""
        self.send_partial: Callable[[Sequence[Any]], None] = _drop
        """Sends a part of the answer to each request of the batch."""
        self.header_key_sequence_id = os.environ.get("TS_REQUEST_SEQUENCE_ID", "ts_request_sequence_id")
        self.header_key_sequence_start = os.environ.get("TS_REQUEST_SEQUENCE_START", "ts_request_sequence_start")
        self.header_key_sequence_end = os.environ.get("TS_REQUEST_SEQUENCE_END", "ts_request_sequence_end")
        self._system_properties: dict[str, Any] = {
            "model_dir": model_dir,
            "gpu_id": gpu,
            "batch_size": batch_size,
            "server_name": SERVER_NAME,
            "server_version": mms_version,
            "limit_max_image_pixels": limit_max_image_pixels,
            "weights_only": weights_only,
            "is_sealed": is_sealed,
            "pristine_dir": pristine_dir,
            "threads": None,
        }

    @classmethod
    def for_model(cls, spec: ModelSpec) -> Context:
        """Make the context of a worker that serves ``spec``."""
        context = cls(
            spec.key.name,
            spec.model_dir,
            spec.manifest,
            spec.batch_size,
            gpu=None,
            mms_version=_VERSION,
            model_yaml_config=spec.config,
            weights_only=spec.weights_only,
            is_sealed=spec.is_sealed,
            pristine_dir=spec.pristine_dir,
        )
        context.live = spec.live
        return context

    @property
    def system_properties(self) -> dict[str, Any]:
        """``model_dir``, ``gpu_id``, ``batch_size``, ``server_name``, ``server_version``, ``limit_max_image_pixels``.

        And of ours: ``weights_only``, whether checkpoints are to be loaded without running code found in them; ``is_sealed``,
        whether nobody else rewrites the files in ``model_dir``, so that they may be mapped; ``pristine_dir``, where the same
        files lie in a copy that other versions have in common, None if there is none; ``threads``, how many threads an
        operation may use, None where that is not known yet.
        """
        return self._system_properties

    @system_properties.setter
    def system_properties(self, properties: dict[str, Any]) -> None:
        self._system_properties = properties

    def begin_batch(self, request_ids: Sequence[str], headers: Sequence[Mapping[str, str]]) -> None:
        """Make this the context of a new batch: nothing of the one before is left in it."""
        self.request_ids = dict(enumerate(request_ids))
        self.request_processor = [RequestProcessor(header) for header in headers]
        self.metrics.request_ids = self.request_ids

    def response_properties(self) -> list[ResponseProperties | None] | None:
        """Return what was set for each answer of the batch; None if nothing for any. Raises ValueError for a wrong status."""
        for processor in self.request_processor:  # plainly, as this is asked after every batch
            if processor._response_header or processor._status_code != 200 or processor._reason_phrase:
                return [each.response_properties() for each in self.request_processor]
        return None

    def send_intermediate(self, answers: Sequence[Any]) -> None:
        """Send a part of the answer to each request of the batch, before the rest is known.

        Who takes an answer whole gets all parts together; outside a worker, as in people's unit tests, nobody gets them.

        Raises:
            ValueError: ``answers`` has not as many parts as there are requests.
        """
        self.send_partial(answers)

    def get_request_id(self, idx: int = 0) -> str | None:
        """Return the id of the request at ``idx`` of the batch; None if there is none."""
        return self.request_ids.get(idx)

    def get_request_header(self, idx: int, key: str) -> str | None:
        """Return a header of the request at ``idx``, whatever the case of its name."""
        return self.request_processor[idx].get_request_property(key)

    def get_all_request_header(self, idx: int) -> dict[str, str]:
        """Return all headers of the request at ``idx``."""
        return self.request_processor[idx].get_request_properties()

    def get_sequence_id(self, idx: int) -> str | None:
        """Return the id of the sequence to which the request at ``idx`` belongs, from its headers; None if to none."""
        return self.get_request_header(idx, self.header_key_sequence_id)

    def set_response_content_type(self, idx: int, value: str) -> None:
        """Set the content type of the answer at ``idx``."""
        self.set_response_header(idx, "content-type", value)

    def get_response_content_type(self, idx: int) -> str | None:
        """Return the content type set for the answer at ``idx``; None unless set."""
        return self.request_processor[idx].get_response_header("content-type")

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        """Set the status of the answer at ``idx``."""
        if self.request_processor and idx < len(self.request_processor):
            self.request_processor[idx].report_status(code, reason_phrase=phrase)

    def set_all_response_status(self, code: int = 200, phrase: str = "") -> None:
        """Set the status of every answer of the batch."""
        for processor in self.request_processor:
            processor.report_status(code, reason_phrase=phrase)

    def get_response_status(self, idx: int) -> tuple[int, str | None]:
        """Return the status and the phrase of the answer at ``idx``."""
        processor = self.request_processor[idx]
        return processor.get_response_status_code(), processor.get_response_status_phrase()

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        """Set a header of the answer at ``idx``."""
        self.request_processor[idx].add_response_property(key, value)

    def get_response_headers(self, idx: int) -> dict[str, str]:
        """Return the headers set for the answer at ``idx``."""
        return self.request_processor[idx].get_response_headers()

    def __repr__(self) -> str:
        return f"<Context of {self.model_name}: {len(self.request_ids)} requests>"


def _drop(_parts: Sequence[Any]) -> None:
    """Take parts that nobody waits for."""


def _found(headers: Mapping[str, str], key: str) -> str | None:
    if not headers:
        return None
    wanted = key.lower()
    # The last one of several that differ in case, as in a dictionary of them.
    return next((value for name, value in reversed(list(headers.items())) if name.lower() == wanted), None)
