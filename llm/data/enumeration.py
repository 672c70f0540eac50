"""SMILES enumeration: a molecule written from another atom on, as `augment: enumerate_smiles` at a source asks for.

Source: Bjerrum, "SMILES Enumeration as Data Augmentation for Neural Network Modeling of Molecules" (2017). It needs
RDKit, of the extra `chem`.
"""

import importlib.metadata
import importlib.util
from functools import cache
from typing import Any

import numpy as np

from llm.data.augment import Augmentation, register
from llm.errors import UserError

WITHOUT = "needs RDKit, which is not installed; `pip install rdkit` brings it, or `make chem`"


class SmilesEnumeration(Augmentation):
    """A random one of the ways to write a molecule; a text that RDKit cannot read is left as it is."""

    name = "enumerate_smiles"

    @property
    def fingerprint(self) -> object:  # type: ignore[override]
        """Its releases may write the same draw in different ways."""
        return importlib.metadata.version("rdkit")

    def check(self) -> None:
        if importlib.util.find_spec("rdkit") is None:
            raise UserError(f"augment={self.name} {WITHOUT}")

    def written(self, text: str, draw: np.random.Generator) -> str:
        seed = int(draw.integers(1, 1 << 31))
        chem = _rdkit()
        molecule = chem.MolFromSmiles(text)
        if molecule is None or not molecule.GetNumAtoms():
            return text
        # its own generator, not the process-wide one that doRandom=True draws from: the same whoever drew before
        (written,) = chem.MolToRandomSmilesVect(molecule, 1, randomSeed=seed)
        return str(written)


@cache
def _rdkit() -> Any:
    """rdkit.Chem, which no longer prints what is wrong with a text. UserError where it is not installed."""
    try:
        from rdkit import Chem, RDLogger
    except ImportError:
        raise UserError(f"augment={SmilesEnumeration.name} {WITHOUT}") from None
    RDLogger.DisableLog("rdApp.*")
    return Chem


register(SmilesEnumeration())
