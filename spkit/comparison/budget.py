"""How much is run: the numbers of seeds, trials and prompts of each budget.

micro is for tests: every method, ablation and sweep once, on a backbone that has hardly learnt to
speak. quick is for a laptop: three backbones. full is what README's figures come from.
"""

from dataclasses import dataclass

from spkit.errors import SpkitError
from spkit.validation import nearest


@dataclass(frozen=True)
class Budget:
    """One budget.

    backbones, derivations, masks: how many of each, crossed (backbone seeds 0, 1, ...).
    trials: of the tuner, for every method. tune_cell, sweep_cell, test_cell: prompts of
    each group. fronts: settings of each method's front that the test pool is asked. sweep_seeds,
    size_seeds, continual_seeds: backbones of these. sizes: by name, overrides of the sandbox
    section. orders: of the continual stages. costs: so many methods have their time and memory
    measured. draws: of the bootstrap.
    """

    backbones: int
    derivations: int
    masks: int
    trials: int
    tune_cell: int
    sweep_cell: int
    test_cell: int
    fronts: int
    sweep_seeds: int
    size_seeds: int
    sizes: dict
    continual_seeds: int
    orders: int
    costs: int
    draws: int


# widths are multiples of 64, as the blocks of NF4: no block of a matrix goes over the end of a row
SIZES = {
    "1 M": {"hidden_size": 128, "heads": 4, "layers": 4, "intermediate_size": 448},
    "5 M": {"hidden_size": 256, "heads": 8, "layers": 6, "intermediate_size": 768},
}
BUDGETS = {
    "micro": Budget(
        backbones=2, derivations=1, masks=2, trials=3, tune_cell=4, sweep_cell=4, test_cell=24,
        fronts=1, sweep_seeds=1, size_seeds=1,
        sizes={"tiny": {"hidden_size": 24, "intermediate_size": 32}},
        continual_seeds=1, orders=1, costs=1, draws=50,
    ),
    "quick": Budget(
        backbones=3, derivations=1, masks=2, trials=30, tune_cell=40, sweep_cell=40, test_cell=200,
        fronts=2, sweep_seeds=1, size_seeds=1, sizes=SIZES,
        continual_seeds=1, orders=2, costs=99, draws=10_000,
    ),
    "full": Budget(
        backbones=5, derivations=2, masks=4, trials=90, tune_cell=40, sweep_cell=40, test_cell=200,
        fronts=3, sweep_seeds=2, size_seeds=1, sizes=SIZES,
        continual_seeds=1, orders=6, costs=99, draws=10_000,
    ),
}  # fmt: skip


def budget_of(name: str) -> Budget:
    """The budget of that name; SpkitError for another."""
    if name not in BUDGETS:
        raise SpkitError(f"no budget {name!r}{nearest(name, list(BUDGETS))}")
    return BUDGETS[name]
