"""The protocol of the page, by Starlette's test client; no browser."""

import json
import struct

import pytest
from refusals import refused

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from jedi_jax.play import server
from jedi_jax.play.session import MAX_MESSAGE

TOKEN = "right-token"


@pytest.fixture
def client(session):
  with TestClient(server.make_app(session, TOKEN), base_url="http://127.0.0.1:8000") as client:
    yield client


def connect(client, token=TOKEN, **headers):
  return client.websocket_connect(f"/{token}/play", headers={"host": "127.0.0.1:8000", **headers})


def picture(websocket):
  data = websocket.receive_bytes()
  (length,) = struct.unpack("<I", data[:4])
  return json.loads(data[4 : 4 + length])


def ask(websocket, **message):
  """Sends a message; returns the state and the header of the picture that follow."""
  websocket.send_json(message)
  return websocket.receive_json(), picture(websocket)


def closed(websocket):
  """The code and the reason with which a connection is closed."""
  while (message := websocket.receive())["type"] != "websocket.close":
    pass
  return message["code"], message["reason"]


def test_the_page_needs_the_token(client):
  page = client.get(f"/{TOKEN}/")
  assert page.status_code == 200
  assert "<canvas" in page.text
  policy = page.headers["content-security-policy"]
  assert policy.startswith("default-src 'none'")
  assert policy.split("'nonce-")[1].split("'")[0] in page.text
  assert page.headers["cache-control"] == "no-store"
  for path in ("/", "/wrong/", "/wrong/dream.gif", "/right-toke/", "/wrong/x/y", "/%ff/"):
    assert client.get(path).status_code == 403, path
  assert client.get(f"/{TOKEN}/other").status_code == 404
  assert client.get(f"/{TOKEN}/dream.gif").status_code == 404


def test_the_page_takes_nothing_from_elsewhere(client):
  text = client.get(f"/{TOKEN}/").text
  assert "https:" not in text
  assert text.count("http:") == 0
  assert "src=" not in text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.0.1"])
def test_other_hosts_are_refused(client, host):
  assert client.get(f"/{TOKEN}/", headers={"host": host}).status_code == 400
  with pytest.raises(WebSocketDisconnect), connect(client, host=host):
    pass


def test_pages_elsewhere_cannot_connect(client):
  with pytest.raises(WebSocketDisconnect), connect(client, origin="http://evil.example"):
    pass
  with connect(client, origin="http://127.0.0.1:8000") as websocket:
    assert websocket.receive_json()["type"] == "hello"


def test_a_wrong_token_cannot_connect(client):
  with pytest.raises(WebSocketDisconnect), connect(client, "wrong"):
    pass


def test_a_player_steps(client):
  with connect(client) as websocket:
    about = websocket.receive_json()
    assert (about["type"], about["env"], about["idle"]) == ("hello", "catch", 1)
    first = picture(websocket)
    state, header = ask(websocket, do="step", action=0)
    assert (state["type"], header["action"], header["count"]) == ("state", 0, first["count"] + 1)


def test_time_goes_on_by_itself(client):
  with connect(client) as websocket:
    websocket.receive_json(), picture(websocket)
    websocket.send_json({"do": "set", "paused": False})
    counts = []
    while len(counts) < 5:
      message = websocket.receive()
      if "bytes" in message:
        (length,) = struct.unpack("<I", message["bytes"][:4])
        counts.append(json.loads(message["bytes"][4 : 4 + length])["count"])
    assert counts[-1] >= counts[0] + 3


def test_a_second_player_is_told_and_takes_nothing_away(client):
  with connect(client) as first:
    first.receive_json(), picture(first)
    with connect(client) as second:
      code, reason = closed(second)
    assert code == server.TAKEN
    assert "another page" in reason
    assert ask(first, do="step", action=1)[1]["count"] > 0


def test_a_lost_connection_comes_back_and_the_dream_goes_on(client):
  with connect(client) as websocket:
    websocket.receive_json(), picture(websocket)
    count = ask(websocket, do="step", action=0)[1]["count"]
  with connect(client) as websocket:
    assert [row["count"] for row in websocket.receive_json()["history"]][-1] == count
    assert picture(websocket)["count"] == count


@pytest.mark.parametrize(
  ("send", "code", "part"),
  [
    (lambda w: w.send_text("{"), server.MALFORMED, "not JSON"),
    (lambda w: w.send_json({"do": "step", "action": 99}), server.MALFORMED, "0 to 2"),
    (lambda w: w.send_json({"do": "é" * 30}), server.MALFORMED, "unknown message"),
    (lambda w: w.send_bytes(b"\0\1"), server.NO_TEXT, "not text"),
    (lambda w: w.send_text(" " * (MAX_MESSAGE + 1)), server.TOO_LONG, str(MAX_MESSAGE)),
  ],
)
def test_garbage_closes_the_connection_and_the_session_survives(client, send, code, part):
  with connect(client) as websocket:
    websocket.receive_json(), picture(websocket)
    send(websocket)
    got, reason = closed(websocket)
    assert got == code
    assert part in reason
    assert len(reason.encode()) <= 123  # What a closing frame holds.
  with connect(client) as websocket:
    websocket.receive_json(), picture(websocket)
    assert ask(websocket, do="step", action=1)[1]["count"] > 0


def test_a_recording_is_fetched(client):
  with connect(client) as websocket:
    websocket.receive_json(), picture(websocket)
    ask(websocket, do="record", on=True)
    ask(websocket, do="step", action=0)
    websocket.send_json({"do": "record", "on": False})
    assert websocket.receive_json() == {"type": "busy"}
    message = websocket.receive_json()
    assert message["type"] == "gif"
  answer = client.get(f"/{TOKEN}/dream.gif")
  assert answer.headers["content-type"] == "image/gif"
  assert len(answer.content) == message["bytes"]
  assert client.get("/wrong/dream.gif").status_code == 403


def test_a_port_in_use_is_refused():
  with server.listen(0) as listener:
    port = listener.getsockname()[1]
    assert listener.getsockname()[0] == "127.0.0.1"
    assert server.address(listener, TOKEN) == f"http://127.0.0.1:{port}/{TOKEN}/"
    refused(lambda: server.listen(port), str(port), "in use", "--port=0")
  refused(lambda: server.listen(70_000), "70000")


def test_missing_libraries_are_named(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
  refused(server.check_installed, "uvicorn", "pip install")
