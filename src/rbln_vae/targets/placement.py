"""Which target and which devices a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterable

from ..config import RBLNModelConfig, reject_unknown
from .base import Target, all_targets, default_target, get_target


def choose_target(rbln_config: RBLNModelConfig) -> Target:
    """The target that is named, or that the devices or other options imply.

    Raises:
        ValueError: The devices are of several targets.
    """
    if rbln_config.target is not None:
        return get_target(rbln_config.target)
    targets = all_targets()
    chosen = _chosen(rbln_config)
    for target in targets:
        if chosen & {*target.own_options}:
            return target
    devices = _devices(rbln_config)
    owners = {next(t.name for t in targets if t.owns(device)) for device in devices}
    if len(owners) > 1:
        raise ValueError(
            f"The devices of the parts are of several targets, {' and '.join(sorted(owners))}; a "
            "model is compiled for one."
        )
    return get_target(owners.pop()) if owners else default_target()


def check_placement(rbln_config: RBLNModelConfig, target: Target, parts: Iterable[str]) -> None:
    """Raise a `ValueError` if a target can't do what a configuration asks of it.

    Args:
        rbln_config: The configuration.
        target: The target.
        parts: The names of its parts.
    """
    name = target.name
    for device in _devices(rbln_config):
        if not target.owns(device):
            raise ValueError(
                f"device={device!r} is none of the target {name!r}, which runs on "
                f"{target.default_device()!r}. Leave device out, or compile for another target."
            )
    chosen = _chosen(rbln_config)
    for other in all_targets():
        for option in other.own_options:
            if option in chosen and option not in target.own_options:
                raise ValueError(
                    f"{option}={getattr(rbln_config, option)!r} is for target={other.name!r}, not "
                    f"for {name!r}."
                )
    known = list(parts)
    reject_unknown(rbln_config.device_map or {}, known, "compiled part in device_map", ValueError)
    if isinstance(rbln_config.dtype, dict):
        reject_unknown(rbln_config.dtype, known, "compiled part in dtype", ValueError)


def _devices(rbln_config: RBLNModelConfig) -> list[int | str]:
    """Every device that is named, for the model or for a part."""
    own = [] if rbln_config.device is None else [rbln_config.device]
    return own + list((rbln_config.device_map or {}).values())


def _chosen(rbln_config: RBLNModelConfig) -> set[str]:
    """The options whose value is not the default."""
    options = rbln_config.options().items()
    return {name for name, option in options if getattr(rbln_config, name) != option.default}
