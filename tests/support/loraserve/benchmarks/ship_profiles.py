"""Writes the derived profiles of ``loraserve/cost/profiles``: ``python -m loraserve.benchmarks.ship_profiles``."""

from pathlib import Path

from loraserve.cost.derived import derive_profile
from loraserve.cost.hardware import HARDWARE, find_efficiencies
from loraserve.cost.profile import SHIPPED, Profile, write_profile
from loraserve.model_shape import ModelShape

LLAMA_3_8B = ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256)
ON = {"a100": "a100-80gb", "h200": "h200"}


def derived_profiles() -> dict[str, Profile]:
    profiles: dict[str, Profile] = {}
    for short, name in ON.items():
        hardware = HARDWARE[name]
        efficiencies = find_efficiencies(hardware)
        exact = derive_profile(LLAMA_3_8B, hardware, efficiencies, "exact", model="Llama-3-8B")
        padded = derive_profile(LLAMA_3_8B, hardware, efficiencies, "padded", model="Llama-3-8B")
        profiles |= {f"llama-3-8b-{short}": exact, f"llama-3-8b-{short}-padded": padded}
    return profiles


def write_derived_profiles(directory: Path = SHIPPED) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, profile in derived_profiles().items():
        write_profile(profile, directory / f"{name}.json")


if __name__ == "__main__":
    write_derived_profiles()
