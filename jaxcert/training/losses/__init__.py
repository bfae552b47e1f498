"""Losses that certifiers profit from, one per example; the caller takes the mean.

For nets with a known Lipschitz constant: `losses.offset_cross_entropy(logits, labels, ...)`,
`losses.emma(...)` and the others of `jaxcert.training.losses.lipschitz`.

For randomized smoothing, with a key, the model and its noise: `losses.consistency(key, f, x, y,
noise=...)`, `losses.smooth_adv(...)` and the others of `smoothing` and `smoothing_adversarial`.
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
from jaxcert.training.losses.smoothing import consistency as consistency
from jaxcert.training.losses.smoothing import macer as macer
from jaxcert.training.losses.smoothing import noisy_cross_entropy as noisy_cross_entropy
from jaxcert.training.losses.smoothing import stability as stability
from jaxcert.training.losses.smoothing_adversarial import cat_rs as cat_rs
from jaxcert.training.losses.smoothing_adversarial import smooth_adv as smooth_adv
from jaxcert.training.losses.smoothing_adversarial import smooth_mix as smooth_mix
from jaxcert.training.losses.smoothing_attack import Ascent as Ascent
from jaxcert.training.losses.smoothing_attack import smoothed_adversary as smoothed_adversary
