"""Lipschitz constants: proved bounds on how fast a network changes, and the radii they prove.

    certify, constant                      of a model, by proved constants of its layers
    certify_local, local_constant          of ordinary nets, on a ball around each input
    lipsdp_bound, eclipse_bound, liplt_bound, product_bound   of ordinary nets, tighter first
    multiplier_bound, layer_matrices, fast_multipliers        the same as a term of a loss
    dense, conv                            of one linear layer
    gram_bound, gershgorin_bound           of one linear layer, cheaply
    margin_certificate                     radii from logits and a constant
    lower_bound                            what gradient ascent reaches: contradicts wrong constants

Layers built for this are in `jaxcert.nn`, their losses in `jaxcert.training.losses`.
"""

from jaxcert.lipschitz.certify import certify as certify
from jaxcert.lipschitz.certify import constant as constant
from jaxcert.lipschitz.certify import margin_certificate as margin_certificate
from jaxcert.lipschitz.cheap import gershgorin_bound as gershgorin_bound
from jaxcert.lipschitz.cheap import gram_bound as gram_bound
from jaxcert.lipschitz.constants import conv as conv
from jaxcert.lipschitz.constants import dense as dense
from jaxcert.lipschitz.estimate import eclipse_bound as eclipse_bound
from jaxcert.lipschitz.estimate import fast_multipliers as fast_multipliers
from jaxcert.lipschitz.estimate import layer_matrices as layer_matrices
from jaxcert.lipschitz.estimate import liplt_bound as liplt_bound
from jaxcert.lipschitz.estimate import lipsdp_bound as lipsdp_bound
from jaxcert.lipschitz.estimate import multiplier_bound as multiplier_bound
from jaxcert.lipschitz.estimate import product_bound as product_bound
from jaxcert.lipschitz.local import certify_local as certify_local
from jaxcert.lipschitz.local import local_constant as local_constant
from jaxcert.lipschitz.lower import lower_bound as lower_bound
