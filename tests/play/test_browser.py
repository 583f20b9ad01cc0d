"""The page in headless Chromium, served as the program serves it."""

# ruff: noqa: E402 - the imports below need Selenium, without which the file is skipped.

import shutil
import socket
import threading
import time

import pytest

pytestmark = pytest.mark.browser

webdriver = pytest.importorskip("selenium.webdriver")
uvicorn = pytest.importorskip("uvicorn")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
  pytest.skip("Chromium and chromedriver are not installed", allow_module_level=True)

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from jedi_jax.envs.catch import PADDLE_COLOR
from jedi_jax.play import server

TOKEN = "token"


class Served:
  """A session that is served by a thread and can be stopped and served again."""

  def __init__(self, session):
    self.session, self.port = session, 0
    self.start()

  def start(self):
    listener = server.listen(self.port)
    self.port = listener.getsockname()[1]
    self.url = server.address(listener, TOKEN)
    self._server = uvicorn.Server(server.config(server.make_app(self.session, TOKEN)))
    self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
    self._thread.start()
    self._listener = listener

  def stop(self):
    self._server.should_exit = self._server.force_exit = True
    self._thread.join()
    self._listener.close()


@pytest.fixture(scope="module")
def browser():
  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
    options.add_argument(argument)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
  yield driver
  driver.quit()


@pytest.fixture
def served(session):
  served = Served(session)
  yield served
  served.stop()


class Page:
  def __init__(self, browser, url):
    self.browser = browser
    browser.get(url)
    self.wait(lambda: self.data("connected") == "yes")

  def wait(self, condition):
    WebDriverWait(self.browser, 60, poll_frequency=0.05).until(lambda _: condition())

  def data(self, name):
    return self.browser.execute_script("return document.body.dataset[arguments[0]]", name)

  def steps(self):
    return int(self.data("steps"))

  def text(self, element):
    return self.browser.find_element(By.ID, element).text

  def press(self, key):
    ActionChains(self.browser).send_keys(key).perform()

  def click(self, element):
    self.browser.find_element(By.ID, element).click()

  def pixels(self, canvas):
    return self.browser.execute_script(
      "const c = document.getElementById(arguments[0]);"
      "return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)",
      canvas,
    )

  def paddle(self):
    """Leftmost column of the paddle in the real game."""
    pixels = self.pixels("real")
    columns = [i // 4 % 24 for i in range(0, len(pixels), 4) if tuple(pixels[i : i + 3]) == PADDLE_COLOR]
    return min(columns)


LEFT, RIGHT = "\ue012", "\ue014"


def test_the_page_loads_without_errors(browser, served):
  page = Page(browser, served.url)
  page.wait(lambda: page.text("title") == "catch")
  assert page.text("status").startswith("Paused")
  page.wait(lambda: any(page.pixels("dream")))
  assert page.pixels("dream") == page.pixels("real")
  assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_keys_move_the_paddle_and_a_pause_stands_still(browser, served):
  page = Page(browser, served.url)
  page.wait(lambda: page.steps() == 1)
  before, dreamed = page.paddle(), page.pixels("dream")
  page.press(LEFT)  # In a pause a key takes one step.
  page.wait(lambda: page.steps() == 2)
  page.wait(lambda: page.paddle() < before)
  assert page.pixels("dream") != dreamed
  time.sleep(0.3)
  assert page.steps() == 2
  page.press("n")  # A step without an action.
  page.wait(lambda: page.steps() == 3)
  assert page.paddle() < before


def test_the_curve_grows_while_time_goes_on(browser, served):
  page = Page(browser, served.url)
  curve = "return document.getElementById('value-curve').toDataURL()"
  before = browser.execute_script(curve)
  page.click("pause")
  page.wait(lambda: page.steps() > 6)
  assert page.text("status").startswith("You play")
  page.click("pause")
  page.wait(lambda: page.text("status").startswith("Paused"))
  assert browser.execute_script(curve) != before


def test_a_recording_is_offered(browser, served):
  page = Page(browser, served.url)
  page.click("record")
  page.wait(lambda: "1 frames" in page.text("record"))
  page.press("n")
  page.wait(lambda: "2 frames" in page.text("record"))
  page.click("record")
  page.wait(lambda: "KiB" in page.text("gif"))


def test_settings_are_sent(browser, served, session):
  page = Page(browser, served.url)
  page.click("policy")
  page.wait(lambda: session.state()["settings"]["policy"])
  box = browser.find_element(By.ID, "lead")
  box.clear()
  box.send_keys("4\n")
  page.wait(lambda: session.state()["settings"]["lead"] == 4)


def test_a_lost_connection_comes_back_and_the_dream_goes_on(browser, served):
  page = Page(browser, served.url)
  page.press(LEFT)
  page.wait(lambda: page.steps() == 2)
  served.stop()
  page.wait(lambda: page.data("connected") == "")
  assert "lost" in page.text("status") or "closed" in page.text("status")
  served.start()
  page.wait(lambda: page.data("connected") == "yes")
  assert page.steps() == 2
  page.press("n")
  page.wait(lambda: page.steps() == 3)


def test_a_second_page_is_told_and_takes_over_later(browser, served):
  page = Page(browser, served.url)
  first = browser.current_window_handle
  browser.switch_to.new_window("tab")
  browser.get(served.url)
  page.wait(lambda: "Another page" in page.text("status"))
  second = browser.current_window_handle
  browser.switch_to.window(first)
  page.press("n")
  page.wait(lambda: page.steps() == 2)
  browser.close()
  browser.switch_to.window(second)
  page.wait(lambda: page.data("connected") == "yes")
  assert page.steps() == 2


def test_a_wrong_token_shows_no_page(browser, served):
  browser.get(served.url.replace(TOKEN, "wrong"))
  assert "token is wrong" in browser.find_element(By.TAG_NAME, "body").text
  with socket.create_connection(("127.0.0.1", served.port)) as raw:
    raw.sendall(b"GET /wrong/play HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    assert b"403" in raw.recv(100)
