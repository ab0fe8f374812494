"""mosec with the model of the case; host, port and limits come from its own environment variables."""

from case import CASE, load
from mosec import Server, Worker


class Model(Worker):
    def __init__(self):
        super().__init__()
        self.answer = load()

    def forward(self, data):
        return self.answer(data) if CASE["batch_size"] > 1 else self.answer([data])[0]


class RawModel(Model):
    resp_mime_type = "application/octet-stream"

    def deserialize(self, data):
        return data

    def serialize(self, data):
        return data


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        RawModel if CASE["kind"] == "raw" else Model,
        num=CASE["workers"],
        max_batch_size=CASE["batch_size"],
        max_wait_time=CASE["delay_ms"],
    )
    server.run()
