"""Fine-tuning on samples and on preferences: the same on every layout, and after a resume; what is refused.

Samples have weights, so that the denominator of a step is no number of tokens, and lie several in a row.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llm import LLM, ModelArgs
from llm.pretrained import chat_template_of, tokenizer_of
from tests.data.sample_helpers import write_rows
from tests.distributed.harness import TINY_MODEL, metrics, run, tiny_config, without_timing
from tests.distributed.pool import run_job

pytestmark = pytest.mark.distributed

MODEL = {**TINY_MODEL, "vocab_size": 258, "init_std": 0.1}
STEPS, SAVED = 6, 3
RELATIVE = 1e-5  # float32 sums in another order, as in test_equality.py
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {}, "tensor": {"tensor": 2}, "zero3": {"zero_stage": 3}, "pipeline": {"pipeline": 2},
    "expert": {"expert": 2},
}  # fmt: skip
QUICK = [("sft", "tensor"), ("dpo", "data")]
KEYS = {
    "sft": ("loss", "lm_loss", "grad_norm", "loss/first", "loss/second", "valid_loss", "valid_target_share"),
    "chat": ("loss", "lm_loss", "grad_norm", "valid_loss", "valid_target_share"),
    "dpo": ("loss", "dpo_loss", "dpo_margin", "dpo_accuracy", "grad_norm", "valid_loss", "valid_margin"),
}


def rows(folder: Path) -> None:
    draw = random.Random(5)

    def text(least: int = 3) -> str:
        return "".join(draw.choices("abcdefgh ", k=draw.randint(least, 25)))

    for name, count in (("first", 40), ("second", 24), ("valid", 9)):
        samples = []
        for _ in range(count):
            said = text()
            weights = [draw.choice([0, 0, 1, 1, 0.5, 1.5]) for _ in said]
            samples.append({"text": said, "weights": weights})
        write_rows(folder / f"{name}.jsonl", samples)
    for name, count in (("pairs", 48), ("valid_pairs", 8)):
        write_rows(folder / f"{name}.jsonl", [{"one": text(), "other": text()} for _ in range(count)])


def chats(folder: Path) -> None:
    draw = random.Random(6)

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": "".join(draw.choices("abcdefgh", k=draw.randint(1, 3)))}

    for name, count in (("chats", 40), ("valid_chats", 8)):
        write_rows(folder / f"{name}.jsonl", [{"messages": [turn("user"), turn("assistant")]} for _ in range(count)])


def config_of(folder: Path, task: str, **sections: Any) -> dict[str, Any]:
    kind, trained, held = {
        "sft": ("byte_samples", ["first", "second"], "valid"),
        "chat": ("chat", ["chats"], "valid_chats"),
        "dpo": ("byte_pairs", ["pairs"], "valid_pairs"),
    }[task]
    sources = [{"path": str(folder / f"{name}.jsonl"), "kind": kind} for name in trained]
    raw = tiny_config(
        folder,
        model={**MODEL, "init_from": str(folder / "weights")},
        data={"train": sources, "valid": [{"path": str(folder / f"{held}.jsonl"), "kind": kind}]},
        train={"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2},
        optim={"warmup_steps": 1, "lr": 1e-2},
        checkpoint={"interval": SAVED, "keep": 4},
        eval={"interval": SAVED, "at_start": True},
    )
    if task == "chat":
        raw["chat"] = {"template": "chatml", "add_tokens": True}
        raw["eval"] |= {"sample_interval": STEPS, "sample_tokens": 4, "prompts": ["abc"]}
    raw |= {"task": "dpo" if task == "dpo" else "lm", "extensions": ["tests/data/sample_helpers.py"]}
    return {**raw, **{name: {**raw.get(name, {}), **section} for name, section in sections.items()}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, weights to begin with, and the runs of one process."""
    folder = tmp_path_factory.mktemp("finetune")
    rows(folder)
    chats(folder)
    LLM(ModelArgs.model_validate(MODEL), seed=3).save_pretrained(folder / "weights")
    perform(folder, [[f"{task}/one", config_of(folder, task)] for task in KEYS], 1)
    return folder


def perform(folder: Path, runs: list[list[Any]], nproc: int) -> None:
    (folder / "runs.json").write_text(json.dumps(runs))
    done = run_job("tests/distributed/init_from_job.py", str(folder / "runs.json"), str(folder), nproc=nproc)
    assert done.returncode == 0, done.stderr


def cut(task: str, name: str, folder: Path, **sections: Any) -> list[Any]:
    return [f"{task}/{name}", config_of(folder, task, parallel={"timeout_s": 60, **LAYOUTS[name]}, **sections)]


@pytest.fixture(scope="module")
def quick(folder: Path) -> Path:
    """Runs of two processes; the last goes on from a checkpoint of another one."""
    resumed = cut("dpo", "data", folder)[1]
    resumed["checkpoint"] = {**resumed["checkpoint"], "resume": str(folder / "dpo/data/checkpoints/step_00000003")}
    perform(folder, [*(cut(task, name, folder) for task, name in QUICK), ["dpo/resumed", resumed]], 2)
    return folder


def assert_equal(folder: Path, task: str, name: str) -> None:
    found, expected = metrics(folder / task / name), metrics(folder / task / "one")
    assert [row["step"] for row in found] == list(range(STEPS + 1))
    compared = set()
    for row, right in zip(found, expected, strict=True):
        assert row.keys() == right.keys()
        for key in KEYS[task]:
            if right.get(key) is not None:
                near = 1e-5 if key.endswith("margin") else 0  # a difference of sums of up to a hundred nats
                assert row[key] == pytest.approx(right[key], rel=RELATIVE, abs=near), (right["step"], key)
                compared.add(key)
        if row["step"]:
            assert (row["targets"], row["routing_checksum"]) == (right["targets"], right["routing_checksum"])
    assert compared == set(KEYS[task])


@pytest.mark.parametrize(("task", "name"), QUICK)
def test_losses_and_norms_are_those_of_one_process(quick: Path, task: str, name: str) -> None:
    assert_equal(quick, task, name)


@pytest.mark.full
@pytest.mark.parametrize("task", KEYS)
def test_losses_and_norms_are_those_of_one_process_on_every_layout(folder: Path, task: str) -> None:
    names = [name for name in LAYOUTS if (task, name) not in QUICK]
    perform(folder, [cut(task, name, folder) for name in names], 2)
    for name in names:
        assert_equal(folder, task, name)


def test_a_run_of_preferences_goes_on_bitwise_with_the_sums_that_it_began_with(quick: Path) -> None:
    whole, rest = (without_timing(metrics(quick / "dpo" / name)) for name in ("data", "resumed"))
    assert rest == whole[1 + SAVED :]
    sums = [(quick / "dpo" / name / "reference.safetensors").read_bytes() for name in ("data", "resumed")]
    assert sums[0] == sums[1]
    last = f"checkpoints/step_{STEPS:08d}"
    files = sorted(path.name for path in (quick / "dpo/data" / last).glob("rank_*.safetensors"))
    assert len(files) == 2
    for name in files:
        assert (quick / "dpo/resumed" / last / name).read_bytes() == (quick / "dpo/data" / last / name).read_bytes()


def test_before_the_first_update_a_model_is_its_own_reference(folder: Path) -> None:
    """Every pair has the loss log 2, and the held-out ones too; float32 sums in another order."""
    start, first = metrics(folder / "dpo" / "one")[:2]
    assert first["dpo_loss"] == pytest.approx(0.693147, rel=1e-5) and start["valid_loss"] == pytest.approx(0.693147)
    assert first["dpo_margin"] == pytest.approx(0, abs=1e-5)


def test_a_run_on_chats_samples_answers_and_keeps_its_template_and_added_tokens(folder: Path) -> None:
    run_dir = folder / "chat" / "one"
    assert "prompt 'abc' ---\nabc\n-> " in (run_dir / "log.txt").read_text()
    template, model = chat_template_of(run_dir, tokenizer_of(run_dir)), LLM.from_pretrained(run_dir)
    assert {"<|im_start|>", "<|im_end|>"} <= template.tokenizer.control_tokens.keys()
    assert model.args.vocab_size == template.tokenizer.vocab_size == 258 + 2


def test_training_lowers_the_loss_and_widens_the_margin(folder: Path) -> None:
    sft, dpo = metrics(folder / "sft" / "one"), metrics(folder / "dpo" / "one")
    assert sft[-1]["valid_loss"] < sft[0]["valid_loss"] and sft[0]["step"] == 0
    assert dpo[-1]["dpo_margin"] > 0 and dpo[-1]["dpo_loss"] < dpo[1]["dpo_loss"]


def refused(tmp_path: Path, raw: dict[str, Any], run_dir: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    done = run("launch/finetune.py", "--config", str(path), "--run_dir", str(run_dir))
    assert done.returncode == 2, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.full
def test_other_sums_and_other_data_are_refused_when_a_run_goes_on(folder: Path, tmp_path: Path) -> None:
    longer = config_of(folder, "dpo", train={"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2})
    perform(folder, [["dpo/again", longer]], 1)
    sums = folder / "dpo/again/reference.safetensors"
    kept = sums.read_bytes()
    raw = {**longer, "train": {**longer["train"], "steps": STEPS + 2}}
    sums.unlink()
    assert "reference.safetensors" in refused(tmp_path, raw, folder / "dpo/again")
    sums.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "is damaged" in refused(tmp_path, raw, folder / "dpo/again")
