"""What Miniformer's document lists as future, over models of its own preset."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm.adapters.int8 import int8_weights
from llm.args import LoraArgs
from llm.export.check import largest_difference
from llm.export.kinds import graph_of
from llm.parallel.launch import local
from llm.siblings.miniformer import Transformer
from tests.distributed.harness import environment, metrics
from tests.export.models import eager
from tests.parallel.test_int8_base import replica_of
from tests.siblings.test_miniformer import CLOSE, ids, transformer
from tests.siblings.test_miniformer_command import MODEL, text, write

MOE = {"moe": {"n_experts": 4, "top_k": 2, "hidden": 16, "shared": False}, "init_std": 0.2}


def gradients(model: Transformer) -> list[torch.Tensor]:
    tokens = ids()
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_one_head_of_keys_and_values_is_every_head_having_the_same() -> None:
    one, many = transformer(model_args={"n_kv_heads": 1, "init_std": 0.2}), transformer()
    with torch.no_grad():
        for name, parameter in many.named_parameters():
            found = one.get_parameter(name)
            parameter.copy_(found if found.shape == parameter.shape else torch.cat([found] * 2))
    assert one.llm.args.kv_heads == 1
    torch.testing.assert_close(one(ids()), many(ids()), **CLOSE)


@pytest.mark.parametrize("model_args", [{"n_kv_heads": 1, "init_std": 0.2}, MOE])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("what", ["llm", "step"])
def test_an_exported_model_computes_what_it_does(model_args: dict, activation: str, what: str) -> None:
    """Of experts, each token's two of four: the graph evaluates all of them."""
    model = transformer(activation=activation, model_args=model_args).llm
    graph = graph_of(model, what)  # type: ignore[arg-type]
    assert largest_difference(model, graph, eager(graph)) < 1e-5  # other sums than the model's


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activations_that_are_computed_again_give_the_same_gradients(mode: str) -> None:
    kept, again = transformer(model_args=MOE), transformer(model_args=MOE)
    again.llm.activation_checkpointing = mode  # type: ignore[assignment]
    for one, other in zip(gradients(kept), gradients(again), strict=True):
        assert torch.equal(one, other)


def test_adapters_over_an_int8_base_train_alone_and_begin_as_the_rounded_model() -> None:
    args = transformer(activation="swiglu").llm.args.model_copy(update={"lora": LoraArgs(rank=2, base="int8")})
    replica = replica_of(args)
    rounded = {name.split(".")[-2] for name, _ in int8_weights(replica.model)}
    assert rounded == {"wq", "wk", "wv", "wo", "w1", "w2", "w3"}
    plain = Transformer(transformer(activation="swiglu").config).llm.eval()
    held = dict(int8_weights(replica.model)) | dict(replica.model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            found = held[name]
            parameter.copy_(found if isinstance(found, torch.Tensor) else found.dequantised())
    torch.testing.assert_close(replica.model(ids()).logits, plain(ids()).logits, **CLOSE)
    trained = {name for name, row in replica.table.items() if row.trainable}
    assert trained and all("lora_" in name for name in trained)


def test_beams_find_a_continuation_no_less_likely_than_the_greedy_one() -> None:
    model = transformer()
    prompts = ids(2, 4)

    def likelihood(made: torch.Tensor) -> torch.Tensor:
        whole = torch.cat([prompts, made], 1)
        with torch.no_grad():
            logs = model(whole)[:, 3:-1].log_softmax(-1)
        return logs.gather(-1, made[..., None]).sum((1, 2))

    greedy, beams = (likelihood(model.generate(prompts, 5, num_beams=n)) for n in (1, 40))
    assert (beams >= greedy - 1e-5).all() and (beams > greedy + 1e-3).any()


@pytest.mark.full
@pytest.mark.distributed
def test_parameters_cut_by_zero_train_as_on_one_process(tmp_path: Path) -> None:
    """DeepSpeed's ZeRO 3 over two processes, with experts and recomputation."""
    path = write(tmp_path / "train.jsonl", 40, text=text)
    words = [f"--train_path={path}", "--tokenizer=bytes", "--batch_size=8", "--max_epochs=2", "--precision=fp32"]
    words += [f"--model_config={json.dumps(MODEL | {'dropout': 0.0, 'model_args': MOE})}"]
    cut = ["--parallel.zero_stage=3", "--train.activation_checkpointing=full", "--train.micro_batch_size=4"]
    losses = []
    for name, launcher, more in (("one", [sys.executable], []), ("two", local.command(2), cut)):
        line = [*launcher, "-m", "llm.siblings.miniformer", f"--work_dir={tmp_path / name}", *words, *more]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment())
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in metrics(tmp_path / name)])
    assert len(losses[0]) > 2 and losses[1] == pytest.approx(losses[0], rel=1e-5)  # sums over ranks, in another order
