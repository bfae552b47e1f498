"""Bounds on a model's outputs over a set of inputs, as function transforms."""

from jaxcert.bounds.certify import certified_radius as certified_radius
from jaxcert.bounds.certify import certify as certify
from jaxcert.bounds.forward import forward_linear as forward_linear
from jaxcert.bounds.interval import ibp as ibp
from jaxcert.bounds.interval import register as register
from jaxcert.bounds.linear import LinearBounds as LinearBounds
from jaxcert.bounds.linear import crown as crown
from jaxcert.bounds.linear import crown_ibp as crown_ibp
from jaxcert.bounds.linear import hidden_bounds as hidden_bounds
from jaxcert.bounds.linear import linear_bounds as linear_bounds
from jaxcert.bounds.slopes import alpha_crown as alpha_crown
from jaxcert.bounds.transform import Bound as Bound
from jaxcert.bounds.transform import Method as Method
