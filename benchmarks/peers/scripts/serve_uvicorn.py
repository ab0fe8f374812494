"""uvicorn that sends back what it gets, once all of it is there: what Python's fastest way of HTTP can reach."""

import uvicorn
from case import CASE, load

load()


async def echo(scope, receive, send):
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        more = message["more_body"]
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    uvicorn.run(
        echo, host="127.0.0.1", port=CASE["port"], loop="uvloop", http="httptools", lifespan="off", access_log=False
    )
