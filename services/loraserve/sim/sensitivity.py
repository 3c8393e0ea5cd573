"""A derived profile with one efficiency changed at a time. Pure."""

import msgspec

from loraserve.cost.derived import derive
from loraserve.cost.hardware import HARDWARE
from loraserve.cost.profile import Profile
from loraserve.errors import ConfigError

FACTORS = (0.5, 2.0)


def changed_profiles(profile: Profile) -> dict[str, Profile]:
    """The profile itself, then each of its efficiencies halved and doubled; what would be more than all is all.

    Raises ConfigError where the profile was not derived: what was measured has no efficiencies to change.
    """
    if profile.origin != "derived":
        raise ConfigError(f"profile of {profile.model} on {profile.hardware} was measured; take a derived one")
    hardware = next((h for h in HARDWARE.values() if h.name == profile.hardware), None)
    if hardware is None:
        known = ", ".join(h.name for h in HARDWARE.values())
        raise ConfigError(f"profile of {profile.model}: there is no datasheet of {profile.hardware}, only of {known}")
    changed = {"nothing": profile}
    for name, efficiency in profile.efficiencies.items():
        for factor in FACTORS:
            value = efficiency.value * factor
            # A share of a datasheet's figure ends at all of it; rates and times do not.
            value = min(value, 1.0) if efficiency.value < 1 and not name.endswith("_s") else value
            efficiencies = {**profile.efficiencies, name: msgspec.structs.replace(efficiency, value=value)}
            label = f"{name} x {factor:g}" + (" (all)" if value == 1.0 else "")
            changed[label] = derive(profile.shape, hardware, efficiencies, profile.cost.lora, profile.model)
    return changed
