"""Lipschitz constants: proved bounds on how fast a network changes, and the radii they prove.

Use it as `lipschitz.certify(f, x)`, `lipschitz.constant(f, input_shape)`,
`lipschitz.margin_certificate(logits, logit_constant=...)`, `lipschitz.dense(kernel)` and
`lipschitz.conv(kernel, input_shape)`.
"""

from jaxcert.lipschitz.certify import certify as certify
from jaxcert.lipschitz.certify import constant as constant
from jaxcert.lipschitz.certify import margin_certificate as margin_certificate
from jaxcert.lipschitz.constants import conv as conv
from jaxcert.lipschitz.constants import dense as dense
