"""`lattice configs`: what ships under configs/, to look at and to copy."""

from collections.abc import Sequence

from llm import shipped
from llm.cli import run_cli


def configs(name: str | None = None) -> None:
    """List the run configs that ship with Lattice, or print one.

    name: of a config, as `quickstart`, or the path of another file that ships, as configs/model/quickstart.yaml
    """
    if name is not None:
        print(shipped.run_config(name).read_text(encoding="utf-8"), end="")
        return
    named = list(shipped.run_configs())
    wide = max(len(name) for name, _ in named)
    for name, file in named:
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<{wide}}  {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())
    print("\n`--config` takes such a name, the last part alone, or the path of a file of yours.")


def main(words: Sequence[str]) -> None:
    """The command line."""
    run_cli(configs, words)
