"""The twelve defects of the released Loquetier, each as a small mutation of our own code and the test that it must turn red.

`old` occurs exactly once in `file`; a mutation that no longer applies fails its test, so the table cannot fall behind the code.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """Put `new` in the place of `old` in `file`, and `test` (a pytest node id) must fail. `defect` is its number in the release."""

    defect: int
    claim: str
    file: str
    old: str
    new: str
    test: str

    @property
    def id(self) -> str:
        return f"{self.defect:02d}-" + self.test.split("::")[-1].split("[")[0]


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        defect=12,
        claim="A step's duration is never negative: the clock is read in the order in which things happened.",
        file="workbench/metrics.py",
        old="PLACEHOLDER",
        new="PLACEHOLDER",
        test="tests/test_metrics.py::PLACEHOLDER",
    ),
)
