"""SMILES by their atoms and bonds: a regular expression cuts a molecule's line, a vocabulary file numbers the pieces.

Source: the atom-wise tokenizer of Schwaller et al., "Molecular Transformer" (ACS Cent. Sci. 2019, 5, 1572), in our own
wording. It and theirs cut every valid SMILES alike.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from llm.errors import UserError
from llm.tokenizers.base import TableTokenizer, TokenizerConfig

PATTERN = (
    r"\[[^\[\]]+\]"  # an atom in brackets, with all that it says of charge, isotope and chirality
    r"|Br|Cl|[BCNOFPSI]|[bcnops]"  # atoms without brackets, the aromatic ones in small letters
    r"|%[0-9]{2}|[0-9]"  # ring closures
    r"|[-=#$:~/\\.()@+?>*]"  # bonds, branches, parts, reactions, wild cards
)
TOKEN = re.compile(PATTERN)

ROLES = {
    "pad": ("<pad>", "[PAD]"),
    "bos": ("<bos>", "[CLS]"),
    "eos": ("<eos>", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
    "unk": ("<unk>", "[UNK]"),
}
"""Control tokens: the names that are given to those which a file lacks, and those of BERT's that a file may have."""
CONTROL = tuple(names[0] for names in ROLES.values())
UNUSED = re.compile(r"\[unused[0-9]+\]")
"""Rows that BERT's vocabularies keep free; no text becomes them."""


class SmilesTokenizer(TableTokenizer):
    """One id a token. What no token covers, or the vocabulary lacks, is an error; with `lossy` each such token or
    character is <unk>.
    """

    kind = "smiles"

    def __init__(self, tokens: Sequence[str], lossy: bool = False) -> None:
        """`tokens`: those of the vocabulary's file, whose ids are their places in it; control tokens that are not among
        them follow.

        Attributes:
            pad_id, mask_id, unk_id: ids of control tokens, besides bos_id and eos_id.
            tokens: names of all ids.
            pattern: the regular expression of a token; the names of control tokens are none.
        """
        listed = set(tokens)
        self._control: dict[str, int] = {}
        ids: dict[str, int] = {}
        names = list(tokens)
        for role, spelled in ROLES.items():
            name = next((name for name in spelled if name in listed), spelled[0])
            if name not in listed:
                names.append(name)
            ids[role] = self._control[name] = names.index(name)
        self.bos_id, self.eos_id = ids["bos"], ids["eos"]
        self.pad_id, self.mask_id, self.unk_id = ids["pad"], ids["mask"], ids["unk"]
        self._control |= {name: number for number, name in enumerate(names) if UNUSED.fullmatch(name)}
        self.tokens, self.lossy, self._in_file = tuple(names), lossy, len(tokens)
        self.vocab_size = len(names)
        bracketed = "|".join(re.escape(name) for name in self._control if TOKEN.fullmatch(name))
        self.pattern = f"(?!{bracketed})(?:{PATTERN})" if bracketed else PATTERN
        self._token = re.compile(self.pattern)
        self._id_of = {name: number for number, name in enumerate(names) if name not in self._control}
        self._bytes_of_id = [b"" if name in self._control else name.encode() for name in names]
        content = "\n".join(["smiles", str(lossy), *names]).encode()
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()

    @property
    def control_tokens(self) -> Mapping[str, int]:
        return self._control

    def encode(self, text: str) -> list[int]:
        return [self._number(piece, at, text) for at, piece in pieces(text, self._token)]

    def _number(self, piece: str, at: int, text: str) -> int:
        number = self._id_of.get(piece)
        if number is not None:
            return number
        text.encode()  # a lone surrogate is no character
        if self.lossy:
            return self.unk_id
        shown = text if len(text) <= 60 else text[:57] + "..."
        if self._token.fullmatch(piece):
            raise UserError(
                f"token {piece!r} (at position {at} of {shown!r}) is not among the {len(self._id_of)} tokens of the "
                f"SMILES vocabulary; make one of files that have it (lattice tokenizer --kind smiles)"
            )
        raise UserError(
            f"character {piece!r} (U+{ord(piece):04X}, at position {at} of {shown!r}) belongs to no token of SMILES"
        )

    def save(self, directory: Path) -> TokenizerConfig:
        (Path(directory) / "vocab.txt").write_bytes(self.serialized())
        return TokenizerConfig(kind="smiles", path="vocab.txt", lossy=self.lossy)

    def serialized(self) -> bytes:
        """The content of the tokenizer's file."""
        return "".join(f"{name}\n" for name in self.tokens[: self._in_file]).encode()


def pieces(text: str, token: re.Pattern[str] = TOKEN) -> Iterator[tuple[int, str]]:
    """(position, token) of a text; a character that no token covers is one by itself."""
    at = 0
    for match in token.finditer(text):
        yield from ((i, text[i]) for i in range(at, match.start()))
        yield match.start(), match.group()
        at = match.end()
    yield from ((i, text[i]) for i in range(at, len(text)))


def read_smiles_vocabulary(content: bytes, path: Path) -> list[str]:
    """The tokens of a vocabulary's file, one a line. UserError naming file and line when it is damaged."""
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}, so no vocabulary of SMILES tokens") from None
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path}: holds no token; lattice tokenizer --kind smiles makes a vocabulary")
    first: dict[str, int] = {}
    for number, token in enumerate(lines, 1):
        if not token or token != token.strip():
            raise UserError(f"{path}, line {number}: {token!r} is no token; a vocabulary of SMILES has one a line")
        if token in first:
            raise UserError(f"{path}, line {number}: token {token!r} stands in line {first[token]} too")
        first[token] = number
    if not any(TOKEN.fullmatch(token) for token in lines):
        raise UserError(f"{path}: none of its {len(lines)} lines is a token of SMILES; is it another tokenizer's?")
    return lines


def smiles_vocabulary(texts: Iterable[tuple[str, str]]) -> list[str]:
    """The control tokens, then all tokens of the texts in code-point order. texts: (what messages call it, text).
    UserError naming the text with a character that belongs to no token.
    """
    seen: set[str] = set()
    for called, text in texts:
        found = set(TOKEN.findall(text))
        if sum(map(len, TOKEN.findall(text))) != len(text):
            at, piece = next((at, piece) for at, piece in pieces(text) if not TOKEN.fullmatch(piece))
            raise UserError(f"{called}: character {piece!r} at position {at} of {text[:60]!r} is no token of SMILES")
        seen |= found
    if not seen:
        raise UserError("the text is empty, so there is no token to make a vocabulary of")
    return [*CONTROL, *sorted(seen - {name for names in ROLES.values() for name in names})]
