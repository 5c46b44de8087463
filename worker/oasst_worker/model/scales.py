"""The scale of numbers that are held in 8 bits."""

import torch
from torch import Tensor

__all__ = ["int8_scales"]


def int8_scales(x: Tensor) -> Tensor:
    """[..., size] fp32 -> [..., 1]: what brings the largest of each row to 127 by division; NaN for rows not finite."""
    peaks = x.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(peaks < 1e-30, 1.0, peaks / 127)
    return torch.where(peaks.isfinite(), scales, torch.nan)
