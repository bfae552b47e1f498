"""Randomized smoothing: sample a model under noise, certify what the noisy majority predicts.

`certify` gives radii of classes, `certify_at` decides about given radii with few draws. Other
outputs have a `certify` of their own, with its own result: `percentile` (regression, boxes),
`center` (vectors), `segmentation`, `multilabel`, `dual` (two half images), `patches` (all windows
of an image, no noise at all); `certify_splitting` is deterministic, too.
"""

from jaxcert.smoothing import center as center
from jaxcert.smoothing import dual as dual
from jaxcert.smoothing import multilabel as multilabel
from jaxcert.smoothing import patches as patches
from jaxcert.smoothing import percentile as percentile
from jaxcert.smoothing import segmentation as segmentation
from jaxcert.smoothing.affine import AffineFirst as AffineFirst
from jaxcert.smoothing.center import CenterCertificate as CenterCertificate
from jaxcert.smoothing.center import OutputMetric as OutputMetric
from jaxcert.smoothing.certify import Votes as Votes
from jaxcert.smoothing.certify import bound as bound
from jaxcert.smoothing.certify import certify as certify
from jaxcert.smoothing.certify import count as count
from jaxcert.smoothing.certify import predict as predict
from jaxcert.smoothing.confidence import Betting as Betting
from jaxcert.smoothing.confidence import Boundaries as Boundaries
from jaxcert.smoothing.confidence import FixedSize as FixedSize
from jaxcert.smoothing.confidence import Hybrid as Hybrid
from jaxcert.smoothing.confidence import SequentialTest as SequentialTest
from jaxcert.smoothing.confidence import StagedClopperPearson as StagedClopperPearson
from jaxcert.smoothing.confidence import UnionBound as UnionBound
from jaxcert.smoothing.confidence import betting_lower as betting_lower
from jaxcert.smoothing.confidence import class_bounds as class_bounds
from jaxcert.smoothing.confidence import clopper_pearson as clopper_pearson
from jaxcert.smoothing.confidence import clopper_pearson_lower as clopper_pearson_lower
from jaxcert.smoothing.confidence import clopper_pearson_upper as clopper_pearson_upper
from jaxcert.smoothing.denoised import Denoised as Denoised
from jaxcert.smoothing.denoised import OneShotDiffusion as OneShotDiffusion
from jaxcert.smoothing.denoised import cosine_alpha_bar as cosine_alpha_bar
from jaxcert.smoothing.denoised import linear_alpha_bar as linear_alpha_bar
from jaxcert.smoothing.denoised import one_shot_diffusion as one_shot_diffusion
from jaxcert.smoothing.dual import Halves as Halves
from jaxcert.smoothing.half import in_bfloat16 as in_bfloat16
from jaxcert.smoothing.multilabel import LabelsCertificate as LabelsCertificate
from jaxcert.smoothing.noise import Ablation as Ablation
from jaxcert.smoothing.noise import Additive as Additive
from jaxcert.smoothing.noise import AnisotropicGaussian as AnisotropicGaussian
from jaxcert.smoothing.noise import BitFlip as BitFlip
from jaxcert.smoothing.noise import Ellipsoid as Ellipsoid
from jaxcert.smoothing.noise import ExpInf as ExpInf
from jaxcert.smoothing.noise import Gaussian as Gaussian
from jaxcert.smoothing.noise import GridGaussian as GridGaussian
from jaxcert.smoothing.noise import Laplace as Laplace
from jaxcert.smoothing.noise import Noise as Noise
from jaxcert.smoothing.noise import PowInf as PowInf
from jaxcert.smoothing.noise import Splitting as Splitting
from jaxcert.smoothing.noise import Uniform as Uniform
from jaxcert.smoothing.noise import UniformBall as UniformBall
from jaxcert.smoothing.patches import Patch as Patch
from jaxcert.smoothing.patches import Windows as Windows
from jaxcert.smoothing.percentile import PercentileBounds as PercentileBounds
from jaxcert.smoothing.plan import SmoothingPlan as SmoothingPlan
from jaxcert.smoothing.segmentation import SegmentationCertificate as SegmentationCertificate
from jaxcert.smoothing.sequential import Decisions as Decisions
from jaxcert.smoothing.sequential import SequentialPlan as SequentialPlan
from jaxcert.smoothing.sequential import certify_at as certify_at
from jaxcert.smoothing.splitting import certify_splitting as certify_splitting
