"""Timing on devices that do their work later than they are told."""

import torch


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has done what it was given, so that a clock means something."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
