"""Faces of other packages, so that their users move by changing an import."""

from typing import Optional

from torch import Tensor


def _check_groups(
    name: str,
    argument: str,
    groups: int,
    weight: Tensor,
    offset: Optional[Tensor],  # noqa: UP045 (TorchScript)
    mask: Optional[Tensor],  # noqa: UP045
) -> None:
    """Others give the number of offset groups, which we read off: both must agree."""
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"{name}: {argument} is {groups!r}, expected an int")
    if groups < 1:
        raise ValueError(f"{name}: {argument} is {groups}, expected at least 1")
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        return  # which the function says better
    points = weight.shape[2] * weight.shape[3]
    if isinstance(offset, Tensor) and offset.dim() >= 3:
        channels = offset.shape[-3]
        if channels != groups * 2 * points:
            raise ValueError(
                f"{name}: offset has {channels} channels, expected {groups * 2 * points} "
                f"({argument} {groups} x 2 axes x {points} kernel points)"
            )
    if isinstance(mask, Tensor) and mask.dim() >= 3:
        channels = mask.shape[-3]
        if channels != groups * points:
            raise ValueError(
                f"{name}: mask has {channels} channels, expected {groups * points} "
                f"({argument} {groups} x {points} kernel points)"
            )
