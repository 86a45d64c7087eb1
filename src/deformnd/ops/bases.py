"""torch's convolutions, and the base classes of these and of its norms.

The bases' own names are private to torch and may change, so each is found as the base of a public
class.
"""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.conv import _ConvNd as ConvNd
    from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
    from torch.nn.modules.conv import _LazyConvXdMixin as LazyConvXdMixin
else:
    ConvNd, ConvTransposeNd = nn.Conv1d.__base__, nn.ConvTranspose1d.__base__
    LazyConvXdMixin = nn.LazyConv1d.__bases__[0]
    BatchNorm = nn.BatchNorm1d.__base__
    NormBase = BatchNorm.__base__

PLAIN = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

__all__ = ["PLAIN", "BatchNorm", "ConvNd", "ConvTransposeNd", "LazyConvXdMixin", "NormBase"]
