"""The subcommands: what each runs, where its flags are described, and an example."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llm.errors import UserError

Words = list[str]
RUN_FLAGS = "llm/train/config/flags.py:OWN_FLAGS"
RUN_KEYS = "llm/train/config/schema.py:RunConfig"
OF_LAYOUT = "llm/jobs/evaluate.py:LAYOUT_FLAGS"


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    name: str
    about: str
    """What it does, in one line."""
    example: str
    """The words after `lattice`."""
    script: str
    """That runs it, a path beside llm/; or a module of llm with `main(words)`."""
    described: Mapping[str, str] = field(default_factory=dict)
    """FILE:NAME of the function or class whose docstring and parameters are its help, by the word that chooses it; the
    one of "" is described without such a word."""
    listed: tuple[str, ...] = ()
    """FILE:NAME of dicts of more flags, with a line each."""
    keys: bool = False
    """Whether it takes any key of the run config too."""
    words: Callable[[Words], Words] = list
    """The words for the script, of those typed after the subcommand."""


def _replay(words: Words) -> Words:
    if len(words) < 2 or words[0].startswith("-") or not words[1].isdecimal():
        raise UserError("replay needs a run folder and a step: lattice replay RUN STEP")
    return ["--run_dir", words[0], "--replay_step", words[1], *words[2:]]


def _chat(words: Words) -> Words:
    if "--chat" in words:
        return words
    return [*words, "--chat"]


COMMANDS = (
    Command(
        "quickstart",
        "make the data of the quickstart configs, or report of a run of theirs",
        "quickstart prepare",
        "tools/quickstart.py",
        {
            "": "tools/quickstart.py:quickstart",
            "prepare": "tools/quickstart.py:prepare",
            "report": "tools/quickstart.py:report",
        },
    ),
    Command(
        "train",
        "train a model by a run config; the same command again resumes",
        "train --config quickstart --nproc 2",
        "launch/pretrain.py",
        listed=(RUN_FLAGS,),
        keys=True,
    ),
    Command(
        "finetune",
        "train a model further: on conversations, completions, preferences or text",
        "finetune --config chat_lora --model.init_from runs/quickstart",
        "launch/finetune.py",
        listed=(RUN_FLAGS,),
        keys=True,
    ),
    Command(
        "evaluate",
        "score a model on tasks",
        "evaluate --model runs/quickstart --tasks python_sources --output out",
        "launch/evaluate.py",
        {"": "llm/jobs/evaluate.py:read_flags"},
        listed=(OF_LAYOUT,),
    ),
    Command(
        "generate",
        "continue prompts with a model",
        'generate --model runs/quickstart --prompt "def "',
        "launch/generate.py",
        {"": "llm/jobs/generate.py:continue_prompt"},
    ),
    Command(
        "chat",
        "talk to a model by its chat template",
        "chat runs/chat_lora",
        "launch/generate.py",
        {"": "llm/jobs/generate.py:continue_prompt"},
        words=_chat,
    ),
    Command(
        "convert",
        "foreign checkpoints in and out: import, export, inspect, verify",
        "convert import path/to/hf_model models/mine",
        "tools/convert.py",
        {
            "import": "tools/convert.py:import_",
            "export": "tools/convert.py:export",
            "inspect": "tools/convert.py:inspect",
            "verify": "tools/convert.py:verify",
        },
    ),
    Command(
        "shard",
        "text to token shards; `shard check DIR` verifies them",
        "shard --input texts/ --output data/train --tokenizer tokenizer.model",
        "tools/shard.py",
        {"": "tools/shard.py:shard", "check": "tools/shard.py:check"},
    ),
    Command(
        "tokenizer",
        "train a tokenizer on text",
        "tokenizer --input texts/ --output tokenizer.model --vocab_size 8192",
        "tools/train_tokenizer.py",
        {"": "tools/train_tokenizer.py:train"},
    ),
    Command(
        "inspect",
        "what a run, a checkpoint or shards are, and whether they are whole",
        "inspect runs/quickstart",
        "tools/inspect.py",
        {"": "tools/inspection.py:inspect"},
    ),
    Command(
        "diff",
        "where two runs part",
        "diff runs/a runs/b",
        "tools/diff.py",
        {"": "tools/diff.py:diff"},
    ),
    Command(
        "replay",
        "rebuild a step of a run and list its documents by loss: replay RUN STEP",
        "replay runs/quickstart 120",
        "launch/pretrain.py",
        listed=(RUN_FLAGS,),
        words=_replay,
    ),
    Command(
        "report",
        "the report of a run, or of several compared, as one HTML file",
        "report runs/quickstart",
        "tools/report.py",
        {"": "tools/report.py:report"},
    ),
    Command(
        "layouts",
        "compare every layout of a config with one process",
        "layouts --config quickstart --nproc 2 --shrink",
        "tools/layouts.py",
        {"": "tools/layouts_plan.py:Settings"},
        keys=True,
    ),
    Command(
        "campaign",
        "kill a run many times and prove that it comes back as if nothing had been",
        "campaign --config quickstart --nproc 2 --kills 6",
        "tools/campaign.py",
        {"": "tools/campaign_plan.py:Settings"},
        keys=True,
    ),
    Command(
        "sweep",
        "a run for every combination of listed values, and a table",
        "sweep --config quickstart --output runs/sweep --sweep optim.lr=1e-3,3e-4",
        "tools/sweep.py",
        {"": "tools/sweep_plan.py:Settings"},
        keys=True,
    ),
    Command(
        "compare",
        "how far two evaluations differ, document by document",
        "compare out/a out/b",
        "tools/compare.py",
        {"": "tools/compare.py:main"},
    ),
    Command(
        "surgery",
        "make a new model from a trained one: upcycle, deepen, vocabulary, nope",
        "surgery deepen runs/quickstart models/deeper --n_layers 8",
        "tools/surgery.py",
        {
            "upcycle": "tools/surgery.py:upcycle",
            "deepen": "tools/surgery.py:deepen",
            "vocabulary": "tools/surgery.py:vocabulary",
            "nope": "tools/surgery.py:nope",
        },
    ),
    Command(
        "export",
        "a model as a graph that other programs run: ONNX, torch.export",
        "export --model runs/quickstart --output out/onnx",
        "tools/export.py",
        {"": "tools/export.py:export"},
    ),
    Command(
        "configs",
        "list the configs that ship with Lattice, or print one",
        "configs quickstart > mine.yaml",
        "llm.command.configs",
        {"": "llm/command/configs.py:configs"},
    ),
    Command(
        "doctor",
        "look at this machine: versions, devices, memory, compilers, and an all-reduce of two processes",
        "doctor",
        "llm.command.doctor",
        {"": "llm/command/doctor.py:doctor"},
    ),
    Command(
        "completion",
        "print what makes a shell complete these words: bash, zsh or fish",
        "completion bash > ~/.local/share/bash-completion/completions/lattice",
        "llm.command.completion",
        {"": "llm/command/completion.py:completion"},
    ),
)
BY_NAME = {command.name: command for command in COMMANDS}
