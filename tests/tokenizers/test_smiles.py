"""SMILES come back from their tokens exactly, cut as the published expression cuts them; what has no token is named."""

import csv
import re
from pathlib import Path

import pytest

from llm.errors import UserError
from llm.tokenizer import SmilesTokenizer, TokenizerConfig, load_tokenizer, smiles_vocabulary
from llm.tokenizers.smiles import CONTROL
from tests.shared import SHARED, needs_shared
from tools.train_tokenizer import train

# As it stands in the paper (Schwaller et al. 2019) and its code.
PUBLISHED = re.compile(
    r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>|\*|\$|\%[0-9]{2}|[0-9])"
)
MOLECULES = (
    "CC(=O)Oc1ccccc1C(=O)O",
    "CN1CCC[C@H]1c2cccnc2",
    "[Na+].[O-]C(=O)/C=C/Br",
    "Clc1ccc2%12CC%12c2c1",
    "C#N.[13CH4]>>F[Si](I)S",
    "*C$C~C:c\\P",
)
TOKENIZER = SmilesTokenizer(smiles_vocabulary((f"row {i}", text) for i, text in enumerate(MOLECULES, 1)))


@pytest.mark.parametrize("text", MOLECULES)
def test_a_molecule_comes_back_exactly_and_is_cut_as_published(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert [TOKENIZER.tokens[number] for number in ids] == PUBLISHED.findall(text)
    assert TOKENIZER.decode([TOKENIZER.bos_id, *ids, TOKENIZER.eos_id, TOKENIZER.pad_id]) == text
    assert TOKENIZER.token_bytes()[ids].sum() == len(text)
    assert not set(ids) & set(TOKENIZER.control_tokens.values())


@needs_shared
@pytest.mark.parametrize("name", ["delaney", "bbbp"])
def test_real_molecules_come_back_exactly_and_are_cut_as_published(name: str) -> None:
    with (SHARED / "data" / "chem" / f"{name}.csv").open(newline="") as file:
        texts = [row["smiles"] for row in csv.DictReader(file)]
    tokenizer = SmilesTokenizer(smiles_vocabulary((name, text) for text in texts))
    for text in texts:
        ids = tokenizer.encode(text)
        assert [tokenizer.tokens[number] for number in ids] == PUBLISHED.findall(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("CCXC", r"character 'X' \(U\+0058, at position 2 of 'CCXC'\) belongs to no token of SMILES"),
        ("CC[C", r"character '\[' .* at position 2"),
        ("CC\n", "character '.n' .* at position 2"),
        ("<bos>", "character '<' .* at position 0"),
        ("C[Zn]C", r"token '\[Zn\]' \(at position 1 of 'C\[Zn\]C'\) is not among the \d+ tokens"),
        ("[PAD]", r"token '\[PAD\]' \(at position 0"),
    ],
)
def test_what_has_no_token_is_an_error_that_names_it_and_an_unknown_only_where_asked_for(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TOKENIZER.encode(text)
    lossy = SmilesTokenizer(TOKENIZER.tokens, lossy=True)
    assert lossy.unk_id in lossy.encode(text) and TOKENIZER.unk_id not in TOKENIZER.encode("CC")
    assert TOKENIZER.fingerprint != lossy.fingerprint


def test_control_tokens_of_a_file_keep_their_places_and_missing_ones_follow() -> None:
    foreign = SmilesTokenizer(["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "Cl"])
    assert (foreign.pad_id, foreign.unk_id, foreign.bos_id, foreign.eos_id, foreign.mask_id) == (0, 2, 3, 4, 5)
    assert foreign.vocab_size == 8 and foreign.encode("CCl") == [6, 7]
    for text in ("C[unused1]", "C[PAD]"):
        with pytest.raises(UserError, match="'.' .*at position 1 of .* belongs to no token"):
            foreign.encode(text)
    bare = SmilesTokenizer(["C", "<mask>", "O"])
    assert bare.tokens == ("C", "<mask>", "O", "<pad>", "<bos>", "<eos>", "<unk>")
    assert set(bare.control_tokens) == set(CONTROL)


@pytest.mark.parametrize("lossy", [False, True])
def test_a_saved_tokenizer_is_the_same(tmp_path: Path, lossy: bool) -> None:
    bare = SmilesTokenizer(["C", "<mask>", "O"], lossy=lossy)
    again = load_tokenizer(bare.save(tmp_path), base=tmp_path)
    assert isinstance(again, SmilesTokenizer)
    assert (again.fingerprint, again.tokens, again.lossy) == (bare.fingerprint, bare.tokens, lossy)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no token"),
        (b"C\nO\nC\n", "line 3: token 'C' stands in line 1 too"),
        (b"C\n\nO\n", "line 2: '' is no token"),
        (b"C\n O\n", "line 2: ' O' is no token"),
        (b"\xff\n", "not UTF-8 at byte 0"),
        (b"the\nquick\n", "none of its 2 lines is a token of SMILES"),
    ],
)
def test_a_damaged_vocabulary_is_named_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_tokenizer(TokenizerConfig(kind="smiles", path="v.txt"), base=tmp_path)


def test_a_vocabulary_is_made_of_files_and_a_bad_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = tmp_path / "a.csv"
    rows.write_text("smiles,y\nCCO,1\nc1ccccc1Br,2\n")
    output = tmp_path / "v.txt"
    train([str(rows)], str(output), kind="smiles", text_field="smiles")
    assert "10 tokens, of which 5 are control tokens" in capsys.readouterr().out
    assert output.read_text().split("\n") == [*CONTROL, "1", "Br", "C", "O", "c", ""]
    rows.write_text("smiles,y\nCCO,1\nCC!,2\n")
    with pytest.raises(UserError, match="a.csv, row 2: character '!' at position 2 of 'CC!' is no token of SMILES"):
        train([str(rows)], str(output), kind="smiles", text_field="smiles", overwrite=True)
