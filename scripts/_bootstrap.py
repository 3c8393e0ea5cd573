"""Prepares the environment of a script: finds a Python, creates .venv, installs the project into it and runs in it.

Uses only the standard library and old syntax, so that it runs, and can report the problem, with an older python3 than
the project needs.
"""

import hashlib
import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN_VENV = ROOT / ".venv"
VENV = Path(os.environ.get("LORASERVE_VENV") or str(OWN_VENV)).absolute()
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_PYTHON = (3, 11)
VENV_PACKAGES = {"pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils"}
PROGRESS_INTERVAL_S = 2.0


def say(text):
    print(text, file=sys.stderr, flush=True)


def fail(text):
    """Print one line and exit with status 1, which all scripts use for a failure."""
    say("error: " + text)
    raise SystemExit(1)


def venv_python():
    return VENV / "bin" / "python"


def venv_pip():
    """Return the file that is created last with .venv. If it is missing, the creation was interrupted."""
    return VENV / "bin" / "pip"


def run_in_venv(arguments, extras=("demo",)):
    """Install the project if needed, then replace this process by its Python."""
    ensure_installed(extras)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    os.execv(str(venv_python()), [str(venv_python()), *arguments])


def ensure_installed(extras):
    """Install the project with these extras into .venv, unless it is installed.

    Afterwards, no Python that this process starts imports modules from the user's working directory.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        _ensure_installed(extras)
    except KeyboardInterrupt:
        say("stopped; run the script again to continue the installation")
        raise SystemExit(130) from None


def _ensure_installed(extras):
    stamp = VENV / ".loraserve-install.json"
    wanted = {"inputs": _inputs_digest(), "extras": sorted(extras)}
    have = _read_stamp(stamp)
    if venv_python().exists() and have.get("inputs") == wanted["inputs"] and set(extras) <= set(have.get("extras", [])):
        return
    started_s = time.monotonic()
    _make_venv()
    wanted["extras"] = sorted(set(extras) | set(have.get("extras", [])))
    _install(wanted["extras"])
    stamp.write_text(json.dumps(wanted))
    say("[install] done in %.0f s" % (time.monotonic() - started_s))


def _inputs_digest():
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", CONSTRAINTS):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_stamp(stamp):
    try:
        return json.loads(stamp.read_text())
    except (OSError, ValueError):
        return {}


def find_python():
    """Return this interpreter if it is new enough, else the newest one on PATH."""
    if sys.version_info >= OLDEST_PYTHON:
        return sys.executable
    for minor in range(14, OLDEST_PYTHON[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    return fail(
        f"Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer is needed, this is {platform.python_version()}; "
        "install it (Debian/Ubuntu: apt install python3, macOS: brew install python@3.12) and run the script again"
    )


def _make_venv():
    """Create .venv, unless it is complete."""
    if venv_python().exists() and venv_pip().exists():
        return
    if VENV != OWN_VENV and not _may_clear():
        fail(f"LORASERVE_VENV={VENV} contains other files and no pip; choose an empty folder or a new one")
    say(f"[install] creating {VENV}")
    done = subprocess.run([find_python(), "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if done.returncode != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        output = (done.stdout + done.stderr).strip()
        if "ensurepip" in output:
            fail("Python's venv package is missing; install it (Debian/Ubuntu: apt install python3-venv)")
        reason = output.splitlines()[-1] if output else "no reason given"
        fail(f"could not create {VENV}: {reason}")


def _may_clear():
    """Return whether the user's folder is empty or contains only an incomplete venv."""
    if not VENV.exists() or not os.listdir(str(VENV)):
        return True
    packages = {path.name.split("-")[0] for path in VENV.glob("lib/python*/site-packages/*")}
    return (VENV / "pyvenv.cfg").exists() and packages <= VENV_PACKAGES


def _install(extras):
    target = f".[{','.join(extras)}]" if extras else "."
    say(f"[install] torch and {target} (a few hundred MB the first time)")
    pip = [str(venv_python()), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    _pip(pip + torch_requirement(pip))
    _pip([*pip, "-e", target])


def torch_requirement(pip):
    """Return pip arguments for torch: the CPU build if no GPU is found and the default build needs CUDA."""
    if sys.platform != "linux" or has_gpu():
        return ["torch"]
    probe = subprocess.run(
        [*pip, "--dry-run", "--no-deps", "--quiet", "--ignore-installed", "--report", "-", "torch"],
        capture_output=True,
        text=True,
    )
    try:
        metadata = json.loads(probe.stdout)["install"][0]["metadata"]
    except (ValueError, LookupError):
        return ["torch"]
    if any(name.startswith("nvidia") for name in metadata.get("requires_dist", [])):
        return [f"torch=={metadata['version']}+cpu", "--extra-index-url", TORCH_CPU_INDEX]
    return ["torch"]


def has_gpu():
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def _lines(stream):
    """Return a queue that receives the lines of a stream, then None."""
    lines = queue.Queue()

    def read():
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _pip(command):
    """Run pip and show its progress. Common failures end with a remedy."""
    process = subprocess.Popen(command, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        tail = _show(process.stdout)
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if status != 0:
        text = "\n".join(tail)
        say(text)
        if "No space left" in text:
            fail(f"the disk is full; free about 3 GB under {VENV} and run the script again")
        fail("pip failed (see above); check the network or the package index, then run the script again")


def _show(stream):
    """Show what pip is doing every two seconds until its output ends. Returns the last lines."""
    tail = []
    doing = "looking up packages"
    started_s = shown_s = time.monotonic()
    lines = _lines(stream)
    line = ""
    while line is not None:
        try:
            line = lines.get(timeout=PROGRESS_INTERVAL_S)
        except queue.Empty:
            line = ""
        words = (line or "").split()
        if words:
            tail = [*tail, line.rstrip()][-30:]
        if words and words[0] in ("Collecting", "Downloading", "Installing", "Building"):
            doing = " ".join(words)[:90]
        if time.monotonic() - shown_s >= PROGRESS_INTERVAL_S:
            shown_s = time.monotonic()
            say(f"[install] {shown_s - started_s:4.0f} s  {doing}")
    return tail
