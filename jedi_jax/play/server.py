"""The server of the page: Starlette and uvicorn, on 127.0.0.1, for one player at a time."""

from __future__ import annotations

import contextlib
import importlib
import importlib.resources
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from jedi_jax.errors import UserError
from jedi_jax.play.session import MAX_MESSAGE, Session

if TYPE_CHECKING:
  from anyio import CancelScope
  from starlette.applications import Starlette
  from starlette.requests import HTTPConnection, Request
  from starlette.responses import Response
  from starlette.websockets import WebSocket
  from uvicorn import Config

T = TypeVar("T")

HOSTS = ("127.0.0.1", "localhost")
"""Hosts that a request may name. A page elsewhere whose name is made to point here has another one."""
TAKEN, MALFORMED, NO_TEXT, TOO_LONG = 4409, 1008, 1003, 1009
"""Codes with which a connection is closed: another page plays; the message is wrong, is not text, or is too long."""
_HANDOVER = 1.0
"""Seconds that a connection waits for the one before it to be taken down, as after a reload of the page."""
_INSTALL = "playing in the browser needs Starlette, uvicorn and websockets"


def check_installed() -> None:
  """Checks that the libraries of the server are installed.

  Raises:
    UserError: one of them is not.
  """
  try:
    for library in ("starlette.applications", "uvicorn", "websockets"):
      importlib.import_module(library)
  except ImportError as error:
    raise UserError(f"{_INSTALL} ({error}): pip install 'jedi_jax[play]'") from None


def listen(port: int) -> socket.socket:
  """Returns a socket that listens on a port of 127.0.0.1, 0 for a free one.

  Raises:
    UserError: the port is in use or not permitted.
  """
  try:
    return socket.create_server((HOSTS[0], port))
  except (OSError, OverflowError) as error:
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
    raise UserError(f"--port={port} cannot be opened ({reason}): take another, or --port=0 for a free one") from None


def address(listener: socket.socket, token: str) -> str:
  """Returns the address of the page."""
  return f"http://{HOSTS[0]}:{listener.getsockname()[1]}/{token}/"


def serve(session: Session, listener: socket.socket, token: str) -> None:
  """Serves the page of a session until Ctrl-C or SIGTERM.

  Args:
    session: the session; closed at the end.
    listener: from `listen`.
    token: secret part of the address.
  """
  import uvicorn

  with contextlib.closing(session), contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after Ctrl-C.
    uvicorn.Server(config(make_app(session, token))).run(sockets=[listener])


def config(app: Starlette) -> Config:
  """Returns the settings of uvicorn: bounded messages, and no waiting for a player who has gone."""
  import uvicorn

  return uvicorn.Config(
    app,
    log_level="warning",
    access_log=False,
    server_header=False,
    ws_max_size=MAX_MESSAGE,
    ws_ping_interval=10.0,  # A connection that is lost without a word is found after 20 seconds.
    ws_ping_timeout=10.0,
    ws_per_message_deflate=False,
    timeout_graceful_shutdown=2,
  )


def make_app(session: Session, token: str) -> Starlette:
  """Builds the application: the page, its websocket and the recorded GIF, below the path of the token.

  Requests with another token get status 403, those for another host 400. A second player is refused with the close code
  `TAKEN`.
  """
  from starlette.applications import Starlette
  from starlette.middleware import Middleware
  from starlette.middleware.trustedhost import TrustedHostMiddleware
  from starlette.routing import Route, WebSocketRoute

  server = _Server(session, token)
  return Starlette(
    routes=[
      Route("/{token}/", server.page),
      Route("/{token}/dream.gif", server.gif),
      WebSocketRoute("/{token}/play", server.play),
      Route("/{path:path}", server.refuse),
    ],
    middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)],
  )


class _Server:
  """The handlers of the application. The session is called by one thread at a time, which is not the server's."""

  def __init__(self, session: Session, token: str):
    import anyio

    self._session, self._token = session, token
    self._page = (importlib.resources.files("jedi_jax.play") / "page.html").read_text(encoding="utf-8")
    self._one = anyio.CapacityLimiter(1)
    self._turn = anyio.Lock()
    self._gif = b""

  def _knows(self, connection: HTTPConnection) -> bool:
    given = str(connection.path_params.get("token", ""))
    return secrets.compare_digest(given.encode(), self._token.encode())

  async def refuse(self, request: Request) -> Response:
    from starlette.responses import PlainTextResponse

    if self._knows(request) or request.url.path.startswith(f"/{self._token}/"):
      return PlainTextResponse("There is no such page.", 404)
    return PlainTextResponse("The token is wrong: open the address that the program printed.", 403)

  async def page(self, request: Request) -> Response:
    from starlette.responses import HTMLResponse

    if not self._knows(request):
      return await self.refuse(request)
    nonce = secrets.token_urlsafe()
    allowed = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:"
    headers = {
      "Content-Security-Policy": f"default-src 'none'; {allowed}; base-uri 'none'; frame-ancestors 'none'",
      "Cache-Control": "no-store",
      "Referrer-Policy": "no-referrer",
      "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(self._page.replace("{{nonce}}", nonce), headers=headers)

  async def gif(self, request: Request) -> Response:
    from starlette.responses import PlainTextResponse, Response

    if not self._knows(request):
      return await self.refuse(request)
    if not self._gif:
      return PlainTextResponse("Nothing is recorded yet.", 404)
    headers = {"Content-Disposition": 'attachment; filename="dream.gif"', "Cache-Control": "no-store"}
    return Response(self._gif, media_type="image/gif", headers=headers)

  async def play(self, websocket: WebSocket) -> None:
    import anyio

    origin, host = websocket.headers.get("origin"), websocket.headers.get("host")
    if not self._knows(websocket) or (origin is not None and origin != f"http://{host}"):
      await websocket.close()  # Before it is accepted: status 403.
      return
    await websocket.accept()
    with anyio.move_on_after(_HANDOVER):
      await self._turn.acquire()
    if self._turn.statistics().owner != anyio.get_current_task():
      await websocket.close(TAKEN, "another page plays this dream")
      return
    try:
      async with anyio.create_task_group() as group:
        for work in (self._read, self._run):
          group.start_soon(self._until_lost, work, websocket, group.cancel_scope)
    finally:
      self._session.release()
      self._turn.release()

  async def _until_lost(
    self, work: Callable[[WebSocket], Awaitable[None]], websocket: WebSocket, scope: CancelScope
  ) -> None:
    """Does a part of the work of a connection; its end ends the other part."""
    from starlette.websockets import WebSocketDisconnect, WebSocketState

    try:
      await work(websocket)
    except WebSocketDisconnect:
      pass
    except RuntimeError:  # Starlette's, for a message after `close`.
      if websocket.application_state is WebSocketState.CONNECTED:
        raise
    finally:
      scope.cancel()

  async def _read(self, websocket: WebSocket) -> None:
    """Carries out the messages of the page, one after another; returns at the end of the connection."""
    await websocket.send_json(await self._call(self._session.description))
    await websocket.send_bytes(await self._call(self._session.picture))
    while True:
      message = await websocket.receive()
      if message["type"] == "websocket.disconnect":
        return
      text = message.get("text")
      if text is None:
        await websocket.close(NO_TEXT, "a message is not text")
        return
      if len(text) > MAX_MESSAGE:
        await websocket.close(TOO_LONG, f"a message has more than {MAX_MESSAGE} bytes")
        return
      try:
        work = await self._call(self._session.handle, text)
      except UserError as error:
        await websocket.close(MALFORMED, str(error).encode("ascii", "replace")[:120].decode())
        return
      if work is not None:
        await websocket.send_json({"type": "busy"})
        result = await self._call(work)
        if isinstance(result, bytes):
          self._gif = result
          await websocket.send_json({"type": "gif", "bytes": len(result)})
      await websocket.send_json(await self._call(self._session.state))
      await websocket.send_bytes(await self._call(self._session.picture))

  async def _run(self, websocket: WebSocket) -> None:
    """Takes the steps of the session in time and sends their pictures."""
    import anyio

    due = anyio.current_time()
    while True:
      paused = self._session.paused
      if await self._call(self._session.tick):
        await websocket.send_bytes(await self._call(self._session.picture))
        if self._session.paused != paused:
          await websocket.send_json(await self._call(self._session.state))
      due = max(due + self._session.interval, anyio.current_time())  # Time that was lost is not made up for.
      await anyio.sleep_until(due)

  async def _call(self, function: Callable[..., T], *args: Any) -> T:
    """Calls a method of the session, one at a time, in another thread."""
    import anyio.to_thread

    return await anyio.to_thread.run_sync(function, *args, limiter=self._one)
