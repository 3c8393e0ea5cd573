"""A gateway that stops answers on its open connections, and passes later connections on to its successor."""

import asyncio
import json
import os
import socket
from typing import Any

from loraserve.gateway.connections import IDLE_GRACE_S

from .conftest import Running, Start


class Client:
    """One kept-alive connection, without the retries of an HTTP library."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, path: str, body: Any) -> None:
        data = json.dumps(body).encode()
        self._writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    async def receive(self) -> tuple[str, str]:
        """Return the head and the body of the next answer, in lower case."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        if "transfer-encoding: chunked" in head:
            return head, (await self._reader.readuntil(b"\r\n0\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        return head, (await self._reader.readexactly(length)).decode().lower()

    async def is_closed(self, within_s: float = 1.0) -> bool:
        try:
            return await asyncio.wait_for(self._reader.read(1), within_s) == b""
        except TimeoutError:
            return False

    def close(self) -> None:
        self._writer.close()


async def connect(gateway: Running) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", gateway.service.port))


def completion(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", "max_tokens": 40, **more}


async def start_draining(gateway: Running) -> None:
    gateway.service.stop()
    await gateway.until(lambda: gateway.service.gateway.connections.is_draining, "the drain to begin")


def test_requests_on_open_connections_are_answered_and_their_clients_sent_elsewhere(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            used, unused = await connect(gateway), await connect(gateway)
            used.send("/v1/completions", completion())
            head, _ = await used.receive()
            assert "200 ok" in head
            assert "connection: close" not in head
            await start_draining(gateway)
            for client in (used, unused):
                client.send("/v1/completions", completion())
                head, body = await client.receive()
                assert "200 ok" in head
                assert "\r\nconnection: close\r\n" in head
                assert '"finish_reason":"stop"' in body
                assert await client.is_closed()
            await gateway.until(lambda: gateway.service.state == "STOPPED", "the end without further waiting")

    asyncio.run(scenario())


def test_a_connection_whose_stream_ends_during_the_drain_serves_one_more_request(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            reply = gateway.cluster.replies[""]
            reply.text, reply.delay_s = "hello world " * 3, 0.02
            client = await connect(gateway)
            client.send("/v1/completions", completion(stream=True))
            await gateway.until(lambda: gateway.cluster.playing, "the stream to run")
            await asyncio.sleep(0.05)
            await start_draining(gateway)
            head, events = await client.receive()
            assert "connection: close" not in head
            assert "[done]" in events
            await asyncio.sleep(0.1)
            client.send("/v1/completions", completion())
            head, _ = await client.receive()
            assert "200 ok" in head
            assert "\r\nconnection: close\r\n" in head
            assert await client.is_closed()

    asyncio.run(scenario())


def test_idle_connections_are_closed_after_the_grace_time_and_end_the_drain(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            client = await connect(gateway)
            await start_draining(gateway)
            assert not await client.is_closed(within_s=IDLE_GRACE_S - 0.5)
            assert await client.is_closed(within_s=2.0)
            await gateway.until(lambda: gateway.service.state == "STOPPED", "the end of the drain")

    asyncio.run(scenario())


def test_connections_that_arrive_during_the_drain_wait_for_the_next_gateway(start_gateway: Start) -> None:
    async def scenario() -> None:
        with socket.socket() as shared:
            shared.bind(("127.0.0.1", 0))
            async with start_gateway(f"gateway.listen_fd={os.dup(shared.fileno())}") as first:
                open_ = await connect(first)
                await start_draining(first)
                late = await connect(first)
                late.send("/v1/completions", completion())
                open_.close()
                await first.until(lambda: first.service.state == "STOPPED", "the end of the first gateway")
            async with start_gateway(f"gateway.listen_fd={os.dup(shared.fileno())}") as second:
                head, body = await late.receive()
                assert "200 ok" in head
                assert "connection: close" not in head
                assert '"finish_reason":"stop"' in body
                assert second.service.port == shared.getsockname()[1]
                late.close()

    asyncio.run(scenario())
