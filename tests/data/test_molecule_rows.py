"""Rows of molecules: a token that the vocabulary lacks is named with file and row, before anything is trained."""

from dataclasses import replace
from pathlib import Path

import pytest

from llm.data.labels import LabelOptions
from llm.data.opening import open_rows, prepare_rows
from llm.data.sources import SourceSpec, sides
from llm.errors import UserError
from llm.tokenizer import SmilesTokenizer, smiles_vocabulary
from tests.data.sample_helpers import asked_for

KNOWN = smiles_vocabulary([("a row", "CC(=O)Oc1ccccc1")])
COLUMNS = {"text": "smiles", "label": "y"}


@pytest.mark.parametrize("kind", ["text", "labelled"])
@pytest.mark.parametrize(
    ("molecule", "said"), [("CC[Zn]C", r"token '\[Zn\]' \(at position 2 "), ("CC!", r"character '!' .* position 2 ")]
)
def test_a_token_that_the_vocabulary_lacks_is_named_with_file_and_row(
    tmp_path: Path, kind: str, molecule: str, said: str
) -> None:
    (tmp_path / "a.csv").write_text(f"smiles,y\nCCO,1\n{molecule},2\n")
    options = {"text_field": "smiles"} if kind == "text" else {"columns": COLUMNS}
    spec = SourceSpec.model_validate({"path": str(tmp_path / "a.csv"), "kind": kind, **options})
    asked = replace(
        asked_for(tmp_path, 16, labels=LabelOptions("regression", 1)), tokenizer=SmilesTokenizer(KNOWN)
    )
    (side,) = sides([spec], None).values()
    with pytest.raises(UserError, match=rf"a\.csv, row 2: {said}"):
        prepare_rows(side, asked)
    lossy = replace(asked, tokenizer=SmilesTokenizer(KNOWN, lossy=True))
    prepare_rows(side, lossy)
    ((_, source, _),) = open_rows(side, lossy)
    row = source.rows.read(0, 0)
    assert lossy.tokenizer.unk_id in row.tokens
