"""Noise distributions, and the radius each one proves."""

from jaxcert.smoothing.noise.base import Additive as Additive
from jaxcert.smoothing.noise.base import Noise as Noise
from jaxcert.smoothing.noise.base import no_contraction as no_contraction
from jaxcert.smoothing.noise.cubes import ExpInf as ExpInf
from jaxcert.smoothing.noise.cubes import PowInf as PowInf
from jaxcert.smoothing.noise.discrete import Ablation as Ablation
from jaxcert.smoothing.noise.discrete import BitFlip as BitFlip
from jaxcert.smoothing.noise.discrete import Splitting as Splitting
from jaxcert.smoothing.noise.gaussian import AnisotropicGaussian as AnisotropicGaussian
from jaxcert.smoothing.noise.gaussian import Ellipsoid as Ellipsoid
from jaxcert.smoothing.noise.gaussian import Gaussian as Gaussian
from jaxcert.smoothing.noise.grid import GridGaussian as GridGaussian
from jaxcert.smoothing.noise.laplace import Laplace as Laplace
from jaxcert.smoothing.noise.uniform import Uniform as Uniform
from jaxcert.smoothing.noise.uniform import UniformBall as UniformBall
