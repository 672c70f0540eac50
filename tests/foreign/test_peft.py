"""Adapters as PEFT keeps them: that library makes the same of ours, and they come in as they went out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.adapters.peft_folder import CONFIG, WEIGHTS, open_peft, write_peft
from llm.args import LoraArgs
from llm.checkpoint.frozen import Taken
from llm.checkpoint.weights import ModuleWeights
from llm.errors import UserError
from llm.foreign.family import family_named
from llm.layers.lora import adapters_in
from llm.parameters import ParameterTable
from llm.pretrained import adapter_of, chat_template_of, tokenizer_folder
from llm.safetensors_file import SafetensorsFile, write_tensors
from llm.tokenizer import ByteTokenizer
from tests.foreign.models import TABLE, config_of, logits_of, reference, tokens

USUAL = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "experts")
OF_STATES = ("wz", "wx", "wbc", "wdt")
"""Of state-space layers, which other models do not have."""
EVERYWHERE = (*USUAL, *OF_STATES, "tok_embeddings", "output")
# of PEFT: what it says of a tied table, and that patterns of parameters "match no module", though it uses them
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]
WITHOUT_OUT = ("mamba2", "nemotron_h", "falcon_h1")
QUICK = {
    ("llama", "one kv head, tied"), ("llama4_text", "top 2, every second layer, ratio 1"),
    ("gpt_neox", "a quarter rotated"),
}  # fmt: skip
CASES = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.full) for case in TABLE]


def args_of(family: str, name: str, targets: tuple[str, ...] = EVERYWHERE, **lora: Any) -> ModelArgs:
    """With adapters on all of the targets that the model has."""
    config = config_of(family, name).to_dict()
    args = ModelArgs.model_validate(family_named(family).read_config(config, lambda _: None))
    held = {weight.split(".")[-2] for weight in ParameterTable.of(args).shapes if "experts" not in weight}
    held |= {"experts"} if any("experts" in weight for weight in ParameterTable.of(args)) else set()
    held -= {"wo"} if family in WITHOUT_OUT else set()  # PEFT wraps no out_proj of such models
    chosen = tuple(target for target in targets if target in held)
    return args.model_copy(update={"lora": LoraArgs(**{"rank": 3, "alpha": 6.0, "targets": chosen} | lora)})


def adapted(args: ModelArgs, base: Any = None) -> LLM:
    """Our model with random adapters, on the weights of a model of transformers."""
    model = LLM(args)
    names = adapters_in(ParameterTable.of(args))
    with torch.no_grad():
        if base is not None:
            plain = LLM(args.merged)
            plain.load_state_dict(base.state_dict())
            for name, parameter in plain.named_parameters():
                model.get_parameter(name).copy_(parameter)
        for i, key in enumerate(key for name in names.values() for key in name[:2]):
            model.get_parameter(key).normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    return model.eval()


def adapters_of(model: LLM) -> dict[str, Tensor]:
    names = adapters_in(ParameterTable.of(model.args))
    return {key: model.get_parameter(key).detach() for name in names.values() for key in name[:2]}


def write(folder: Path, model: LLM, family: str) -> Path:
    write_peft(
        folder, model.args, ModuleWeights(model), family_named(family), dtype=torch.float32,
        origin=Taken("base", "digest"), extra_files={}, base=ModuleWeights(model),
    )  # fmt: skip
    return folder


def change(folder: Path, tensors: dict[str, Tensor | None] | None = None, **config: Any) -> Path:
    """Change keys of the config, and tensors, which None removes."""
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(said | config))
    if tensors is not None:
        file = SafetensorsFile(folder / WEIGHTS)
        held: dict[str, Tensor | None] = {}
        for key, entry in file.entries.items():
            values = torch.empty(entry.shape)
            file.read(key, tuple((0, n) for n in entry.shape), values)
            held[key] = values
        kept = {key: value for key, value in (held | tensors).items() if value is not None}
        described = {key: (value.dtype, tuple(value.shape)) for key, value in kept.items()}
        write_tensors(folder / WEIGHTS, described, iter(kept.values()), {})
    return folder


def in_peft(base: Any, folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_peft_gives_the_logits_of_our_adapters_and_they_come_in_as_they_went_out(
    tmp_path: Path, family: str, name: str
) -> None:
    base, args = reference(family, name), args_of(family, name)
    ours, ids = adapted(args, base), tokens(2, 24)
    folder = write(tmp_path / "adapter", ours, family)
    again, tensors = open_peft(folder).adapter(args.merged, family_named(family))
    plain, expected = logits_of(base, ids), logits_of(ours, ids)
    found = logits_of(in_peft(base, folder), ids)
    assert (expected - plain).abs().max() > 0.05 * plain.abs().max(), "the adapters do nothing"
    # float32: products of other shapes in another order
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert again == args
    held = adapters_of(ours)
    assert tensors.keys() == held.keys() and all(torch.equal(tensors[key], held[key]) for key in held)


@pytest.mark.parametrize("name", ["one kv head, tied", pytest.param("ratio 3", marks=pytest.mark.full)])
def test_rows_that_train_whole_go_out_as_those_of_trainable_token_indices(tmp_path: Path, name: str) -> None:
    base, args = reference("llama", name), args_of("llama", name, ("wq",), token_rows=(3, 7))
    ours, ids = adapted(args, base), torch.arange(12).view(1, -1)
    rows = [key for key in ParameterTable.of(args) if key.endswith("token_rows")]
    assert len(rows) == (1 if args.tie_embeddings else 2)
    for key in rows:
        torch.nn.init.normal_(ours.get_parameter(key), std=0.3)
    folder = write(tmp_path / "adapter", ours, "llama")
    plain, expected = logits_of(base, ids), logits_of(ours, ids)
    found = logits_of(in_peft(base, folder), ids)
    assert (expected - plain).abs().max() > 0.05 * plain.abs().max(), "the rows do nothing"
    # float32: products of other shapes in another order
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    plain_weights = ModuleWeights(ours)
    again, tensors = open_peft(folder).adapter(args.merged, family_named("llama"), plain_weights)
    assert again == args
    for key in rows:  # a row less the base's, which was added to it in float32
        torch.testing.assert_close(tensors[key], ours.get_parameter(key).detach(), rtol=0, atol=1e-6)
    for wrong, said in (([3, 5, 6, 7], "not the same consecutive"), (list(range(900, 904)), "up to token 903")):
        change(folder, trainable_token_indices={"embed_tokens": wrong})
        with pytest.raises(UserError, match=f"trainable_token_indices.*{said}"):
            open_peft(folder).adapter(args.merged, family_named("llama"), plain_weights)


def test_a_matrix_with_an_adapter_and_rows_that_train_whole_is_refused(tmp_path: Path) -> None:
    model = LLM(args_of("llama", "ratio 3", ("wq", "output"), token_rows=(3, 5)))
    with pytest.raises(UserError, match=r"lora\.token_rows=\[3, 5\]: PEFT has no adapter and rows"):
        write(tmp_path / "adapter", model, "llama")


@pytest.mark.parametrize(
    ("family", "name", "modules", "parameters"),
    [
        ("llama", "ratio 3", ["q_proj", "v_proj"], None),
        pytest.param(
            "llama4_text", "top 1, every layer", ["o_proj"], ["experts.gate_up_proj", "experts.down_proj"],
            marks=pytest.mark.full,
        ),
        pytest.param("gpt_neox", "a quarter rotated", ["query_key_value", "dense"], None, marks=pytest.mark.full),
        pytest.param("qwen3", "odd width", "all-linear", None, marks=pytest.mark.full),
        pytest.param("mixtral", "top 2", ["q_proj"], ["experts.gate_up_proj", "experts.down_proj"],
                     marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_an_adapter_that_peft_made_and_its_base_are_a_model_of_ours(
    tmp_path: Path, family: str, name: str, modules: Any, parameters: Any
) -> None:
    peft = pytest.importorskip("peft")
    base, ids = reference(family, name), tokens(2, 24)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=modules, target_parameters=parameters, use_rslora=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for i, (key, parameter) in enumerate(theirs.named_parameters()):
            if "lora_" in key:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    theirs.save_pretrained(tmp_path / "adapter")
    expected = logits_of(theirs, ids)
    found = logits_of(LLM.from_pretrained(tmp_path / "adapter"), ids)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # float32: ours adds W and B A first
    lora = adapter_of(tmp_path / "adapter").lora
    assert (lora.rank, lora.alpha, lora.rslora) == (4, 6.0, True)


def test_adapters_of_rows_in_the_other_order_of_rope_come_in_as_they_went_out(tmp_path: Path) -> None:
    args = args_of("llama", "ratio 3").model_copy(update={"rope_interleaved": True})
    ours = adapted(args)
    tensors = open_peft(write(tmp_path / "adapter", ours, "llama")).adapter(args, family_named("llama"))[1]
    held = adapters_of(ours)
    assert all(torch.equal(tensors[key], held[key]) for key in held)
    plain = open_peft(tmp_path / "adapter").adapter(args_of("llama", "ratio 3"), family_named("llama"))[1]
    moved = {key for key in held if not torch.equal(plain[key], held[key])}
    assert {key.split(".", 2)[2] for key in moved} == {"attention.wq.lora_b", "attention.wk.lora_b"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", adapted(args_of("llama", "ratio 3", USUAL)), "llama")


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"use_dora": True}, r"adapter_config\.json: use_dora=true is not supported"),
        ({"modules_to_save": ["norm"]}, r'modules_to_save=\["norm"\] is not supported; read are embed_tokens and'),
        ({"modules_to_save": ["lm_head"]}, r"is not complete: it misses base_model\.model\.lm_head\.weight"),
        ({"bias": "all"}, r'bias="all" is not supported'),
        ({"init_lora_weights": "pissa"}, r'init_lora_weights="pissa" changes the weights of the base'),
        ({"peft_type": "IA3"}, r'peft_type="IA3" is not supported'),
        ({"r": 5}, r"the adapter of model\.layers\.0\.self_attn\.q_proj\.weight has rank 3, expected 5"),
        ({"lora_alpha": "much"}, r"lora_alpha=much is no number above 0"),
        ({"alpha_pattern": {"q_proj": 7}}, r"q_proj\.weight has the scale 2\.33333, others 2; all must have the same"),
        ({"alpha_pattern": {"(a+)+q_proj": 7}}, r"alpha_pattern: \(a\+\)\+q_proj is more than the end of a name"),
    ],
)
def test_what_the_config_says_and_we_do_not_do_is_refused_by_its_key(folder: Path, config: Any, line: str) -> None:
    change(folder, **config)
    with pytest.raises(UserError, match=line):
        open_peft(folder).adapter(args_of("llama", "ratio 3"), family_named("llama"))


def test_an_adapter_of_another_base_is_refused_by_what_does_not_fit(folder: Path) -> None:
    for name, line in (
        (
            "ratio 1, biases, odd width",
            r"q_proj\.weight has shapes \(3, 48\) and \(48, 3\), and the weight is \(60, 48\)",
        ),
        ("one kv head, tied", r"k_proj\.weight has shapes \(3, 48\) and \(16, 3\), and the weight is \(8, 48\)"),
    ):
        with pytest.raises(UserError, match=rf"^{folder}: the adapter of .*{line}"):
            open_peft(folder).adapter(args_of("llama", name), family_named("llama"))
    with pytest.raises(UserError, match=r"not an adapter of this gpt_neox model, which has no place for base_model\."):
        open_peft(folder).adapter(args_of("gpt_neox", "a quarter rotated"), family_named("gpt_neox"))


def test_an_adapter_that_lacks_a_layer_or_a_factor_is_refused_by_name(folder: Path) -> None:
    key = "base_model.model.model.layers.1.self_attn.o_proj.lora_"
    change(folder, {f"{key}A.weight": None})
    with pytest.raises(UserError, match=rf"its adapter is not complete: it misses {key}A\.weight"):
        open_peft(folder).adapter(args_of("llama", "ratio 3"), family_named("llama"))
    change(folder, {f"{key}B.weight": None})
    with pytest.raises(UserError, match=r"is not complete: layers\.1\.attention\.wo\.lora_a has shape None"):
        open_peft(folder).adapter(args_of("llama", "ratio 3"), family_named("llama"))


def test_an_adapter_of_a_tied_table_or_head_alone_is_refused(tmp_path: Path) -> None:
    args = args_of("llama", "one kv head, tied")
    folder = write(tmp_path / "adapter", adapted(args), "llama")
    change(folder, {f"base_model.model.lm_head.lora_{part}.weight": None for part in "AB"})
    with pytest.raises(UserError, match=r"are one matrix in this model.*; it has one of the table alone"):
        open_peft(folder).adapter(args, family_named("llama"))


def test_a_folder_whose_base_is_not_here_says_so(folder: Path) -> None:
    change(folder, base_model_name_or_path="somebody/model")
    with pytest.raises(UserError, match=r"its base, base_model_name_or_path=somebody/model, is no folder here"):
        LLM.from_pretrained(folder)


def test_tokenizer_and_chat_template_of_an_adapter_are_those_beside_it_or_of_its_base(folder: Path) -> None:
    base = folder.parent / "base"
    base.mkdir()
    change(folder, base_model_name_or_path=str(base))
    assert tokenizer_folder(folder) == base
    (folder / "tokenizer.json").write_text("{}")
    assert tokenizer_folder(folder) == folder
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match=r"chat_template\.jinja"):  # which it finds, and which has no end mark
        chat_template_of(folder, ByteTokenizer())


def test_a_tied_table_comes_with_a_word_on_how_to_merge_it(tmp_path: Path) -> None:
    model = adapted(args_of("llama", "one kv head, tied"))
    notes = write_peft(
        tmp_path / "adapter", model.args, ModuleWeights(model), family_named("llama"), dtype=torch.float32,
        origin=Taken("base", "digest"), extra_files={},
    )  # fmt: skip
    assert any("merge_and_unload adds the adapter twice" in note for note in notes)
