"""The benchmarks: fair turns, honest statistics, peers that do the same work, and a memory peak that is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm import LLM
from llm.errors import UserError
from tools.benchmarks import gpu, harness, machine, parallel, pipeline
from tools.benchmarks.contestants import Shape, transformers_weights
from tools.benchmarks.harness import Bar, Contestant, Spread, Timing, check_same_work, interleave, write_result
from tools.benchmarks.memory import ENVIRONMENT, storage_bytes
from tools.benchmarks.own_process import OwnProcess

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape(vocab=61, batch=2, seq_len=24, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn=48)


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_contestants_take_turns_and_the_order_turns_round():
    turns: list[str] = []

    def stepper(name: str):
        return lambda: float(turns.append(name) or 0)

    timing = interleave([Contestant(n, stepper(n)) for n in "ab"], rounds=7, block=2, warmup=1)
    assert "".join(turns) == "ab" + "aabb" + "bbaa" + "aabb" + "bbaa" + "aabb" + "bbaa" + "aabb"
    assert all(len(times[name]) == 7 for times in (timing.seconds, timing.cpu_seconds) for name in "ab")


SERVED = """
from tools.benchmarks.own_process import serve
made = []
def build():
    print("a library's remark on stdout")
    def step():
        made.append(1)
        if len(made) == 6:
            raise RuntimeError("out of luck")
        return float(len(made))
    return step
serve(build)
"""


def test_a_process_of_its_own_makes_the_steps_it_is_asked_for_and_its_end_is_told():
    command = [sys.executable, "-c", SERVED]
    with OwnProcess("peer", command, {**os.environ, "PYTHONPATH": str(ROOT)}) as peer:
        assert peer.step() == 1.0
        seconds, cpu_seconds = peer.timed(3)
        assert seconds > 0 and cpu_seconds >= 0
        assert peer.step() == 5.0
        with pytest.raises(UserError, match="peer ended with 1: .*RuntimeError: out of luck"):
            peer.step()
    with OwnProcess("other", command, {**os.environ, "PYTHONPATH": str(ROOT)}) as other:
        assert other.step() == 1.0
    assert other.process.returncode is not None


def test_too_few_rounds_are_refused():
    with pytest.raises(UserError, match="--rounds=6: at least 7"):
        interleave([], rounds=6)


def test_a_slow_minute_of_the_machine_does_not_touch_the_ratio():
    slow = [1.0, 1.0, 5.0, 5.0, 5.0, 1.0, 1.0]
    timing = Timing({"ours": [2 * s for s in slow], "peer": [3 * s for s in slow]}, {})
    assert timing.speedup("ours", over="peer") == Spread(1.5, 1.5, 1.5)
    assert timing.fastest(["peer", "ours"]) == "ours"


def test_a_spread_is_median_and_quartiles():
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(3, 2, 4)


def test_other_work_is_refused_by_name():
    check_same_work({"ours": 8.0, "peer": 8.00001}, rtol=1e-5)
    for loss in (8.1, float("nan")):
        with pytest.raises(UserError, match="peer does other work than ours"):
            check_same_work({"ours": 8.0, "peer": loss}, rtol=1e-5)


def test_a_bar_says_whether_it_was_met():
    assert Bar("speed", 1.2, 1.1).text().endswith(": met")
    assert Bar("speed", 1.0, 1.1).text().endswith("NOT MET")
    assert Bar("memory", 0.7, 0.6, at_least=False).text().endswith("NOT MET")


def test_a_result_names_hardware_versions_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "tools/benchmarks/step.py"), "--case", "S"])
    text = write_result("step", "A title", ["a section"], tmp_path).read_text()
    assert "Command: `python tools/benchmarks/step.py --case S`" in text and text.endswith("a section\n")
    for words in (machine.versions(), "cores", f"torch {torch.__version__}", "commit"):
        assert words in text
    assert [path.name[4:5] + path.name[10:] for path in tmp_path.iterdir()] == ["--step.md"]


def test_transformers_computes_our_model_from_the_renamed_weights():
    transformers = pytest.importorskip("transformers")
    model = LLM(SMALL.args(), seed=3)
    config = transformers.LlamaConfig(
        vocab_size=SMALL.vocab, hidden_size=SMALL.dim, intermediate_size=SMALL.ffn, num_hidden_layers=SMALL.n_layers,
        num_attention_heads=SMALL.n_heads, num_key_value_heads=SMALL.n_kv_heads, rms_norm_eps=model.args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.args.rope_theta}, tie_word_embeddings=False,
    )  # fmt: skip
    peer = transformers.LlamaForCausalLM(config)
    peer.load_state_dict(transformers_weights(model))
    tokens = SMALL.tokens()
    with torch.no_grad():  # float32 round-off of logits of about 0.1
        torch.testing.assert_close(model(tokens).logits, peer(tokens).logits, rtol=1e-5, atol=1e-6)


def test_views_of_a_storage_count_once():
    x = torch.zeros(100)
    assert storage_bytes([x, x[10:], x.view(10, 10), torch.zeros(5)]) == 420


SAME_STEPS = """
import json, sys
import torch
from tools.benchmarks.contestants import runners
from tools.benchmarks.step import start
from tests.tools.test_benchmarks import SMALL
world = start()
print(json.dumps({name: [runner.step() for _ in range(3)] for name, build in runners(sys.argv[1]).items()
                  if "compiled" not in name for runner in [build(SMALL, world)]}))
"""
PEAK = """
import torch
from tools.benchmarks.memory import peak_above_states
state, kept = torch.ones(2 << 20), torch.ones(3 << 20)
def step():
    held = torch.ones(4 << 20)
    return float((held + 1).sum() + kept[0])
measured = peak_above_states(step, lambda: [state])
print(measured.states, measured.peak)
"""


def in_python(code: str, *words: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env = {**kept, **ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return harness.in_fresh_process([sys.executable, "-c", code, *words], env)


def test_the_peak_is_what_a_step_holds_at_once_and_what_stays_that_is_no_state():
    states, peak = map(int, in_python(PEAK).split())
    assert states == 8 << 20
    # 12 MiB kept, 16 MiB held and 16 MiB of the sum; a MiB for pages of libraries first touched while measuring
    assert peak == pytest.approx(44 << 20, abs=1 << 20)


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_contestants_train_alike(precision):
    """Three losses: the same start, gradients, clipping and updates."""
    pytest.importorskip("transformers")
    losses = json.loads(in_python(SAME_STEPS, precision))
    assert len(losses) == (3 if precision == "fp32" else 4)
    # float32: order of sums, amplified by AdamW at small gradients; bf16: 8 bits
    rtol = 1e-5 if precision == "fp32" else 5e-3
    for name, values in losses.items():
        assert values == pytest.approx(losses["ours"], rel=rtol), name
        assert values[-1] < values[0] and values[0] == pytest.approx(torch.tensor(61.0).log().item(), rel=0.02)


def test_bad_input_is_one_line():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/benchmarks/step.py"), "memory", "--contestant=nobody"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: --contestant=nobody: possible are ours, ")


@pytest.mark.full
@pytest.mark.distributed
def test_layouts_on_two_processes_do_the_same_step_and_say_how_long_they_talk():
    model = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_hidden": 48, "vocab_size": 64}
    found = [parallel.measure(model, layout, "fp32", 2) for layout in ({}, {"tensor": 2})]
    assert all(0 < run["talking"] < run["step"] for run in found)
    check_same_work({str(i): run["loss"] for i, run in enumerate(found)}, 1e-5)


@pytest.mark.full
@pytest.mark.distributed
def test_a_pipeline_and_one_process_are_timed_at_the_same_step_and_compared_by_the_formula(monkeypatch):
    small = {"dim": 32, "n_layers": 4, "n_heads": 4, "ffn_hidden": 48, "vocab_size": 192, "max_seq_len": 512}
    monkeypatch.setattr(pipeline, "MODEL", small)
    text = pipeline.compare("fp32", (8,), rounds=2, steps=1)  # other losses would have been an error
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 8 |")]
    assert [row[1] for row in rows] == ["one process", "1f1b", "dualpipev"]
    whole, share = float(rows[0][2].split(" ")[0]), pipeline.busiest(pipeline.pipelines(8)["1f1b"])
    assert float(rows[1][3].split(" ")[0]) == pytest.approx(whole * share * 9 / 8, abs=2e-3)
    assert [row[5] for row in rows[1:]] == ["11.1%", "7.7%"] and text.count("expected") == 2


def test_a_gpu_report_counts_utilisation_and_names_what_did_not_fit():
    shape = gpu.shape_1b3(2048)
    fast = gpu.Measured([0.2, 0.2, 0.2], first_loss=10.0, states=2**30, peak=3 * 2**30)
    slow = gpu.Measured([0.4, 0.4, 0.4], first_loss=10.0, states=2**30, peak=2**31)
    text = gpu.report(shape, {"ours": fast, "theirs": slow, "others": None}, steps=3, peak=989e12)
    matrices = 24 * (4 * 2048**2 + 3 * 2048 * 5504) + 32000 * 2048 + 49 * 2048  # all but the token table
    per_token = 6 * matrices + 12 * 24 * 2048 * 2048
    assert f"{per_token / 1e9:.2f} GFLOP" in text
    utilisation = gpu.TOKENS / 0.2 * per_token / 989e12
    assert f"| ours | 0.2000 (0.2000 to 0.2000) | 81,920 | {utilisation:.3f} | 1.000 | 1.0 | 3.0 |" in text
    assert "| theirs | 0.4000 (0.4000 to 0.4000) | 40,960 |" in text and "| 2.000 |" in text
    assert "| others | out of memory |" in text
    with pytest.raises(UserError, match="--seq_len=3000 does not divide"):
        gpu.shape_1b3(3000)
