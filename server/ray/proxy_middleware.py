"""What is ours in Ray's HTTP proxy.

Ray's request router sees a request's head and not its body, and what Ray itself answers is plain text with its own
errors in it. This middleware stands around the proxy, in its process. It reads the body, within the server's limits,
and names the request's beginnings in a header, by which ``request_router`` chooses a replica. And it sees to it that
every error has our envelope, also when a replica dies in the middle of a stream.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decoding.errors import EngineDeadError, SaccadeError
from server.app import origin_options
from server.auth import ApiKeys
from server.body_memory import BodyMemory, HeldBody
from server.cli import parse
from server.cors import OriginMiddleware
from server.errors import UnavailableError, deadline_exceeded, reply_to
from server.limits import Limits
from server.log import set_up_log
from server.middleware import REQUEST_ID, assign_id, in_time
from server.openai.json_body import read_body
from server.openai.sse import DONE, event_bytes
from server.ray.exchange import READ, Exchange
from server.ray.prefix_keys import prefix_keys
from server.ray.replica_app import ELSEWHERE, NOT, PIN, REPLICA
from server.security import Security
from server.serve_flags import KEY_VARIABLE, limits, security

HOOK, HOOK_VALUE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "server.ray.proxy_middleware:middlewares"
FLAGS = "SACCADE_PROXY"  # variable with the replicas' flags: their limits and keys hold here, too
SESSION_HEADER = "RAY_SERVE_SESSION_ID_HEADER_KEY"  # variable with the name of the header that Ray's router is told
OWN_PATHS = "/-/"  # healthz and routes, which Ray's proxy answers itself
# headers by which clients could tell Ray's proxy what to do, with - for _
_COMMANDS = {b"serve-multiplexed-model-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}

log = logging.getLogger("saccade")


def middlewares() -> list[Middleware]:
    """What Ray calls when a proxy starts, by the name in HOOK."""
    logging.basicConfig(stream=sys.stderr)
    set_up_log("text", "info")
    return chain(os.environ)


def chain(environment: Mapping[str, str]) -> list[Middleware]:
    """What stands around Ray's proxy, the outermost last.

    Raises:
        ConfigError: keys that cannot be read.
    """
    limits, security = proxy_settings(environment)
    session = environment.get(SESSION_HEADER, "x-session-id")
    # web pages may read the proxy's errors as they may the application's
    browsers = [Middleware(OriginMiddleware, **origin_options(security.cors_origins))] if security.cors_origins else []
    return [Middleware(ProxyMiddleware, limits, security, session), *browsers]


def proxy_settings(environment: Mapping[str, str]) -> tuple[Limits, Security]:
    """Limits and keys, from the variables of the proxy's process; the defaults where there are none.

    Raises:
        ConfigError: keys that cannot be read.
    """
    args = parse(["serve", *shlex.split(environment.get(FLAGS, "none"))])
    return limits(args), security(args, environment.get(KEY_VARIABLE))


class ProxyMiddleware:
    """Around Ray's proxy. Plain ASGI.

    Args:
        app: the proxy.
        session: the header by which Ray's request router is told where a request belongs.
    """

    def __init__(self, app: ASGIApp, limits: Limits, security: Security, session: str) -> None:
        self._app = app
        self._limits = limits
        self._keys = ApiKeys(security.api_keys, metrics_public=security.metrics_public)
        self._isolated = security.isolate_keys
        self._bodies = BodyMemory(limits.max_body_memory)
        self._session = session
        self._dropped = {_normal(session.encode("latin-1")), *_COMMANDS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OWN_PATHS):
            await self._app(scope, receive, send)
            return
        held = self._bodies.begin()
        reply = Reply(send, assign_id(scope), scope["path"], held.free)
        try:
            body = await self._read(scope, receive, held)
            await self._ask(scope, receive, reply, body)
            if reply.elsewhere is not None:
                headers = MutableHeaders(scope=scope)
                headers[self._session] = f"{NOT}{reply.elsewhere} {headers.get(self._session, '')}"
                reply.last = True
                await self._ask(scope, receive, reply, body)
            await reply.end(scope, receive)
        except SaccadeError as error:
            await reply.refuse(error, scope, receive)
        except ClientDisconnect:
            pass
        except Exception as error:
            log.exception("a mistake in the proxy, with request %s", assign_id(scope))
            if reply.started:
                raise
            await reply.refuse(error, scope, receive)
        finally:
            held.free()

    async def _ask(self, scope: Scope, receive: Receive, reply: Reply, body: bytes) -> None:
        exchange = Exchange(receive, reply.send, body, self._limits.write_timeout)
        try:
            await self._app(dict(scope), exchange.receive, exchange.send)
        finally:
            await exchange.close()
        if exchange.cut_off:
            log.info("a client that did not read for %g s was cut off", self._limits.write_timeout)

    async def _read(self, scope: Scope, receive: Receive, held: HeldBody) -> bytes:
        """The body of a request that has one; its head then names the text's beginnings.

        Raises:
            SaccadeError: there is no key, or the body is too large or too late.
            ClientDisconnect: the client left while sending.
        """
        scope["headers"] = [each for each in scope["headers"] if _normal(each[0]) not in self._dropped]
        scope.setdefault("extensions", {})[READ] = {}
        headers = MutableHeaders(scope=scope)
        headers[REQUEST_ID] = assign_id(scope)  # Ray would take the client's own, sane or not
        if scope["method"] != "POST":  # which no endpoint reads a body of
            if REPLICA in headers:
                headers[self._session] = PIN + headers[REPLICA]
            return b""
        key_name = self._keys.check(scope)
        request = Request(scope, in_time(receive, self._limits.body_timeout))
        body = await read_body(request, self._limits.max_body_size, held)
        keys = prefix_keys(scope["path"], body, key_name if self._isolated else "")
        MutableHeaders(scope=scope)[self._session] = " ".join(keys)  # Request has put another list in place
        return bytes(body)


class Reply:
    """What is sent in answer to one request: a replica's messages as they come, an error of ours in place of Ray's.

    Args:
        request_id: Ray adds one to that of the replica; the answer gets one.
        path: of the request; streams of different endpoints end in different ways.
        begun: called when a replica's answer begins: it has the request's body by then.

    Attributes:
        last: the next answer is the client's, whatever it is.
        elsewhere: a replica that has no engine at the moment, and did nothing.
    """

    def __init__(self, send: Send, request_id: str, path: str, begun: Callable[[], None]) -> None:
        self._send = send
        self._request_id = request_id
        self._path = path
        self._begun = begun
        self._status: int | None = None  # of an answer that is not for the client
        self.started = False
        self._streams = False
        self._complete = False
        self.last = False
        self.elsewhere: str | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            self._status = None if REPLICA in headers else message["status"]
            if ELSEWHERE in headers and not self.last:
                self.elsewhere, self._status = headers[REPLICA], message["status"]
            if self._status is not None:
                return
            del headers[ELSEWHERE]
            headers[REQUEST_ID] = self._request_id
            self.started = True
            self._begun()
            self._streams = headers.get("content-type", "").startswith("text/event-stream")
        elif self._status is not None:
            return
        else:
            self._complete = not message.get("more_body", False)
        await self._send(message)

    async def end(self, scope: Scope, receive: Receive) -> None:
        """The proxy has sent all that it had: an answer that is not whole gets an error."""
        if not self.started:
            await self.refuse(_error(self._status), scope, receive)
        elif self._streams and not self._complete:
            body = error_events(self._path, EngineDeadError("the replica died"))
            await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def refuse(self, error: Exception, scope: Scope, receive: Receive) -> None:
        """Answer with an error."""

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = self._request_id
            await self._send(message)

        await reply_to(error).response()(scope, receive, send)


def error_events(path: str, error: Exception) -> bytes:
    """The end of a stream of this endpoint that an error has cut."""
    body = reply_to(error).body()
    if path != "/v1/responses":
        return event_bytes(body) + DONE
    told = {name: body["error"][name] for name in ("code", "message", "param")}
    return b"event: error\n" + event_bytes({"type": "error", **told, **body})


def _normal(name: bytes) -> bytes:
    return name.lower().replace(b"_", b"-")


def _error(status: int | None) -> SaccadeError:
    """In place of what Ray answered by itself."""
    if status in (404, 503):  # no application yet; no replica, or too many requests that wait for one
        return UnavailableError("No replica can take the request now; try again in a moment.")
    if status == 408:  # Ray's request_timeout_s
        return deadline_exceeded()
    return EngineDeadError("the replica died")
