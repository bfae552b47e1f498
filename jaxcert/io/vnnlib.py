"""VNN-LIB: property files, read exactly.

    read(path) -> Problem, the unsafe region as a union of cases
    case.box(), case.cut_rows(), case.spec(k): what a certifier needs, rounded to the safe side
    problem.refuted_by(x, y): whether a counterexample is one, in exact arithmetic

VNN-LIB 1.0 is a subset of SMT-LIB: constants X_i and Y_j of sort Real, and assertions that are ands
and ors of linear (in)equalities (Demarchi et al., "Supporting Standardization of Neural Networks
Verification with VNN-LIB and CoCoNet", FoMLAS 2023). VNN-LIB 2.0 is read with the package `vnnlib`.
Every number is a `Fraction`; whatever is not understood raises a `VnnlibError` that says where.
"""

import gzip
import os
import pathlib
import re
import zlib
from fractions import Fraction

from jaxcert.errors import VnnlibError
from jaxcert.io import dnf, linear, sexpr, vnnlib2
from jaxcert.io.dnf import Ands, Region, Rows
from jaxcert.io.linear import ONE, Sum, Variable
from jaxcert.io.sexpr import Atom, Form, Node, Source
from jaxcert.io.unsafe import Case as Case
from jaxcert.io.unsafe import Problem as Problem
from jaxcert.io.unsafe import Row as Row
from jaxcert.io.vnncomp import Instance as Instance
from jaxcert.io.vnncomp import counterexample_text as counterexample_text
from jaxcert.io.vnncomp import decimal_text
from jaxcert.io.vnncomp import instances as instances
from jaxcert.io.vnncomp import nearest_inside as nearest_inside

_VARIABLE = re.compile(r"([XY])_(0|[1-9][0-9]{0,8})")
_FORMULA = "a formula: (and ...), (or ...) or a comparison of two terms by <=, >=, <, > or ="
_COMMAND = "a command: (declare-const X_i Real), (declare-const Y_j Real) or (assert ...)"


def read(path: str | os.PathLike[str]) -> Problem:
    """The unsafe region of a property file, `.vnnlib` or compressed `.vnnlib.gz`.

    Raises:
      VnnlibError: where the file is malformed, goes beyond what is linear in X alone or in Y alone,
        leaves an input without a bound, or contradicts itself.
    """
    path = pathlib.Path(path)
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise VnnlibError(f"{path}: expected a complete gzip file, found: {error}") from error
    return parse(content.decode("utf-8-sig", errors="replace"), str(path))


def parse(text: str, name: str = "<text>") -> Problem:
    """The unsafe region that the text of a property file describes; `name` is for messages.

    >>> problem = parse('''
    ... (declare-const X_0 Real) (declare-const Y_0 Real) (declare-const Y_1 Real)
    ... (assert (and (>= X_0 0) (<= X_0 0.1)))
    ... (assert (<= Y_0 Y_1))''')
    >>> case, = problem.cases
    >>> case.upper, case.spec(2).matrix
    ((Fraction(1, 10),), array([[ 1., -1.]]))
    >>> problem.refuted_by([0.05], [2.0, 2.0])
    True

    Raises:
      VnnlibError: as `read`.
    """
    source = Source(name, text)
    reading = _Reading(source)
    second_edition = vnnlib2.PREFIX.match(source.text)
    for form in vnnlib2.commands(source) if second_edition else sexpr.read(source):
        reading.command(form)
    return reading.problem()


class _Reading:
    """One pass over the commands of a file: what is declared and asserted so far.

    A row is known by its number in the order of appearance, so that ands of rows are small sets.
    """

    def __init__(self, source: Source):
        self.source = source
        self.declared: dict[str, Variable] = {}
        self.declared_at: dict[Variable, int] = {}
        self.asserted: list[Region] = []
        self.asserted_at = 0
        self.numbers: dict[tuple[str, Row], int] = {}
        self.rows: list[Row] = []
        self.row_at: list[int] = []

    def command(self, form: Form) -> None:
        """Obey one top-level form."""
        name, arguments = self.source.application(form, _COMMAND)
        if name == "assert":
            self.assertion(form, arguments)
        elif name == "declare-const":
            self.declaration(form, arguments)
        elif name == "declare-fun":
            for takes in arguments[1:2]:
                if not isinstance(takes, Form) or takes.items:
                    self.source.wrong(takes.at, sexpr.show(takes), "(), a function of nothing")
            self.declaration(form, arguments[:1] + arguments[2:])
        else:
            self.source.wrong(form.at, sexpr.show(form), _COMMAND)

    def declaration(self, form: Form, arguments: list[Node]) -> None:
        """Take note of a variable: its name and its sort."""
        if len(arguments) != 2:
            self.source.wrong(form.at, f"{len(arguments)} arguments", "a name and the sort Real")
        name, sort = arguments
        match = _VARIABLE.fullmatch(name.text) if isinstance(name, Atom) else None
        if match is None:
            self.source.wrong(name.at, sexpr.show(name), "a name: X_0, X_1, ... or Y_0, Y_1, ...")
        if not isinstance(sort, Atom) or sort.text != "Real":
            self.source.wrong(sort.at, f"the sort {sexpr.show(sort)}", "Real")
        variable = (match[1], int(match[2]))
        if variable in self.declared_at:
            self.source.wrong(name.at, f"{match[0]} a second time", "each name to be declared once")
        self.declared[match[0]] = variable
        self.declared_at[variable] = name.at

    def assertion(self, form: Form, arguments: list[Node]) -> None:
        """Take note of a formula that is asserted."""
        if len(arguments) != 1:
            self.source.wrong(form.at, f"assert with {len(arguments)} arguments", "one formula")
        region = self.formula(arguments[0])
        if not region:
            self.source.fail(form.at, "contradictory: this is false for every input and output")
        self.asserted.append(region)
        self.asserted_at = form.at

    def formula(self, node: Node) -> Region:
        """A formula in disjunctive normal form."""
        operator, arguments = self.source.application(node, _FORMULA)
        if operator in ("and", "or"):
            if not arguments:
                self.source.wrong(node.at, f"an empty {operator}", "at least one formula in it")
            parts = [self.formula(argument) for argument in arguments]
            return self.all_of(parts, node.at) if operator == "and" else dnf.any_of(parts)
        if operator not in ("<=", ">=", "<", ">", "="):
            self.source.wrong(node.at, sexpr.show(node), _FORMULA)
        if len(arguments) != 2:
            self.source.wrong(node.at, f"{operator} of {len(arguments)} terms", _FORMULA)
        left, right = arguments
        if operator == "=":
            pair = [self.at_most(left, right, False, node), self.at_most(right, left, False, node)]
            return self.all_of(pair, node.at)
        if operator[0] == ">":
            left, right = right, left
        return self.at_most(left, right, "=" not in operator, node)

    def at_most(self, left: Node, right: Node, strict: bool, node: Node) -> Region:
        """The comparison left <= right, or left < right, as a region of one row."""
        total: Sum = {}
        linear.add(left, Fraction(1), total, self.declared, self.source)
        linear.add(right, Fraction(-1), total, self.declared, self.source)
        constant = total.pop(ONE, Fraction(0))
        kinds = {kind for (kind, _), a in total.items() if a}
        if not kinds:
            holds = constant < 0 or (constant == 0 and not strict)
            return dnf.EVERYTHING if holds else dnf.NOTHING
        if len(kinds) == 2:
            found = "inputs X and outputs Y in one comparison"
            self.source.wrong(node.at, found, "comparisons of inputs alone or of outputs alone")
        row = Row.scaled({index: a for (_, index), a in total.items()}, constant, strict)
        kind = kinds.pop()
        number = self.numbers.setdefault((kind, row), len(self.rows))
        if number == len(self.rows):
            self.rows.append(row)
            self.row_at.append(node.at)
        return dnf.on_inputs(number) if kind == "X" else dnf.on_outputs(number)

    def all_of(self, parts: list[Region], at: int) -> Region:
        """The and of regions; a product too long to write down is an error at `at`."""
        try:
            return dnf.all_of(parts)
        except dnf.TooManyRows as error:
            self.source.fail(at, str(error))

    def problem(self) -> Problem:
        """The problem that the commands make up."""
        inputs, outputs = self.count("X"), self.count("Y")
        if not self.asserted:
            self.source.wrong(len(self.source.text), "no assertion", "(assert ...)")
        unsafe: dict[Rows, Ands] = {}
        for rows, ands in self.all_of(self.asserted, self.asserted_at).items():
            unsafe.setdefault(self.tightest(rows), {}).update(ands)
        contradictions = {rows: self.contradiction(rows) for rows in unsafe}
        if all(contradictions.values()):
            self.source.fail(*next(filter(None, contradictions.values())))
        cases = (
            self.case(rows, ands, inputs)
            for rows, ands in unsafe.items()
            if contradictions[rows] is None
        )
        return Problem(inputs, outputs, tuple(cases))

    def count(self, kind: str) -> int:
        """How many X or Y are declared; their numbers leave no gap."""
        at = {index: at for (k, index), at in self.declared_at.items() if k == kind}
        if not at:
            self.source.wrong(
                len(self.source.text), f"no {kind}_0", f"(declare-const {kind}_0 Real)"
            )
        missing = next(index for index in range(len(at) + 1) if index not in at)
        if missing < len(at):
            after = min(index for index in at if index > missing)
            found, expected = f"{kind}_{after}, but no {kind}_{missing}", "numbers without a gap"
            self.source.wrong(at[after], found, expected)
        return len(at)

    def tightest(self, numbers: Rows) -> Rows:
        """An and without the rows that one with the same coefficients implies."""
        best: dict[tuple[tuple[int, int], ...], int] = {}
        for number in numbers:
            row = self.rows[number]
            other = best.setdefault(row.terms, number)
            if (row.offset, row.strict) > (self.rows[other].offset, self.rows[other].strict):
                best[row.terms] = number
        return frozenset(best.values())

    def contradiction(self, numbers: Rows) -> tuple[int, str] | None:
        """Where and how bounds on one input exclude each other, or None where none do."""
        bounds = {self.rows[n].terms: n for n in sorted(numbers) if len(self.rows[n].terms) == 1}
        for ((index, sign),), number in bounds.items():
            opposite = bounds.get(((index, -1),)) if sign > 0 else None
            if opposite is not None and _exclude(self.rows[opposite], self.rows[number]):
                first, second = sorted((opposite, number))
                at = self.row_at[second]
                line = self.source.line(self.row_at[first])
                one, other = _bound_text(self.rows[second]), _bound_text(self.rows[first])
                return at, f"contradictory: {one} with {other} of line {line}"
        return None

    def case(self, numbers: Rows, ands: Ands, inputs: int) -> Case:
        """The case of an and of input rows and an or of ands of output rows."""
        rows = [self.rows[number] for number in sorted(numbers)]
        ends = {row.terms[0]: row for row in rows if len(row.terms) == 1}
        for index in range(inputs):
            for sign, name, operator in ((-1, "lower", ">="), (1, "upper", "<=")):
                if (index, sign) not in ends:
                    found = f"no {name} bound on X_{index}"
                    expected = f"(assert ({operator} X_{index} number)), or the like in every case"
                    self.source.wrong(self.declared_at["X", index], found, expected)
        tight = dict.fromkeys(map(self.tightest, ands))
        return Case(
            lower=tuple(ends[index, -1].offset for index in range(inputs)),
            upper=tuple(-ends[index, 1].offset for index in range(inputs)),
            cuts=tuple(row for row in rows if len(row.terms) > 1),
            unsafe=tuple(
                tuple(self.rows[number] for number in sorted(conjunction))
                for conjunction in ([dnf.NO_ROWS] if dnf.NO_ROWS in tight else tight)
            ),
            open_ends=tuple(row for row in rows if len(row.terms) == 1 and row.strict),
        )


def _exclude(lower: Row, upper: Row) -> bool:
    """Whether -x + l <= 0 and x - u <= 0, strict or not, have no common x."""
    gap = lower.offset + upper.offset
    return gap > 0 or (gap == 0 and (lower.strict or upper.strict))


def _bound_text(bound: Row) -> str:
    ((index, sign),) = bound.terms
    operator = ("<" if sign > 0 else ">") + ("" if bound.strict else "=")
    return f"X_{index} {operator} {decimal_text(-sign * bound.offset)}"
