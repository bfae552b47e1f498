"""VNN-LIB: reading agrees with evaluating the text, rounding is outward, errors have places."""

import gzip
import math
import random
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcert.errors import VnnlibError
from jaxcert.io import dnf, vnnlib
from jaxcert.specs import AllOf, AnyOf, Spec

# ---------------------------------------------------------------------------------- the oracle:
# evaluates the text of a file at a point, recursively, and shares nothing with the reader.


def forms(text):
    tokens = re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text))
    stack = [[]]
    for token in tokens:
        if token == "(":
            stack.append([])
        elif token == ")":
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    return stack[0]


def value(node, point):
    if isinstance(node, str):
        return point[node] if node in point else Fraction(node)
    head, *rest = node
    v = [value(n, point) for n in rest]
    if head == "+":
        return sum(v)
    if head == "-":
        return -v[0] if len(v) == 1 else v[0] - sum(v[1:])
    if head == "*":
        return math.prod(v)
    for divisor in v[1:]:
        v[0] = v[0] / divisor
    return v[0]


def true(node, point):
    head, *rest = node
    if head in ("and", "or"):
        return (all if head == "and" else any)(true(n, point) for n in rest)
    a, b = (value(n, point) for n in rest)
    return {"<=": a <= b, ">=": a >= b, "<": a < b, ">": a > b, "=": a == b}[head]


def unsafe(text, x, y):
    point = {f"X_{i}": v for i, v in enumerate(x)} | {f"Y_{j}": v for j, v in enumerate(y)}
    return all(true(form[1], point) for form in forms(text) if form[0] == "assert")


def holds(prop, y):
    """Whether a property holds at outputs, in exact arithmetic on its float64 arrays."""
    if isinstance(prop, Spec):
        rows = zip(np.asarray(prop.matrix), np.asarray(prop.offset), strict=True)
        return all(
            sum((Fraction(float(a)) * v for a, v in zip(row, y, strict=True)), Fraction(float(d)))
            > 0
            for row, d in rows
        )
    assert prop.parts
    return (all if isinstance(prop, AllOf) else any)(holds(part, y) for part in prop.parts)


# ---------------------------------------------------------------------- random formulas and points

CONSTANTS = ["0", "1", "-1", "+2", "0.5", "-.25", "3.", "1e-1", "-2.5E+0", "(/ 1 3)", "(- 2)"]
DYADIC = ["0", "1", "-1", "+2", "0.5", "-.25", "3.", "5e-1", "-2.5E+0", "(/ 1 4)", "(- 2)"]


def terms(kind, constants):
    constant = st.sampled_from(constants)
    variable = st.sampled_from([f"{kind}_0", f"{kind}_1"])

    def grow(term):
        some = st.lists(term, min_size=1, max_size=3).map(" ".join)
        return st.one_of(
            st.builds("({} {})".format, st.sampled_from("+-"), some),
            st.builds("(* {} {})".format, constant, term),
            st.builds("(* {} {} 2)".format, term, constant),
            st.builds("(/ {} {})".format, term, st.sampled_from(["2", "-0.5", "(- 4)"])),
        )

    return st.recursive(st.one_of(variable, variable, constant), grow, max_leaves=4)


def atoms(kind, constants):
    operators = st.sampled_from(["<=", ">=", "<", ">", "="])
    return st.builds("({} {} {})".format, operators, *[terms(kind, constants)] * 2)


def formulas(constants):
    atom = st.one_of(atoms("X", constants), atoms("Y", constants), atoms("Y", constants))

    def grow(formula):
        some = st.lists(formula, min_size=1, max_size=3).map(" ".join)
        return st.builds("({} {})".format, st.sampled_from(["and", "or"]), some)

    return st.recursive(atom, grow, max_leaves=8)


HEAD = """; two inputs, two outputs
(declare-const X_0 Real) (declare-fun X_1 () Real)
(declare-const Y_0 Real) (declare-const Y_1 Real)
"""
BOX = """(assert (and (<= X_0 2) (>= X_0 -2.0)))
(assert (>= (/ 4 2) X_1)) (assert (>= (+ X_1 2) 0))
"""


def files(constants):
    def text(parts):
        return HEAD + BOX + "\n".join(f"(assert {part})" for part in parts)

    return st.lists(formulas(constants), min_size=1, max_size=3).map(text)


GRID = [Fraction(n, 4) for n in range(-12, 13)]


def points(seed, n):
    rng = random.Random(seed)
    return [([rng.choice(GRID) for _ in range(2)], [rng.choice(GRID) for _ in range(2)])
            for _ in range(n)]  # fmt: skip


@given(files(CONSTANTS), st.integers(0, 99))
@settings(max_examples=150)
def test_the_cases_are_the_formula(text, seed):
    try:
        problem = vnnlib.parse(text)
    except VnnlibError:  # its assertions contradict each other
        assert not any(unsafe(text, x, y) for x, y in points(seed, 60))
        return
    for x, y in points(seed, 60):
        expected = unsafe(text, x, y)
        assert problem.refuted_by(x, y) == expected
        assert any(c.contains(x) and c.violated_by(y) for c in problem.cases) == expected


@given(files(CONSTANTS), st.integers(0, 99))
@settings(max_examples=60)
def test_a_proof_in_float64_excludes_what_the_file_asserts(text, seed):
    try:
        problem = vnnlib.parse(text)
    except VnnlibError:
        return
    for case in problem.cases:
        prop, (cuts, offset) = case.spec(2), case.cut_rows()
        lower, upper = case.box()
        for x, y in points(seed, 40):
            assert not (holds(prop, y) and case.violated_by(y))
            if case.contains(x):
                assert all(lower <= x)
                assert all(x <= upper)
                assert not any(
                    holds(Spec(cut[None], d[None]), x) for cut, d in zip(cuts, offset, strict=True)
                )


@given(files(DYADIC), st.integers(0, 99))
@settings(max_examples=60)
def test_where_float64_is_exact_the_spec_is_the_negated_closure(text, seed):
    closed = re.sub(r"\(([<>]) ", r"(\1= ", text)
    try:
        problem = vnnlib.parse(closed)
    except VnnlibError:
        return
    for x, y in points(seed, 40):
        inside = [case for case in problem.cases if case.contains(x)]
        assert unsafe(closed, x, y) == any(not holds(case.spec(2), y) for case in inside)


# ------------------------------------------------------------------------------- the shared files


def benchmarks(data):
    return sorted((data / "vnncomp").glob("*/instances.csv"))


def test_benchmark_files_agree_with_the_oracle(data):
    rng = random.Random(0)
    for path in benchmarks(data):
        listed = vnnlib.instances(path)
        assert len(listed) == len(path.read_text().splitlines())
        agrees_at_random_points(rng.choice(listed).property, rng)


def agrees_at_random_points(file, rng):
    text, problem = gzip.decompress(file.read_bytes()).decode(), vnnlib.read(file)
    verdicts = []
    for _ in range(6 if problem.inputs < 1000 else 2):
        case = rng.choice(problem.cases)
        x = [rng.choice((l, u, (l + u) / 2)) for l, u in zip(case.lower, case.upper, strict=True)]
        y = [Fraction(rng.randint(-9, 9)) for _ in range(problem.outputs)]
        if rng.random() < 0.3:
            x[rng.randrange(len(x))] += 1000
        verdicts.append(unsafe(text, x, y))
        assert problem.refuted_by(x, y) == verdicts[-1]
        for case in problem.cases:
            assert not (holds(case.spec(problem.outputs), y) and case.violated_by(y))


def test_acas_property_6_has_two_boxes(data):
    problem = vnnlib.read(data / "vnncomp/acasxu/vnnlib/prop_6.vnnlib.gz")
    first, second = problem.cases
    assert (problem.inputs, problem.outputs) == (5, 5)
    assert first.lower[1] == Fraction("0.11140846")
    assert second.upper[1] == -first.lower[1]
    assert first.unsafe == second.unsafe
    expected = [[1, -1, 0, 0, 0], [1, 0, -1, 0, 0], [1, 0, 0, -1, 0], [1, 0, 0, 0, -1]]
    assert np.array_equal(first.spec(5).matrix, -np.array(expected))


# ---------------------------------------------------------------------------- cases, specs, boxes


def parse(body, head=HEAD + BOX):
    return vnnlib.parse(head + body, "f.vnnlib")


def test_an_or_over_inputs_becomes_cases_that_share_their_boxes():
    problem = parse("""
    (assert (or (and (<= X_0 0) (<= Y_0 0)) (and (>= X_0 1) (<= Y_1 0)) (and (<= X_0 0) (< Y_1 5))))
    (assert (<= (+ X_0 X_1) 1))""")
    left, right = problem.cases
    assert (left.lower[0], left.upper[0]) == (-2, 0)
    assert (right.lower[0], right.upper[0]) == (1, 2)
    assert [len(left.unsafe), len(right.unsafe)] == [2, 1]
    assert left.unsafe[1] == (vnnlib.Row(((1, 1),), Fraction(-5), strict=True),)
    assert left.cuts == right.cuts == (vnnlib.Row(((0, 1), (1, 1)), Fraction(-1)),)
    matrix, offset = left.cut_rows()
    assert matrix.tolist() == [[1, 1]]
    assert offset.tolist() == [-1]


def test_duplicates_and_implied_rows_are_dropped():
    (case,) = parse("""(assert (<= (* 3 X_0) 6.0))
    (assert (or (and (<= Y_0 1) (>= 0.2 (* 0.2 Y_0))) (<= Y_0 1) (and (<= Y_0 1) (<= Y_0 7))
                (and (<= 1 0) (<= Y_1 0)) (and (<= 0 1) (<= Y_1 0))))""").cases
    assert case.unsafe == (
        (vnnlib.Row(((0, 1),), Fraction(-1)),),
        (vnnlib.Row(((1, 1),), Fraction(0)),),
    )
    (case,) = parse("(assert (and (<= Y_0 1) (< Y_0 1) (<= Y_0 1)))").cases
    assert case.unsafe == ((vnnlib.Row(((0, 1),), Fraction(-1), strict=True),),)


def test_an_impossible_branch_is_dropped():
    (case,) = parse("(assert (or (and (<= X_0 0) (>= X_0 1)) (<= X_1 0)))").cases
    assert case.upper == (2, 0)


def test_strict_bounds_are_read_closed_and_honoured_by_contains():
    text = "(assert (<= X_0 1)) (assert (< X_0 1)) (assert (<= (* 2 X_0) 2)) (assert (< Y_0 Y_1))"
    (case,) = parse(text).cases
    assert case.upper[0] == 1
    assert case.cuts == ()
    assert case.contains([0.5, 0])
    assert not case.contains([1, 0])
    assert not case.violated_by([1, 1])
    assert not holds(case.spec(2), [1, 1])


def test_no_condition_on_outputs_means_that_all_are_unsafe():
    (case,) = parse("").cases
    assert case.unsafe == ((),)
    assert case.violated_by([0, 0])
    assert not holds(case.spec(2), [0, 0])
    (case,) = parse("(assert (or (<= Y_0 0) (<= 0 0)))").cases
    assert case.unsafe == ((),)


def test_ands_of_one_row_are_stacked_and_others_are_any_of():
    (case,) = parse(
        "(assert (or (and (<= Y_0 0)) (and (<= Y_1 0) (>= Y_0 0.1)) (<= Y_1 Y_0)))"
    ).cases
    stacked, rest = case.spec(2).parts
    assert stacked.matrix.tolist() == [[1, 0], [-1, 1]]
    assert isinstance(rest, AnyOf)
    assert [part.matrix.tolist() for part in rest.parts] == [[[0, 1]], [[-1, 0]]]
    assert Fraction(float(rest.parts[1].offset[0])) <= Fraction("0.1")


def test_outputs_that_are_not_numbers_violate_nothing():
    (case,) = parse("").cases
    assert not case.violated_by([math.nan, 0])
    assert not case.violated_by([math.inf, 0])
    assert not case.contains([math.nan, 0])


def test_wrong_lengths_raise():
    problem = parse("(assert (<= Y_1 0))")
    for call in (
        lambda: problem.refuted_by([0], [0, 0]),
        lambda: problem.refuted_by([0, 0], [0]),
        lambda: problem.cases[0].spec(1),
        lambda: vnnlib.nearest_inside(problem.cases[0], [0.0]),
    ):
        with pytest.raises(ValueError, match="1"):
            call()


decimals = st.one_of(
    st.decimals(allow_nan=False, allow_infinity=False, places=12, min_value=-9, max_value=9),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.builds("{}e{}".format, st.integers(-(10**20), 10**20), st.integers(-340, 300)),
).map(str)


@given(decimals)
@settings(max_examples=200)
def test_boxes_round_outward_to_the_neighbour(text):
    head = "(declare-const X_0 Real)(declare-const Y_0 Real)"
    (case,) = vnnlib.parse(f"{head}(assert (= X_0 {text}))").cases
    (lower,), (upper,) = case.box()
    exact, tiny = Fraction(text), sys.float_info.min
    assert case.lower == case.upper == (exact,)
    assert lower <= exact <= upper
    if tiny <= abs(exact) <= sys.float_info.max:
        assert np.nextafter(lower, np.inf) > exact or lower == exact
        assert np.nextafter(upper, -np.inf) < exact or upper == exact
    for end in (lower, upper):  # XLA flushes subnormals to zero, which may lie inside
        assert end == 0 or abs(end) >= tiny


def test_numbers_beyond_float64_round_outward_too():
    head = "(declare-const X_0 Real)(declare-const Y_0 Real)"
    largest = sys.float_info.max
    for text, lower, upper in [
        ("1e400", largest, math.inf),
        ("-1e400", -math.inf, -largest),
        ("1e-400", 0, sys.float_info.min),
        ("-5e-324", -sys.float_info.min, 0),
    ]:
        (case,) = vnnlib.parse(f"{head}(assert (= X_0 {text}))").cases
        assert case.box() == (lower, upper)


def test_rows_are_scaled_to_what_float64_holds_exactly():
    (case,) = parse("(assert (<= (+ (* 0.1 Y_0) (* -0.3 Y_1)) (/ 1 30)))").cases
    spec = case.spec(2)
    assert spec.matrix.tolist() == [[1, -3]]
    assert Fraction(float(spec.offset[0])) < -Fraction(1, 3) < Fraction(float(spec.offset[0])) + 1
    (case,) = parse("(assert (<= (+ Y_0 (* 0.12345678901234567891 Y_1)) 0))").cases
    with pytest.raises(VnnlibError, match="fewer digits"):
        case.spec(2)


# ------------------------------------------------------------------------------------ forms of text


def test_line_ends_comments_compression_and_marks(tmp_path):
    text = HEAD + BOX + "(assert (or (<= Y_0 Y_1))) ; (assert (<= 1 0))"
    expected = vnnlib.parse(text)
    for number, content in enumerate([
        text.encode(),
        text.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + text.encode(),
        gzip.compress(text.encode()),
    ]):  # fmt: skip
        (tmp_path / f"{number}").write_bytes(content)
        assert vnnlib.read(tmp_path / f"{number}") == expected


def test_incomplete_gzip_is_an_error(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"(assert (<= X_0 1))" * 9)[:-9])
    with pytest.raises(VnnlibError, match=r"a\.gz: expected a complete gzip file"):
        vnnlib.read(tmp_path / "a.gz")


X = "(declare-const X_0 Real)(declare-const Y_0 Real)\n"
IN = "(assert (and (<= X_0 1)(>= X_0 0)))\n"
ERRORS = {
    "(": (1, 1, "never closed"),
    X + "(assert (<= X_0 1)\n(assert (>= X_0 0))": (2, 1, "never closed"),
    X + "  )": (2, 3, "without its"),
    "X_0": (1, 1, "outside of any form"),
    "()": (1, 1, "a command"),
    "((assert))": (1, 1, "a command"),
    "(check)": (1, 1, r"\(check\); expected a command"),
    "(declare-const X_0)": (1, 1, "a name and the sort"),
    "(declare-const X_0 Int)": (1, 20, "the sort Int; expected Real"),
    "(declare-const X_0 (Array Real))": (1, 20, "the sort"),
    "(declare-const x_0 Real)": (1, 16, "x_0; expected a name"),
    "(declare-const X_00 Real)": (1, 16, "X_00; expected a name"),
    "(declare-const (X 0) Real)": (1, 16, "expected a name"),
    "(declare-fun X_0 (Real) Real)": (1, 18, "a function of nothing"),
    "(declare-fun X_0 Real)": (1, 18, "a function of nothing"),
    X + "(declare-const X_0 Real)": (2, 16, "a second time"),
    X + "(declare-const X_2 Real)" + IN: (2, 16, "X_2, but no X_1"),
    "(declare-const Y_0 Real)(assert (<= Y_0 1))": (1, 44, "no X_0"),
    "(declare-const X_0 Real)": (1, 25, "no Y_0"),
    X: (2, 1, "no assertion"),
    X + "(assert)": (2, 1, "0 arguments"),
    X + "(assert (<= X_0 1) (<= X_0 2))": (2, 1, "2 arguments"),
    X + "(assert true)": (2, 9, "true; expected a formula"),
    X + "(assert (and))": (2, 9, "an empty and"),
    X + "(assert (not (<= X_0 1)))": (2, 9, r"\(not ...\); expected a formula"),
    X + "(assert (<= X_0))": (2, 9, "<= of 1 terms"),
    X + "(assert (<= 0 X_0 1))": (2, 9, "<= of 3 terms"),
    X + "(assert (<= X_0 Y_0))": (2, 9, "in one comparison"),
    X + "(assert (<= X_1 0))": (2, 13, "X_1, which is not declared"),
    X + "(assert (<= X_0 nan))": (2, 17, "nan"),
    X + "(assert (<= X_0 1/3))": (2, 17, "1/3"),
    X + "(assert (<= X_0 1_0))": (2, 17, "1_0"),
    X + "(assert (<= X_0 1e99999999))": (2, 17, "1e99999999"),
    X + "(assert (<= X_0 " + "1" * 5000 + "))": (2, 17, "111..."),
    X + "(assert (<= X_0 ()))": (2, 17, "a linear term"),
    X + "(assert (<= X_0 (-)))": (2, 17, "- of 0 terms"),
    X + "(assert (<= X_0 (/ 1)))": (2, 17, "/ of 1 terms"),
    X + "(assert (<= X_0 (/ 1 0)))": (2, 22, "a divisor"),
    X + "(assert (<= (/ 1 X_0) 1))": (2, 18, "a divisor"),
    X + "(assert (<= (* X_0 2 X_0) 1))": (2, 13, "a product of variables"),
    X + "(assert (<= (max X_0 2) 1))": (2, 13, r"\(max ...\)"),
    X + IN + "(assert (<= 1 0))": (3, 1, "contradictory"),
    X + IN + "(assert (and (<= Y_0 0) (or (< 0 0) (= 0 1))))": (3, 1, "contradictory"),
    X + IN + "\t(assert (<= X_0 -0.25))": (3, 10, "X_0 <= -0.25 with X_0 >= 0 of line 2"),
    X + IN + "(assert (> X_0 1))": (3, 9, "X_0 > 1 with X_0 <= 1 of line 2"),
    X + IN + "(assert (or (< X_0 0) (> X_0 (/ 4 3))))": (3, 13, "contradictory: X_0 < 0"),
    X + "(assert (<= X_0 1))": (1, 16, "no lower bound on X_0"),
    X + IN[:-2] + "\n(assert (<= Y_0 0))": (2, 1, "never closed"),
    X + "(assert (or (<= X_0 1) (= X_0 0)))": (1, 16, "no lower bound on X_0"),
    X + "(assert " + "(and " * 300 + "(<= X_0 1)" + ")" * 301: (2, 1004, "levels of nesting"),
}


@pytest.mark.parametrize("text", ERRORS, ids=lambda text: text[-30:].strip())
def test_errors_say_where(text):
    line, column, words = ERRORS[text]
    with pytest.raises(VnnlibError, match=words) as caught:
        vnnlib.parse(text.replace("\n", "\r\n"), "f.vnnlib")
    message = str(caught.value)
    assert message.startswith(f"f.vnnlib:{line}:{column}: ")
    first, shown, caret = message.split("\n")
    assert len(first) < 250
    if len(text.split("\n")[line - 1]) <= 100:
        assert shown.strip() == text.split("\n")[line - 1].strip()
        assert caret.index("^") == column + 3


def test_deep_but_permitted_nesting_fits_pythons_stack():
    deep = "(+ 0 " * 195 + "X_0" + ")" * 195
    (case,) = vnnlib.parse(X + f"(assert (= {deep} 1))").cases
    assert case.lower == (1,)


def test_an_explosion_of_ands_is_refused_before_it_happens(monkeypatch):
    monkeypatch.setattr(dnf, "MAX_ROWS", 20_000)
    many = "\n".join(f"(assert (or (<= Y_0 0) (<= Y_1 0) (<= (+ Y_0 Y_1) {i})))" for i in range(60))
    with pytest.raises(VnnlibError, match=r"^f.vnnlib:65:1: .*at most 20,000"):
        parse(many)


def test_ten_thousand_disjuncts_and_a_product_of_ors_are_fine():
    rows = " ".join(f"(and (<= Y_0 {i}) (>= Y_1 {i}))" for i in range(5000))
    (case,) = parse(f"(assert (or {rows}))").cases
    assert len(case.unsafe) == 5000
    ors = " ".join(f"(or (<= Y_0 {i}) (>= Y_1 {i}))" for i in range(10))
    (case,) = parse(f"(assert (and {ors}))").cases
    assert case.violated_by([0, 0])
    assert not case.violated_by([10, -1])
