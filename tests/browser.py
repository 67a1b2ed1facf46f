"""A headless Chromium that does what a test says, through the DevTools protocol over two pipes: a
command and its answer are JSON that ends in a zero byte. Needs nothing but Python and a browser."""
import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "Home": 36, "End": 35, "PageUp": 33, "PageDown": 34,
        "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def find():
    """The path of a browser, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """with Browser(path, folder, 1280, 800) as b: b.open(file); b.key("Tab"); b.js("1 + 1")"""

    def __init__(self, path, folder, width, height):
        (from_us, to_browser), (from_browser, to_us) = os.pipe(), os.pipe()
        # It reads from file 3 and writes to file 4, whatever numbers the pipes have here.
        os.set_inheritable(from_us, True), os.set_inheritable(to_us, True)
        self.process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" 3<&{from_us} 4>&{to_us}', "sh", path, "--headless=new",
             "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--remote-debugging-pipe", f"--user-data-dir={folder}/profile", "about:blank"],
            close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
        os.close(from_us), os.close(to_us)
        self.to, self.source = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self.last, self.rest, self.session, self.errors, self.requests = 0, b"", None, [], []
        try:
            self.attach(width, height)
        except BaseException:
            self.__exit__()
            raise

    def attach(self, width, height):
        """Takes over the browser's one page."""
        page = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page["targetId"],
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(domain + ".enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.to.close()
        self.source.close()

    def receive(self):
        """The next message. Keeps what the page complains about, and what it asks the network."""
        while b"\0" not in self.rest:
            if not select.select([self.source], [], [], 60)[0]:
                raise RuntimeError("the browser does not answer")
            more = os.read(self.source.fileno(), 1 << 20)
            if not more:
                raise RuntimeError("the browser has gone")
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(line)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message

    def send(self, method, **params):
        """A command; returns its result."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while True:
            answer = self.receive()
            if answer.get("id") == self.last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def open(self, path, fragment=""):
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url="file://" + os.path.abspath(path) + fragment)
        for _ in range(200):
            if self.js("document.readyState == 'complete' && location.protocol == 'file:'"):
                return
            time.sleep(0.05)
        raise RuntimeError(f"{path} does not load")

    def js(self, expression):
        """The value of an expression, once the page has drawn what it has to."""
        answer = self.send("Runtime.evaluate", awaitPromise=True, returnByValue=True, expression=
                           "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))"
                           f".then(() => ({expression}))")
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def key(self, name, shift=False):
        code = KEYS.get(name, ord(name[0].upper()))
        for kind in ("keyDown", "keyUp"):
            more = {"text": "\r"} if name == "Enter" and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name,
                      windowsVirtualKeyCode=code, modifiers=8 * shift, **more)

    def mouse(self, x, y, click=True):
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def click(self, selector):
        """The middle of an element, brought into sight."""
        x, y = self.js(f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
                       "e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect();"
                       "return [r.left + r.width / 2, r.top + r.height / 2]; })()")
        self.mouse(x, y)

    def dark(self, on):
        self.send("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if on else "light"}])

    def screenshot(self, path):
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        with open(path, "wb") as f:
            f.write(base64.b64decode(shot["data"]))
