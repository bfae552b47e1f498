"""Randomized smoothing: sample a model under noise, certify what the noisy majority predicts."""

from jaxcert.smoothing.certify import SmoothingPlan as SmoothingPlan
from jaxcert.smoothing.certify import certify as certify
from jaxcert.smoothing.certify import predict as predict
from jaxcert.smoothing.confidence import clopper_pearson_lower as clopper_pearson_lower
from jaxcert.smoothing.noise import Gaussian as Gaussian
from jaxcert.smoothing.noise import Noise as Noise
