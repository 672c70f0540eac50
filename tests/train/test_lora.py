"""The section `lora` of a run config: what it makes of a model, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llm import LLM
from llm.adapters.vocabulary import grown
from llm.checkpoint.weights import ModuleWeights
from llm.errors import UserError
from llm.tokenizer import TokenizerConfig, load_tokenizer
from llm.tokenizers.extended import ExtendedTokenizer
from llm.train.config import validate
from llm.train.freezing import parameter_table
from llm.train.settle import with_vocabulary
from tests.distributed.harness import tiny_config


def config(section: dict[str, Any] | None, **model: Any) -> Any:
    raw = tiny_config(Path("unused"))
    raw["model"] = {**raw["model"], "vocab_size": 64, **model}
    return validate(raw if section is None else {**raw, "lora": section}, "config")


def test_only_adapters_train() -> None:
    table = parameter_table(config({"rank": 4}))
    assert {name for name, row in table.items() if row.trainable} == {name for name in table if "lora" in name}
    assert "layers.1.feed_forward.experts.w3_lora_b" in table and "layers.1.feed_forward.router.lora_a" not in table
    assert all(row.trainable for row in parameter_table(config(None)).values())


def test_the_usual_targets_are_those_that_the_model_has() -> None:
    dense = parameter_table(config({}, moe=None, gated=False))
    trained = {name.split(".")[-2] for name, row in dense.items() if row.trainable}
    assert trained == {"wq", "wk", "wv", "wo", "w1", "w2"}


@pytest.mark.parametrize(
    ("targets", "model", "wrong"),
    [
        (["wq", "wz"], {}, "wz"),
        ("wq,experts", {"moe": None}, "experts"),
        (["w3"], {"gated": False, "moe": None}, "w3"),
        (["output"], {"tie_embeddings": True}, "output"),
        (["router"], {}, "router"),
    ],
)
def test_a_target_that_names_nothing_is_refused_also_among_good_ones(targets: Any, model: Any, wrong: str) -> None:
    with pytest.raises(UserError, match=rf"^lora\.targets: no weight of this model is named '{wrong}'; it has .*wq"):
        parameter_table(config({"targets": targets}, **model))


def test_a_target_by_its_name_elsewhere_is_refused_with_its_name_here() -> None:
    with pytest.raises(UserError, match=r"^lora\.targets: no weight .* named 'o_proj', which is wo here; it has .*wo"):
        parameter_table(config({"targets": ["wq", "o_proj"]}))


VISION = {"image_size": 8, "patch_size": 2, "dim": 16, "n_layers": 2, "n_heads": 2, "output_dim": 16,
          "patch_token_id": 63}  # fmt: skip


def test_usual_targets_are_the_text_models_and_those_of_the_tower_are_named_vision() -> None:
    usual = parameter_table(config({}, vision=VISION))
    assert {row.unit for row in usual.values() if row.trainable} == {f"layers.{i}" for i in range(4)}
    named = parameter_table(config({"targets": ["vision.wq", "vision.w2", "vision.fc1"]}, vision=VISION))
    trained = {name.rpartition(".")[0] for name, row in named.items() if row.trainable}
    layers = [f"vision_embeddings.layers.{i}" for i in range(2)]
    assert trained == {
        *(f"{layer}.{module}" for layer in layers for module in ("attention.wq", "feed_forward.w2")),
        "vision_embeddings.adapter.fc1",
    }
    projection = parameter_table(config({"targets": "wq,vision_projection"}, vision=VISION))
    trained = {name for name, row in projection.items() if row.trainable and row.unit == "vision"}
    assert trained == {"vision_projection.lora_a", "vision_projection.lora_b"}


@pytest.mark.parametrize("target", ["vision.w3", "vision.patch", "vision.norm", "vision.vision_projection"])
def test_a_target_that_the_tower_has_not_is_refused_and_its_own_are_listed(target: str) -> None:
    line = rf"^lora\.targets: no weight of this model is named '{target}'; it has .*vision\.wq.*vision_projection.*"
    with pytest.raises(UserError, match=line):
        parameter_table(config({"targets": ["wq", target]}, vision=VISION))


def test_freeze_names_further_parameters_that_stay() -> None:
    raw = tiny_config(Path("unused"), train={"freeze": ["layers.[01].*"]})
    raw["model"] = {**raw["model"], "vocab_size": 64}
    table = parameter_table(validate({**raw, "lora": {}}, "config"))
    assert {row.unit for row in table.values() if row.trainable} == {"layers.2", "layers.3"}


@pytest.mark.parametrize(("held", "size"), [(258, 260), (300, 300)], ids=["no room", "spare rows"])
def test_rows_of_the_tokens_that_a_chat_adds_train_beside_adapters(held: int, size: int) -> None:
    plain = load_tokenizer(TokenizerConfig(kind="bytes"))
    extended = ExtendedTokenizer(plain, ["<|a|>", "<|b|>"])
    raw = {**config({"rank": 4}, vocab_size=held).model_dump(mode="json"), "chat": {"add_tokens": True}}
    made = with_vocabulary(validate(raw, "config"), extended)
    assert made.model.vocab_size == size and made.lora is not None
    assert made.model.lora == made.lora.args and made.lora.token_rows == (258, 260)
    table = parameter_table(made)
    assert [n for n, row in table.items() if n.endswith("token_rows") and row.trainable and row.shape == (2, 32)] == [
        "tok_embeddings.token_rows",
        "output.token_rows",
    ]
    assert with_vocabulary(made, extended) == made
    # tokens that an earlier run added are no new ones
    later = made.model_copy(update={"tokenizer": TokenizerConfig(kind="bytes", added_tokens=("<|a|>", "<|b|>"))})
    later = later.model_copy(update={"lora": None, "model": later.model.merged})
    assert with_vocabulary(later, extended) == later
    with pytest.raises(UserError, match=r"model\.vocab_size=64 is below the tokenizer's 258 tokens"):
        with_vocabulary(config({"rank": 4}), plain)


def test_rows_of_new_tokens_are_the_mean_of_the_old_ones_in_any_box() -> None:
    args = config(None).model
    model = LLM(args)
    grown_args, weights = grown(args, ModuleWeights(model), 70)
    assert grown_args.vocab_size == 70
    for name in ("tok_embeddings.weight", "output.weight"):
        old = model.get_parameter(name).detach()
        # float32 rounds the mean in float64
        expected = torch.cat([old, old.double().mean(0).float().expand(6, -1)])
        for low, high, columns in ((0, 70, (0, 32)), (60, 68, (3, 9)), (66, 70, (0, 32)), (0, 64, (1, 2))):
            out = torch.empty(high - low, columns[1] - columns[0])
            found = weights.read(name, ((low, high), columns), out)
            torch.testing.assert_close(found, expected[low:high, slice(*columns)], rtol=0, atol=1e-9)
    assert grown(args, ModuleWeights(model), 64)[0] is args


def test_token_rows_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(UserError, match=r"lora\.token_rows=\[60, 65\]: the vocabulary has 64 tokens"):
        parameter_table(config({"token_rows": [60, 65]}))
    with pytest.raises(UserError, match=r"lora\.token_rows=\[6, 6\]: holds no token"):
        config({"token_rows": [6, 6]})


def test_no_targets_and_a_rank_of_zero_are_refused_in_a_line_with_the_key() -> None:
    with pytest.raises(UserError, match=r"lora\.targets is empty"):
        config({"targets": []})
    with pytest.raises(UserError, match=r"lora\.rank=0: "):
        config({"rank": 0})


def test_what_the_model_says_of_adapters_is_what_the_section_says() -> None:
    made = config({"rank": 4})
    again = validate(made.model_dump(mode="json"), "again")
    assert again.model.lora == made.model.lora == made.lora.args
    with pytest.raises(UserError, match=r"model\.lora\.rank=4: the section lora says this"):
        config({"rank": 8}, lora={"rank": 4})
