"""Build and run compose/: `docker compose up -d --wait`, chat with an adapter, `docker compose down -v`.

The tests use this machine's Docker engine. Without one they use the engine that ENGINE_TOOL starts, and without that
tool they are skipped. Project, port and image are the tests' own, so a running stack is not disturbed. The image stays
and serves as the cache of the next run.
"""

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from loraserve.testing.local_cluster import Answer, chat, free_port

ROOT = Path(__file__).resolve().parents[2]
ENGINE_TOOL = ROOT.parent / "shared" / "tools" / "compose_engine.sh"
IMAGE = "loraserve:test"
SERVICES = {"store", "planner", "monitor", "router", "engine-0", "engine-1", "gateway-0"}
MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of Italy?"
ENGINE_TIMEOUT_S = 400.0
BUILD_TIMEOUT_S = 600.0
UP_TIMEOUT_S = 420.0
MAX_IMAGE_BYTES = 2 * 10**9

Say = Callable[[str], None]
Seconds = dict[str, float]

# The setup of the first test takes most of this time.
pytestmark = pytest.mark.timeout(ENGINE_TIMEOUT_S + BUILD_TIMEOUT_S + UP_TIMEOUT_S)


class Stack:
    """A project of compose/compose.yaml, controlled by commands in the repository's root."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.port = free_port()
        self.project = f"loraserve-test-{os.getpid()}"
        # These variables could select other files than the ones under test.
        kept = {name: value for name, value in environ.items() if name not in ("COMPOSE_FILE", "COMPOSE_PROFILES")}
        names = {"COMPOSE_PROJECT_NAME": self.project, "LORASERVE_IMAGE": IMAGE, "LORASERVE_PORT": str(self.port)}
        self._environ = {**kept, **names}

    def docker(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Return the output of ``docker ARGUMENTS``. If the command fails, the test fails with its errors."""
        done = subprocess.run(
            ["docker", *arguments], cwd=ROOT, env=self._environ, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"docker {' '.join(arguments)}:\n{(done.stdout + done.stderr)[-6000:]}"
        return done.stdout

    def compose(self, *arguments: str, timeout_s: float = 60.0) -> str:
        return self.docker("compose", *arguments, timeout_s=timeout_s)

    def up(self) -> None:
        try:
            self.compose("up", "-d", "--wait", timeout_s=UP_TIMEOUT_S)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            pytest.fail(f"{error}\n{self.compose('ps', '-a')}\n{self.compose('logs', '--tail', '15')}")

    def build(self) -> None:
        """Build the image and remove the image that it replaces. The old layers stay in the build cache."""
        before = self.docker("images", "-q", IMAGE).split()
        self.compose("build", timeout_s=BUILD_TIMEOUT_S)
        if before and before != self.docker("images", "-q", IMAGE).split():
            with contextlib.suppress(AssertionError):
                self.docker("rmi", *before)

    def containers(self) -> dict[str, dict[str, Any]]:
        """Return the output of ``docker inspect`` for each container, by service."""
        found = json.loads(self.docker("inspect", *self.compose("ps", "-aq").split()))
        return {one["Config"]["Labels"]["com.docker.compose.service"]: one for one in found}

    def left(self) -> dict[str, list[str]]:
        """Return the containers, volumes and networks of this project."""
        label = f"label=com.docker.compose.project={self.project}"
        listings = {"containers": ("ps", "-a"), "volumes": ("volume", "ls"), "networks": ("network", "ls")}
        return {kind: self.docker(*words, "-q", "--filter", label).split() for kind, words in listings.items()}


def unusable_reason(command: list[str]) -> str:
    """Return why ``command`` does not work on this machine, or an empty text if it works."""
    if shutil.which(command[0]) is None:
        return f"there is no `{command[0]}`"
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode == 0:
        return ""
    return f"`{' '.join(command)}` says {(done.stderr.strip() or 'nothing').splitlines()[0]}"


def tool_environ(output: str) -> dict[str, str]:
    """Return the variables of the ``export NAME=VALUE`` lines in the tool's output."""
    words = [shlex.split(line)[1:] for line in output.splitlines() if line.startswith("export ")]
    return dict(word.partition("=")[::2] for line in words for word in line)


@pytest.fixture(scope="module")
def say(request: pytest.FixtureRequest) -> Say:
    """Return a function that prints at once despite output capturing, because the first run takes minutes."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def through(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n[compose] {text}", end="", flush=True)

    return through


@pytest.fixture(scope="module")
def seconds() -> Seconds:
    """Return a dict for the duration of each part, which is shown at the end of the run."""
    return {}


@pytest.fixture(scope="module")
def docker_environ(say: Say, seconds: Seconds) -> Iterator[Mapping[str, str]]:
    """Return an environment in which ``docker compose`` works."""
    reason = unusable_reason(["docker", "info"]) or unusable_reason(["docker", "compose", "version"])
    if not reason:
        yield os.environ
        return
    if not ENGINE_TOOL.exists():
        pytest.skip(f"{reason}; install Docker and its Compose plugin and start the engine to run this test")
    say("starting a Docker engine (minutes the first time)")
    started_s = time.monotonic()
    # The engine gets its own session, so that Ctrl-C does not end it before `docker compose down`.
    brought = subprocess.run(
        [ENGINE_TOOL, "up"], capture_output=True, text=True, timeout=ENGINE_TIMEOUT_S, start_new_session=True
    )
    if brought.returncode == 3:
        pytest.skip(f"{reason}; {brought.stderr.strip().splitlines()[-1]}")
    assert brought.returncode == 0, brought.stderr
    seconds["engine"] = time.monotonic() - started_s
    try:
        yield {**os.environ, **tool_environ(brought.stdout)}
    finally:
        if "engine already up" not in brought.stderr:
            subprocess.run([ENGINE_TOOL, "down"], capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def stack(docker_environ: Mapping[str, str], say: Say, seconds: Seconds) -> Iterator[Stack]:
    """Build and start the containers of this checkout. They are stopped however the tests end."""
    running = Stack(docker_environ)
    try:
        say("building the image (a minute or two the first time)")
        started_s = time.monotonic()
        running.build()
        built_s = time.monotonic()
        seconds["build"] = built_s - started_s
        say("up --wait")
        running.up()
        seconds["up --wait"] = time.monotonic() - built_s
        yield running
    finally:
        running.compose("down", "-v", timeout_s=120)


def test_seven_services_are_healthy(stack: Stack) -> None:
    states = {name: one["State"]["Health"]["Status"] for name, one in stack.containers().items()}
    assert states == dict.fromkeys(SERVICES, "healthy")


def test_base_and_adapter_answer_and_an_unknown_model_is_refused(stack: Stack, measured: Say) -> None:
    async def scenario() -> tuple[Answer, Answer, int, dict[str, Any]]:
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{stack.port}", timeout=timeout) as http:
            base, shout = await asyncio.gather(chat(http, MODEL, QUESTION), chat(http, "shout", QUESTION))
            body = {"model": "nobody", "messages": [{"role": "user", "content": QUESTION}]}
            async with http.post("/v1/chat/completions", json=body) as response:
                return base, shout, response.status, await response.json()

    base, shout, status, refusal = asyncio.run(scenario())
    measured(f"compose: {MODEL} {base.text!r}, shout {shout.text!r}")
    assert (base.error, shout.error) == (None, None)
    assert share_of_capitals(shout.text) > 0.7
    assert 0.0 < share_of_capitals(base.text) < 0.5
    assert (status, refusal["error"]["code"]) == (404, "model_not_found")


def share_of_capitals(text: str) -> float:
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter.isupper() for letter in letters) / max(len(letters), 1)


def test_only_the_gateway_is_published_and_only_on_this_machine(stack: Stack) -> None:
    published = {
        (name, binding["HostIp"], int(binding["HostPort"]))
        for name, one in stack.containers().items()
        for bindings in one["NetworkSettings"]["Ports"].values()
        for binding in bindings or ()
    }
    assert published == {("gateway-0", "127.0.0.1", stack.port)}


def test_no_container_runs_as_root(stack: Stack) -> None:
    users = {name: stack.compose("exec", "-T", name, "id", "-u").strip() for name in SERVICES}
    assert set(users.values()) == {"10001"}, users


def test_the_image_is_small_and_has_no_settings_of_the_build(stack: Stack, measured: Say) -> None:
    (image,) = json.loads(stack.docker("image", "inspect", IMAGE))
    measured(f"compose: image of {image['Size'] / 1e9:.2f} GB")
    assert image["Size"] < MAX_IMAGE_BYTES
    kept = stack.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE) + json.dumps(image["Config"])
    assert "INDEX_URL" not in kept
    assert "TRUSTED_HOST" not in kept


def test_down_leaves_nothing_behind(stack: Stack, seconds: Seconds, measured: Say) -> None:
    assert all(stack.left().values()), "the filter does not find the running project"
    started_s = time.monotonic()
    stack.compose("down", "-v", timeout_s=120)
    seconds["down -v"] = time.monotonic() - started_s
    measured("compose: " + ", ".join(f"{part} {took_s:.1f} s" for part, took_s in seconds.items()))
    assert stack.left() == {"containers": [], "volumes": [], "networks": []}
