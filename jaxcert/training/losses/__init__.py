"""Losses that certifiers profit from, one per example; the caller takes the mean.

For nets with a known Lipschitz constant: `losses.offset_cross_entropy(logits, labels, ...)`,
`losses.emma(...)` and the others of `jaxcert.training.losses.lipschitz`.
"""

from jaxcert.training.losses.lipschitz import (
    certificate_regularisation as certificate_regularisation,
)
from jaxcert.training.losses.lipschitz import emma as emma
from jaxcert.training.losses.lipschitz import emma_logits as emma_logits
from jaxcert.training.losses.lipschitz import gloro as gloro
from jaxcert.training.losses.lipschitz import gloro_trades as gloro_trades
from jaxcert.training.losses.lipschitz import (
    hinge_kantorovich_rubinstein as hinge_kantorovich_rubinstein,
)
from jaxcert.training.losses.lipschitz import logit_annealing as logit_annealing
from jaxcert.training.losses.lipschitz import offset_cross_entropy as offset_cross_entropy
from jaxcert.training.losses.lipschitz import pair_constants as pair_constants
