"""Bounds on a model's outputs over a set of inputs, as function transforms."""

from jaxcert.bounds.certify import certify as certify
from jaxcert.bounds.interval import Bound as Bound
from jaxcert.bounds.interval import Method as Method
from jaxcert.bounds.interval import ibp as ibp
from jaxcert.bounds.interval import register as register
