"""LitServe with the model of the case."""

from typing import Annotated

import litserve
from case import CASE, load
from fastapi import Body, Request, Response

if CASE["kind"] == "raw":
    Payload = Annotated[bytes, Body(media_type="application/octet-stream")]
else:
    Payload = Request  # JSON, as its documentation has it


class Api(litserve.LitAPI):
    def setup(self, device):
        self.answer = load()

    def decode_request(self, request: Payload):
        return request

    def predict(self, inputs):
        return self.answer(inputs) if CASE["batch_size"] > 1 else self.answer([inputs])[0]

    def batch(self, inputs):
        return inputs

    def encode_response(self, output):
        return Response(output, media_type="application/octet-stream") if CASE["kind"] == "raw" else output


if __name__ == "__main__":
    api = Api(
        max_batch_size=CASE["batch_size"], batch_timeout=CASE["delay_ms"] / 1000 if CASE["batch_size"] > 1 else 0.0
    )
    # fast_queue is what its documentation advises above 100 requests a second.
    server = litserve.LitServer(
        api, accelerator=CASE["device"], devices=1, workers_per_device=CASE["workers"], timeout=False, fast_queue=True
    )
    server.run(host="127.0.0.1", port=CASE["port"], log_level="warning", generate_client_file=False)
