"""VICReg and VICRegL losses for PyTorch: the numbers and gradients of the eager code, many times sooner.

>>> from vicreg_fast import VICRegLoss
>>> losses = VICRegLoss()(torch.randn(256, 2048), torch.randn(256, 2048))
"""

from . import functional
from .modules import VICReg, VICRegLLoss, VICRegLoss

__version__ = "0.1.0"
__all__ = ["VICReg", "VICRegLLoss", "VICRegLoss", "__version__", "functional"]
