"""Flax NNX layers whose Lipschitz constant is proved.

Layers are 1-Lipschitz in L2 for all values of their parameters (those of `linf.py` in Linf), and
`lipschitz.certify` and `lipschitz.constant` prove it anew from the numbers. They have no state that
goes stale, and `freeze` turns them into plain layers. In Linen use them through Flax's own bridge:
`flax.nnx.bridge.to_linen(nn.AOLDense, 8, 4)`.

    dense         AOLDense BjorckDense BRODense CayleyDense SpectralDense NormalisedDense
    convolutions  AOLConv AOCConv BjorckConv BROConv CayleyConv SpectralConv AOLConvTranspose
    blocks        SLLBlock CPLBlock SandwichDense Residual
    activations   maxmin group_sort beta_abs Householder
    pooling       l2_pool scaled_avg_pool pixel_unshuffle pixel_shuffle BatchCentering
    Linf          LinfDistDense SortDense
"""

from jaxcert.nn.activations import Householder as Householder
from jaxcert.nn.activations import beta_abs as beta_abs
from jaxcert.nn.activations import group_sort as group_sort
from jaxcert.nn.activations import maxmin as maxmin
from jaxcert.nn.freeze import freeze as freeze
from jaxcert.nn.frequency import BROConv as BROConv
from jaxcert.nn.frequency import CayleyConv as CayleyConv
from jaxcert.nn.linf import LinfDistDense as LinfDistDense
from jaxcert.nn.linf import SortDense as SortDense
from jaxcert.nn.parametrised import AOCConv as AOCConv
from jaxcert.nn.parametrised import AOLConv as AOLConv
from jaxcert.nn.parametrised import AOLConvTranspose as AOLConvTranspose
from jaxcert.nn.parametrised import AOLDense as AOLDense
from jaxcert.nn.parametrised import BjorckConv as BjorckConv
from jaxcert.nn.parametrised import BjorckDense as BjorckDense
from jaxcert.nn.parametrised import BRODense as BRODense
from jaxcert.nn.parametrised import CayleyDense as CayleyDense
from jaxcert.nn.parametrised import CircularConv as CircularConv
from jaxcert.nn.parametrised import NormalisedDense as NormalisedDense
from jaxcert.nn.parametrised import Parametrised as Parametrised
from jaxcert.nn.parametrised import SpectralConv as SpectralConv
from jaxcert.nn.parametrised import SpectralDense as SpectralDense
from jaxcert.nn.parametrised import retract as retract
from jaxcert.nn.pooling import BatchCentering as BatchCentering
from jaxcert.nn.pooling import l2_pool as l2_pool
from jaxcert.nn.pooling import pixel_shuffle as pixel_shuffle
from jaxcert.nn.pooling import pixel_unshuffle as pixel_unshuffle
from jaxcert.nn.pooling import scaled_avg_pool as scaled_avg_pool
from jaxcert.nn.residual import CPLBlock as CPLBlock
from jaxcert.nn.residual import FrozenResidual as FrozenResidual
from jaxcert.nn.residual import FrozenSandwich as FrozenSandwich
from jaxcert.nn.residual import Residual as Residual
from jaxcert.nn.residual import SandwichDense as SandwichDense
from jaxcert.nn.residual import SLLBlock as SLLBlock
