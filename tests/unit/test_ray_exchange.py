"""Back pressure through Ray: no more of an answer is under way than its client reads. Without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import Message, Send

from server.ray.exchange import READ, TOLD_BYTES, WINDOW, Exchange, Window


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


def keep(sent: list[Message]) -> Send:
    async def send(message: Message) -> None:
        sent.append(message)

    return send


async def drive(app: Callable[[Window], Any], read: asyncio.Semaphore, sent: list[Message], seconds: float) -> Exchange:
    """An application behind a window, Ray's two queues, and a client that takes a message for each permit."""

    async def to_client(message: Message) -> None:
        await read.acquire()
        sent.append(message)

    exchange = Exchange(never, to_client, b"{}", seconds)
    made: asyncio.Queue[Message | None] = asyncio.Queue()  # without an end, as Ray's
    async with Window(exchange.receive, made.put) as window:
        work = asyncio.create_task(app(window))
        work.add_done_callback(lambda _: made.put_nowait(None))
        while (message := await made.get()) is not None:
            await exchange.send(message)
        await asyncio.gather(work, return_exceptions=True)
    await exchange.close()
    return exchange


def body(size: int) -> Message:
    return {"type": "http.response.body", "body": b"x" * size, "more_body": True}


def test_no_more_is_under_way_than_a_window_and_all_of_it_arrives() -> None:
    piece, count = TOLD_BYTES // 2, 60
    made, sent = 0, list[Message]()

    async def app(window: Window) -> None:
        nonlocal made
        assert await window.receive() == {"type": "http.request", "body": b"{}", "more_body": False}
        for _ in range(count):
            await window.send(body(piece))
            made += 1

    async def main() -> None:
        read = asyncio.Semaphore(0)
        running = asyncio.create_task(drive(app, read, sent, 5.0))
        for taken in range(count):
            await _settle()
            under_way = (made - len(sent)) * piece
            assert under_way <= WINDOW + TOLD_BYTES + 2 * piece, taken
            read.release()
        await running

    asyncio.run(main())
    assert (made, len(sent)) == (count, count)


def test_a_client_that_reads_nothing_is_cut_off_and_its_request_cancelled() -> None:
    async def app(window: Window) -> str:
        await window.receive()
        gone = asyncio.create_task(window.receive())
        while not gone.done():
            await window.send(body(TOLD_BYTES))
            await asyncio.sleep(0)
        return str(gone.result()["type"])

    async def main() -> bool:
        async with asyncio.timeout(10):
            exchange = await drive(app, asyncio.Semaphore(3), [], 0.05)
        return exchange.cut_off

    assert asyncio.run(main())


def test_a_client_that_leaves_is_told_to_the_application() -> None:
    async def main() -> list[str]:
        messages = [{"type": "http.disconnect"}]

        async def receive() -> Message:
            await asyncio.sleep(0.01)
            return messages[0]

        exchange = Exchange(receive, keep([]), b"{}", 1.0)
        async with asyncio.timeout(5), Window(exchange.receive, keep([])) as window:
            found = [(await window.receive())["type"] for _ in range(3)]
            for _ in range(10):
                await window.send(body(WINDOW))  # to one that has left everything can be sent
        await exchange.close()
        return found

    assert asyncio.run(main()) == ["http.request", "http.disconnect", "http.disconnect"]


def test_small_answers_need_no_word_on_what_was_read() -> None:
    async def main() -> bool:
        exchange = Exchange(never, keep([]), None, 1.0)
        await exchange.send(body(TOLD_BYTES - 1))
        telling = asyncio.create_task(exchange.receive())
        await _settle()
        quiet = not telling.done()
        await exchange.send(body(1))
        assert await telling == {"type": READ, "bytes": TOLD_BYTES}
        await exchange.close()
        return quiet

    assert asyncio.run(main())


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)
