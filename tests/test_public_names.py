"""The public names, pinned: adding or removing one is a decision, made here as well."""

import types

import pytest

import jaxcert
import jaxcert.nn
import jaxcert.training

NAMES = {
    jaxcert: """
        ABSTAIN AllOf AnyOf Box Certificate DataDependent Grid JaxcertError L1Ball L2Ball LinfBall
        MixedRows NotProved Polytope ProofRejected Reason RecordMismatch Spec StatefulModel Status
        UnsupportedEquation UnsupportedOperator Verdict VnnlibError explain margins
    """,
    jaxcert.bounds: """
        Bound LinearBounds Method alpha_crown certified_radius certify crown crown_ibp
        forward_linear hidden_bounds ibp linear_bounds register
    """,
    jaxcert.exact: "Budget Distance Progress certify decide_within distance verify",
    jaxcert.smoothing: """
        Ablation Additive AffineFirst AnisotropicGaussian Betting BitFlip Boundaries
        CenterCertificate Decisions Denoised Ellipsoid ExpInf FixedSize Gaussian
        GridGaussian Halves Hybrid LabelsCertificate Laplace Noise OneShotDiffusion
        OutputMetric Patch PercentileBounds PowInf SegmentationCertificate SequentialPlan
        SequentialTest SmoothingPlan Splitting StagedClopperPearson Uniform UniformBall
        UnionBound Votes Windows betting_lower bound certify certify_at certify_splitting
        class_bounds clopper_pearson clopper_pearson_lower clopper_pearson_upper
        cosine_alpha_bar count in_bfloat16 linear_alpha_bar one_shot_diffusion predict
    """,
    jaxcert.lipschitz: """
        certify certify_local constant conv dense eclipse_bound fast_multipliers gershgorin_bound
        gram_bound layer_matrices liplt_bound lipsdp_bound local_constant lower_bound
        margin_certificate multiplier_bound product_bound
    """,
    jaxcert.nn: """
        AOCConv AOLConv AOLConvTranspose AOLDense BRODense BROConv BatchCentering BjorckConv
        BjorckDense CPLBlock CayleyConv CayleyDense CircularConv FrozenResidual FrozenSandwich
        Householder LinfDistDense NormalisedDense Parametrised Residual SLLBlock SandwichDense
        SortDense SpectralConv SpectralDense beta_abs freeze group_sort l2_pool maxmin
        pixel_shuffle pixel_unshuffle retract scaled_avg_pool
    """,
    jaxcert.training: "",
    jaxcert.training.losses: """
        Ascent cat_rs certificate_regularisation consistency emma emma_logits gloro gloro_trades
        hinge_kantorovich_rubinstein logit_annealing macer noisy_cross_entropy
        offset_cross_entropy pair_constants smooth_adv smooth_mix smoothed_adversary stability
    """,
    jaxcert.evaluate: """
        Results Row abstention_rate accuracy_interval average_certified_radius bernstein_failures
        binomial_failures certified_accuracy clean_accuracy high_probability_accuracy load merge
        plot_certified_accuracy read_cohen_log rebound row run run_smoothing show table
        write_cohen_log
    """,
}


@pytest.mark.parametrize("module", NAMES, ids=lambda m: m.__name__)
def test_public_names_are_these(module):
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(NAMES[module].split())


@pytest.mark.parametrize("module", NAMES, ids=lambda m: m.__name__)
def test_every_public_function_says_what_it_does(module):
    for name in NAMES[module].split():
        value = getattr(module, name)
        if callable(value) and getattr(value, "__module__", "").startswith("jaxcert"):
            assert value.__doc__, f"{module.__name__}.{name} has no docstring"
