"""What the flags of scripts/simulate ask for; wrong ones are named before anything runs."""

import argparse
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

from loraserve.cost.profile import SHIPPED, Profile, read_profile
from loraserve.errors import ConfigError
from loraserve.sim.cluster import SimSettings
from loraserve.sim.compare import OURS
from loraserve.sim.points import Job, Source, TraceSource
from loraserve.sim.policies import NAMES, policy_named
from loraserve.sim.report import TOPPINGS
from loraserve.sim.synthetic import LENGTHS, RANK_MIXES, Shape

LEAST_RPS = 0.01
LEAST_REQUESTS = 10


def job_of(arguments: argparse.Namespace) -> Job:
    """What is asked for, at no load yet. Raises ConfigError naming the flag."""
    return Job(
        source=_source(arguments),
        policy=OURS,
        engines=arguments.engines,
        rps=arguments.rps,
        profile=_profile(arguments),
        settings=SimSettings(
            slo_ttft_s=arguments.slo_s,
            plan_interval_s=arguments.plan_interval_s,
            report_interval_s=arguments.report_interval_s,
            seed=arguments.seed,
        ),
        duration_s=arguments.seconds,
    )


def policies_of(arguments: argparse.Namespace) -> list[str]:
    """Raises ConfigError naming those that there are."""
    several = arguments.compare or arguments.grid or arguments.sensitivity or arguments.loads
    names = [n for n in arguments.policies.split(",") if n] or (list(NAMES) if several else [OURS])
    return [policy_named(name).name for name in dict.fromkeys(names)]


def loads_of(arguments: argparse.Namespace) -> list[float]:
    """Raises ConfigError where one is no load."""
    try:
        loads = [float(text) for text in arguments.loads.split(",")] if arguments.loads else []
    except ValueError as error:
        raise ConfigError(f"--loads {arguments.loads}: {error}; write requests/s, such as 10,20,30") from error
    if not all(isfinite(rps) and rps >= LEAST_RPS for rps in loads):
        raise ConfigError(f"--loads {arguments.loads}: requests/s, finite and at least {LEAST_RPS}")
    return loads


def check(arguments: argparse.Namespace, names: list[str]) -> None:
    """Raises ConfigError naming the flag that cannot be, before any time is spent."""
    for flag, least in (("engines", 1), ("adapters", 1), ("draws", 1), ("workers", 0)):
        if getattr(arguments, flag) < least:
            raise ConfigError(f"--{flag} {getattr(arguments, flag)}: at least {least} is needed")
    for flag in ("slo_s", "plan_interval_s", "report_interval_s", "seconds"):
        value = getattr(arguments, flag)
        if not (isfinite(value) and value > 0):
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: seconds, finite and more than 0")
    if arguments.rps and not (isfinite(arguments.rps) and arguments.rps >= LEAST_RPS):
        raise ConfigError(f"--rps {arguments.rps}: requests/s, finite and at least {LEAST_RPS}")
    if arguments.requests and arguments.requests < LEAST_REQUESTS:
        raise ConfigError(f"--requests {arguments.requests}: at least {LEAST_REQUESTS}, or none for --seconds of them")
    loads_of(arguments)
    needed = {OURS, TOPPINGS} if arguments.grid else {OURS} if arguments.sensitivity else set()
    if needed - set(names):
        raise ConfigError(f"--policies {arguments.policies}: this compares with {', '.join(sorted(needed))}; add them")
    if arguments.out:
        _make_folder(Path(arguments.out))


def _make_folder(folder: Path) -> None:
    if find_spec("matplotlib") is None:
        raise ConfigError("--out draws with matplotlib, which is not installed; install the extra 'sim'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}; name a folder that can be written to") from error


def _profile(arguments: argparse.Namespace) -> Profile:
    """The profile with the kind of LoRA cost that was asked for. Derived ones are shipped for both."""
    name: str = arguments.profile
    padded = name.removesuffix("-padded") + "-padded"
    if arguments.cost == "padded" and (SHIPPED / f"{padded}.json").exists():
        name = padded
    profile = read_profile(name)
    if profile.cost.lora != arguments.cost:
        raise ConfigError(
            f"profile {name} has {profile.cost.lora} LoRA cost, --cost says {arguments.cost}; "
            f"take another profile, or measure one with scripts/profile --lora {arguments.cost}"
        )
    return profile


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.trace:
        return TraceSource(
            path=arguments.trace, adapters=arguments.adapters, requests=arguments.requests, seed=arguments.seed
        )
    for flag, known in (("ranks", RANK_MIXES), ("lengths", LENGTHS)):
        if getattr(arguments, flag) not in known:
            raise ConfigError(f"--{flag} {getattr(arguments, flag)}: there are {', '.join(known)}")
    return Shape(
        ranks=arguments.ranks,
        arrivals=arguments.arrivals,
        drift=arguments.drift,
        lengths=arguments.lengths,
        adapters=arguments.adapters,
        requests=arguments.requests,
        seed=arguments.seed,
    )
