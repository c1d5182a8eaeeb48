"""The one type that merge, dial, blame, diagnose, export and serve speak: the change a step made."""

from temperament.delta.between import as_delta, between
from temperament.delta.change import Change, Dense, Kronecker, LowRank, Sparse, Ternary
from temperament.delta.combined import Masked, Rows, Sum
from temperament.delta.delta import Addition, Delta, Lazy
from temperament.delta.golomb import CodedLowRank, Rice
from temperament.delta.hash import identity
from temperament.delta.on_weight import Multiplied, Renormalised, Replace, Transformed
from temperament.delta.peft_format import read_peft
from temperament.delta.peft_write import not_peft, write_peft
from temperament.delta.stream import Checkpoint, open_source

__all__ = [
    "Addition",
    "Change",
    "Checkpoint",
    "CodedLowRank",
    "Delta",
    "Dense",
    "Kronecker",
    "Lazy",
    "LowRank",
    "Masked",
    "Multiplied",
    "Renormalised",
    "Replace",
    "Rice",
    "Rows",
    "Sparse",
    "Sum",
    "Ternary",
    "Transformed",
    "as_delta",
    "between",
    "identity",
    "not_peft",
    "open_source",
    "read_peft",
    "write_peft",
]
