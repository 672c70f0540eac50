"""Each example runs as its user runs it, and prints what its docstring says it does."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from tests.distributed.harness import run
from tests.shared import ROOT

EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
NUMBER = re.compile(r"\d[\d,.]*")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def docstring(name: str) -> str:
    found = ast.get_docstring(ast.parse(EXAMPLES[name].read_text()))
    assert found is not None
    return found


def promised(name: str) -> list[str]:
    """The lines that an example says it prints: those of its docstring that are set in, behind the word `prints`."""
    after = docstring(name).split("prints", 1)[1]
    return [line[4:] for line in after.splitlines() if line.startswith("    ")]


def folder_of_hugging_face(folder: Path) -> Path:
    """A tiny Llama with random weights, as transformers writes it, with a tokenizer of bytes and a chat template."""
    marks = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(marks)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=256, eos_token_id=259,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each example prints, of those that take a second or two, in one process."""
    folder = tmp_path_factory.mktemp("examples")
    foreign = folder_of_hugging_face(folder / "foreign")
    words = {
        "train_in_30_lines": [folder / "zen"],
        "evaluate": [folder / "zen/run", folder / "evaluation"],
        "own_layer": [folder / "layer"],
        "own_task": [folder / "sums"],
        "own_data_source": [folder / "fasta"],
        "compare_runs": [folder / "compared"],
        "import_and_chat": [foreign, "Is anybody there?"],
    }
    lines = ("\t".join(map(str, (name, *given))) for name, given in words.items())
    (folder / "examples.txt").write_text("".join(f"{line}\n" for line in lines))
    done = run("tests/examples/job.py", str(folder))
    assert done.returncode == 0, done.stderr
    _, *parts = re.split(r"<<<(\w+)>>>\n", done.stdout)
    assert list(words) == parts[::2]
    results = json.loads((folder / "evaluation/results/results.json").read_text())["results"]
    assert results["zen"]["acc"] == 1.0  # what it knows by heart
    return {name: text.splitlines() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def same_but_for_numbers(lines: list[str], expected: list[str]) -> None:
    """What lines say, numbers left out, which are another machine's."""
    found = [NUMBER.sub("N", line) for line in lines[-len(expected) :]]
    assert found == [NUMBER.sub("N", line) for line in expected]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["train_in_30_lines", "evaluate", "own_layer", "own_task", "own_data_source"])
def test_an_example_prints_what_it_says(printed: dict[str, list[str]], name: str) -> None:
    same_but_for_numbers(printed[name], promised(name))


@pytest.mark.distributed
def test_runs_are_compared_in_the_order_of_what_they_reach(printed: dict[str, list[str]]) -> None:
    same_but_for_numbers([" ".join(line.split()) for line in printed["compare_runs"]],
                         [" ".join(line.split()) for line in promised("compare_runs")])  # fmt: skip
    rows = [line.split() for line in printed["compare_runs"][-3:]]
    reached = [float(row[-1]) for row in rows]
    assert reached == sorted(reached) and all(float(row[3]) < float(row[2]) for row in rows)


@pytest.mark.distributed
def test_what_trains_has_learned(printed: dict[str, list[str]]) -> None:
    for name in ("train_in_30_lines", "own_layer", "own_data_source"):
        (line,) = [line for line in printed[name] if line.startswith("loss ")]
        first, last = map(float, re.findall(r"\d+\.\d+", line)[:2])
        assert last < first / 2, line
    held_out = float(re.findall(r"([\d.]+)% of the letters", printed["own_task"][-1])[0])
    assert held_out > 40  # by chance one letter of eleven is right; the line ends alone are 43 % of these letters


@pytest.mark.distributed
def test_a_foreign_folder_answers_and_its_copy_of_ours_the_same(printed: dict[str, list[str]]) -> None:
    first, user, *reply, last = printed["import_and_chat"]
    assert first == promised("import_and_chat")[0] and user == promised("import_and_chat")[1]
    assert reply[0].startswith("assistant: ") and last == "the same reply from a folder of our own: True"


@pytest.mark.full
@pytest.mark.distributed
def test_the_layouts_have_the_losses_that_the_example_shows(tmp_path: Path) -> None:
    done = run("examples/layouts.py", str(tmp_path), timeout=600)
    assert done.returncode == 0, done.stderr
    names, *steps = done.stdout.splitlines()[-7:]
    assert names == promised("layouts")[0]
    for line in steps:
        _, alone, *others = map(float, line.split())
        # float32 sums in another order, and six decimals
        assert others == pytest.approx([alone] * 3, rel=1e-5), line


@pytest.mark.full
@pytest.mark.distributed
def test_the_pictures_that_were_not_trained_on_are_named(tmp_path: Path) -> None:
    done = run("examples/pictures.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == promised("pictures")[-1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_how_it_is_run_and_hides_no_module(name: str) -> None:
    """A script's own folder comes first where Python looks for modules: `vision.py` in it would hide the package."""
    assert f"examples/{name}.py" in docstring(name) and promised(name)
    assert importlib.util.find_spec(name) is None


def test_thirty_lines_are_thirty() -> None:
    text = EXAMPLES["train_in_30_lines"].read_text()
    body = ast.parse(text).body
    assert len(text.splitlines()) - body[0].end_lineno - 1 <= 30  # type: ignore[operator]


def test_no_example_uses_what_is_private() -> None:
    for name, path in EXAMPLES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            used = node.attr if isinstance(node, ast.Attribute) else ""
            names = [a.name for a in node.names] if isinstance(node, ast.ImportFrom | ast.Import) else []
            private = [n for n in (used, *names) if n.startswith("_") and not n.startswith("__")]
            assert not private, f"{name}: {private}"
