"""torch's bases of its convolutions and norms, by way of the public classes below them.

Their own names are private, and need not stay.
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

__all__ = ["BatchNorm", "ConvNd", "ConvTransposeNd", "LazyConvXdMixin", "NormBase"]
