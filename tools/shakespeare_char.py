"""The data of the character benchmark: a text split 90/10 by characters, and its alphabet.

`python tools/shakespeare_char.py prepare --text tinyshakespeare.txt` writes what configs/pretrain/shakespeare_char.yaml
reads. The split is the one of nanoGPT (github.com/karpathy/nanoGPT, data/shakespeare_char): the first 90 % of the
characters train, the rest is held out. Each part is one document. The text itself is the user's: it is part of
github.com/karpathy/char-rnn as data/tinyshakespeare/input.txt.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.atomic import new_directory
from llm.cli import run_cli
from llm.errors import UserError
from llm.paths import PathText
from llm.tokenizer import CharacterTokenizer, alphabet


def prepare(text: PathText, output: PathText = "runs/shakespeare_char") -> None:
    """Write train.txt, valid.txt and tokenizer.json into a new folder, whole or not at all.

    text: the text file, UTF-8
    output: the folder to make; one that holds the same already is left as it is
    """
    content = _read(Path(text))
    train, valid = split(content)
    if not train or not valid:
        raise UserError(f"--text={text}: {len(content)} characters are too few for two parts")
    tokenizer = CharacterTokenizer(alphabet([content]))
    files = {"train.txt": train.encode(), "valid.txt": valid.encode(), "tokenizer.json": tokenizer.serialized()}
    folder = Path(output)
    if not folder.exists():
        with new_directory(folder) as temporary:
            for name, part in files.items():
                (temporary / name).write_bytes(part)
    elif any(not (folder / name).is_file() or (folder / name).read_bytes() != part for name, part in files.items()):
        raise UserError(f"--output={output}: exists and holds something else; remove it or name another folder")
    kinds = len(tokenizer.characters)
    print(f"{folder}: {len(train)} characters to train on, {len(valid)} held out, {kinds} different ones")


def split(text: str) -> tuple[str, str]:
    """(first 90 % of the characters, rounded down; the rest)."""
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"--text={path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--text={path}: not UTF-8 at byte {error.start}") from None


if __name__ == "__main__":
    run_cli(prepare, prepare=prepare)
