"""Who asks for predictions over HTTP in a storm: on connections that are kept, some of which are left in the middle."""

from __future__ import annotations

import http.client
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from random import Random
from typing import Any

import attrs

from tests.faults.storm_actors import GUESTS, LONG_S, SMALL, STEADY, Request, World, end, payload_of

__all__ = ["AnswerOfAnother", "BrokenOff", "HTTPClient", "Left", "Refused"]

PATIENCE_S = LONG_S + 15.0
"""How long a client waits for anything to come: who waits that long has lost its request."""
RESET = struct.pack("ii", 1, 0)
SIZES = (*[10, 100, 1000] * 30, *[100_000] * 7, 2_000_000, 1 << 17)
"""Of bodies, in bytes, each as often as it is there."""
CHUNKS = 3
"""In so many parts comes a body whose length is not said before."""
DIED = re.compile(r"Worker [1-9]\d* of model \S+ version \S+ died: .+")
OF_NOBODY = {"ModelNotFoundException", "ModelVersionNotFoundException"}


@attrs.define(slots=False)
class Refused(Exception):
    """An error that a request was answered with."""

    code: int
    type: str
    message: str
    retry_after: str | None = None

    def __str__(self) -> str:
        return f"{self.code} {self.type}: {self.message}"

    @property
    def is_late(self) -> bool:
        """Whether it says that the time the request had is over."""
        return (self.code, self.type) == (504, "RequestTimeoutException")

    def may_end(self, request: Request) -> bool:
        """Whether it is one that the contract has for what happens in a storm, its time being over apart."""
        match self.code:
            case 500:
                return DIED.fullmatch(self.message) is not None
            case 503:
                is_full = self.retry_after is not None and self.retry_after.isdigit()
                return self.type == "ServiceUnavailableException" and (is_full or request.model in GUESTS)
            case 404:
                return self.type in OF_NOBODY and request.model in GUESTS
            case _:
                return False


class Left(Exception):
    """The client closed the connection; the text says in the middle of what."""


class AnswerOfAnother(Exception):
    """What came on the connection belongs to another request; the text says to which."""


class BrokenOff(Exception):
    """The connection ended within an answer, so that nobody could take it for a whole one."""


@attrs.define
class HTTPClient:
    """Asks one request after the other, on one connection for as long as it does not leave it."""

    world: World
    random: Random
    connection: http.client.HTTPConnection

    @classmethod
    def of(cls, world: World, random: Random, host: str, port: int) -> HTTPClient:
        """Return one of the server at an address."""
        return cls(world, random, http.client.HTTPConnection(host, port, timeout=PATIENCE_S))

    def run(self) -> None:
        try:
            # At a pace that leaves the machine to those who ask in process, too.
            while not self.world.over.wait(self.random.uniform(0, 0.03)):
                self._ask(*self._choose())
        finally:
            self.connection.close()

    def _choose(self) -> tuple[Request, str]:
        choose = self.random
        name = choose.choice([*STEADY, *STEADY, *GUESTS])
        limit_s = choose.choice([0.05, 0.5, 5.0, LONG_S, LONG_S])
        size, pause_s = choose.choice(SIZES), choose.random() ** 8 * 0.2
        request = self.world.request(name, limit_s, size, pause_s=pause_s)
        request.is_over_http = True
        request.parts = choose.choice([2, 5]) if choose.random() < 0.1 else 0
        leaves = choose.choice(["body", "wait", "wait", "answer"]) if choose.random() < 0.1 else ""
        return request, leaves

    def _ask(self, request: Request, leaves: str) -> None:
        body = payload_of(request.number, request.size)
        request.asked_at = time.monotonic()
        try:
            if leaves == "body":
                self._leave_in_body(request, body)
            self._send(request, body)
            if leaves == "wait":
                self._leave_in_wait()
            self._receive(request, leaves=leaves == "answer")
        except (OSError, http.client.HTTPException, Refused, Left, BrokenOff, AnswerOfAnother) as error:
            end(request, error)
            if not isinstance(error, Refused):
                self._go()
        request.closed_at = time.monotonic()

    def _send(self, request: Request, body: bytes) -> None:
        is_chunked = self.random.random() < 0.2
        self.connection.request(
            "POST",
            _path(request),
            _in_chunks(body) if is_chunked else body,
            self._headers(request),
            encode_chunked=is_chunked,
        )

    def _headers(self, request: Request) -> dict[str, str]:
        headers = {"Content-Type": "application/octet-stream", "X-Request-Id": _id_of(request)}
        # What has to be there within LONG_S is so without being told. For the workers of a guest one may wait longer.
        if request.limit_s < LONG_S or request.model in GUESTS or self.random.random() < 0.5:
            headers["X-Request-Timeout-Ms"] = str(round(request.limit_s * 1000))
        return headers

    def _receive(self, request: Request, *, leaves: bool) -> None:
        response = self.connection.getresponse()
        if (name := response.headers.get("X-Request-Id")) != _id_of(request):
            raise AnswerOfAnother(str(name))
        if leaves and response.status == 200:
            response.read(1)
            response.close()
            raise Left("answer")
        try:
            body = response.read()
        except http.client.IncompleteRead as error:
            raise BrokenOff(f"after {len(error.partial)} bytes") from None
        if response.status != 200:
            raise _refused(response, body)
        end(request, None)
        request.is_right = body == _answer_to(request)
        if request.size <= SMALL and request.model in STEADY and not request.parts:
            self.world.http_took_s.append(request.ended_at - request.asked_at - request.pause_s)

    def _leave_in_body(self, request: Request, body: bytes) -> None:
        self.connection.putrequest("POST", _path(request))
        for name, value in {**self._headers(request), "Content-Length": str(len(body))}.items():
            self.connection.putheader(name, value)
        self.connection.endheaders(body[: len(body) // 2])
        raise Left("body")

    def _leave_in_wait(self) -> None:
        self.world.over.wait(self.random.choice([0.0, 0.001, 0.05]))
        raise Left("wait")

    def _go(self) -> None:
        """Close the connection, as one does or as a program that dies may; the next request opens another."""
        if self.connection.sock is not None and self.random.random() < 0.5:
            self.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.connection.close()


def _path(request: Request) -> str:
    parts = f"&parts={request.parts}" if request.parts else ""
    return f"/predictions/{request.model}?number={request.number}&pause_s={request.pause_s}{parts}"


def _id_of(request: Request) -> str:
    return f"storm-{request.number}"


def _in_chunks(body: bytes) -> Iterator[bytes]:
    step = -(-len(body) // CHUNKS)
    return (body[start : start + step] for start in range(0, len(body), step))


def _answer_to(request: Request) -> bytes:
    payload = payload_of(request.number, request.size)
    return b"%d %d " % (request.number, zlib.crc32(payload)) + payload[::-1]


def _refused(response: http.client.HTTPResponse, body: bytes) -> Exception:
    try:
        item: Any = json.loads(body)
        if item["code"] == response.status:
            return Refused(item["code"], item["type"], item["message"], response.headers.get("Retry-After"))
    except (ValueError, KeyError, TypeError):
        pass
    return Refused(response.status, "", f"the body is no error of ours: {body[:200]!r}")
