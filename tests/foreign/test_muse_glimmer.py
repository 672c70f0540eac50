"""Muse Glimmer: its text model comes in with equal logits and gradients, and with the tower or without goes out without
a changed bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llm import LLM, ModelArgs
from llm.cache import Cache
from llm.errors import UserError
from llm.foreign.export import meaning
from llm.foreign.files import open_foreign
from tests.foreign.folders import tensors_of
from tests.foreign.models import transformers
from tools import convert

VOCAB = 97
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=6, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, sliding_window=5, initializer_range=0.1,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION: dict[str, Any] = dict(
    patch_size=4, pos_emb_height=4, pos_emb_width=4, num_attention_heads=2, num_hidden_layers=1, hidden_size=16,
    intermediate_size=32,
)  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "as released": {},
    "one kv head, biases, other factors": dict(
        num_key_value_heads=1, attention_bias=True, qk_scale_factor=1.7, output_multiplier=0.5,
        final_logit_softcapping=3.0, post_norm_eps=1e-2, rms_norm_eps=1e-3,
    ),
    "odd width, ratio 1, five layers": dict(num_hidden_layers=5, num_key_value_heads=6, head_dim=10),
    "layers by list, another base": dict(
        num_hidden_layers=4, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        layer_rope_theta=[5e5, 0, 5e5, 5e5],
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
}  # fmt: skip
CUTS = [3, 1, 1, 1, 6, 1, 8, 1, 1]


def reference(changes: dict[str, Any]) -> nn.Module:
    """A model of transformers whose norms and biases are random too."""
    torch.manual_seed(0)
    config = transformers.MuseGlimmerConfig(
        text_config={**TEXT, **changes}, vision_config=VISION, image_token_id=90, video_token_id=91,
        out_hidden_size=64, projector_hidden_size=24,
    )  # fmt: skip
    model = transformers.MuseGlimmerForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module", params=CHANGES.values(), ids=CHANGES)
def both(request, tmp_path_factory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("muse") / "theirs"
    model = reference(request.param)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("muse") / "theirs"
    reference({}).save_pretrained(folder)
    return folder


def tokens(length: int = sum(CUTS)) -> Tensor:
    return torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(1))


def check_equal(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Of the largest value: float32 sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def theirs_by_our_names(folder: Path, model: nn.Module) -> dict[str, str]:
    opened = open_foreign(folder, text_only=True)
    return {pair.name: pair.key for pair in opened.found.pairs}


def test_logits_equal_those_of_transformers(both):
    folder, model = both
    with torch.no_grad():
        ours = LLM.from_pretrained(folder, text_only=True)(tokens()).logits
        check_equal(ours, model(tokens()).logits, 1e-5)


def test_gradients_equal_those_of_transformers(both):
    """Of every parameter, each drawn away from where it would show nothing."""
    folder, model = both
    ours = LLM.from_pretrained(folder, text_only=True).train()
    ids = tokens()
    ours(ids[:, :-1], labels=ids[:, 1:]).loss_sum.backward()
    model.zero_grad()
    logits = model(ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    theirs = dict(model.named_parameters())
    names = theirs_by_our_names(folder, model)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        check_equal(parameter.grad, theirs[names[name]].grad, 1e-4)


def test_cached_decoding_equals_the_full_forward(both):
    ours = LLM.from_pretrained(both[0], text_only=True)
    with torch.no_grad():
        cache = Cache(ours.args)
        parts = [ours(part, cache=cache).logits for part in tokens().split(CUTS, dim=1)]
        check_equal(torch.cat(parts, dim=1), ours(tokens()).logits, 1e-5)


def test_the_text_model_alone_goes_out_as_it_came_in(both, tmp_path):
    folder, model = both
    convert.main(["import", str(folder), str(tmp_path / "ours"), "--text_only"])
    convert.main(["export", str(tmp_path / "ours"), str(tmp_path / "back")])
    back, came = tensors_of(tmp_path / "back"), tensors_of(folder)
    text = {key.replace("model.language_model.", "model."): t for key, t in came.items() if "vision" not in key}
    assert back.keys() == text.keys() and all(torch.equal(back[key], tensor) for key, tensor in text.items())
    inner, report = transformers.AutoModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"] and set(report["unexpected_keys"]) == {"lm_head.weight"}
    ids = tokens()
    with torch.no_grad():
        # the same code on the same numbers: a difference of one bit would be one of the configs
        assert torch.equal(inner.eval()(ids).last_hidden_state, model.model.language_model(ids).last_hidden_state)
    written, said = json.loads((tmp_path / "back/config.json").read_text()), model.config.text_config.to_dict()
    keys = (
        "hidden_size", "layer_types", "layer_rope_theta", "qk_scale_factor", "output_multiplier", "post_norm_eps",
        "rms_norm_eps", "final_logit_softcapping", "sliding_window", "attention_bias", "hidden_activation", "head_dim",
    )  # fmt: skip
    assert {key: written[key] for key in keys} == {key: said[key] for key in keys}
    assert meaning(open_foreign(tmp_path / "back").args) == meaning(open_foreign(folder, text_only=True).args)


def test_the_complete_model_comes_back_as_it_was(both, tmp_path):
    folder, model = both
    convert.main(["import", str(folder), str(tmp_path / "ours")])
    convert.main(["export", str(tmp_path / "ours"), str(tmp_path / "back")])
    back, came = tensors_of(tmp_path / "back"), tensors_of(folder)
    assert back.keys() == came.keys() and all(torch.equal(back[key], tensor) for key, tensor in came.items())
    loaded, report = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    ours, theirs = loaded.config.to_dict(), model.config.to_dict()
    odd = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    # ids of marks, which no number depends on: no tokenizer came with it
    assert odd <= {"_name_or_path", "text_config", "vision_config", "tie_word_embeddings"}
    marks = {"dtype", "pad_token_id", "bos_token_id", "eos_token_id"}
    others = {"dtype", "initializer_range", "max_position_embeddings"}  # of the tower, by which nothing goes
    for group, free in (("text_config", marks), ("vision_config", others)):
        assert {key for key in theirs[group] if ours[group].get(key) != theirs[group][key]} <= free


TOWER_KEYS = [
    ("vision_config", "patch_temporal", 1), ("vision_config", "hidden_act", "relu"),
    ("vision_config", "layer_norm_eps", 1e-6), ("vision_config", "pos_emb_width", 8),
    ("vision_config", "layer_types", ["window_attention"]), ("vision_config", "rope_parameters", {"rope_type": "odd"}),
    ("", "out_hidden_size", 32), ("", "projector_hidden_act", "relu"),
]  # fmt: skip


@pytest.mark.parametrize(("group", "key", "value"), TOWER_KEYS, ids=[key for _, key, _ in TOWER_KEYS])
def test_what_the_tower_cannot_follow_is_refused_by_key(group, key, value, released, tmp_path):
    folder = Path(shutil.copytree(released, tmp_path / "a"))
    config = json.loads((folder / "config.json").read_text())
    (config[group] if group else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config.json: {group}\.?{key}"):
        open_foreign(folder)


def test_its_own_processor_s_files_come_back_and_no_others_are_made(released, tmp_path):
    folder = Path(shutil.copytree(released, tmp_path / "a"))
    convert.main(["import", str(folder), str(tmp_path / "ours")])
    convert.main(["export", str(tmp_path / "ours"), str(tmp_path / "bare")])
    assert not list((tmp_path / "bare").glob("*processor*"))
    (folder / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 3136}, "resample": 3}')
    assert not open_foreign(folder).warnings
    convert.main(["import", str(folder), str(tmp_path / "with")])
    convert.main(["export", str(tmp_path / "with"), str(tmp_path / "back")])
    (file,) = (tmp_path / "back").glob("*processor*")
    assert file.read_bytes() == (folder / file.name).read_bytes()


def test_verify_compares_its_text_and_says_that_images_are_not(released, capsys):
    convert.main(["verify", str(released), "--with=transformers", "--tokens=300"])
    said = capsys.readouterr().out
    assert "rows with images          none" in said and "equal in transformers" in said


def test_a_tower_that_is_not_whole_is_refused_by_name(released, tmp_path):
    folder = Path(shutil.copytree(released, tmp_path / "a"))
    state = tensors_of(folder)
    del state["model.vision_tower.ln_pre.bias"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"misses model\.vision_tower\.ln_pre\.bias"):
        LLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("layer_rope_theta", [1e4, 0, 5e5, 1e4, 1e4, 0], "layer_rope_theta: layer 2 has 500000.0; only 0 (none) and"),
        ("layer_rope_theta", [0], "layer_rope_theta has 1 entries for 6 layers"),
        ("layer_types", ["chunked_attention"] * 6, "layer_types: chunked_attention is not one of"),
        ("sliding_window", None, "sliding_window is missing"),
        ("hidden_activation", "tanh", "hidden_act=tanh is not one of"),
    ],
)
def test_what_a_config_asks_beyond_that_is_refused_by_key(key, value, said, released, tmp_path):
    folder = Path(shutil.copytree(released, tmp_path / "a"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        open_foreign(folder, text_only=True)
    assert f"{folder}/config.json: " in str(error.value) and said in str(error.value)


def test_a_state_dict_loads_by_its_names(released):
    expected = LLM.from_pretrained(released, text_only=True)
    loaded = LLM(expected.args, seed=5)
    loaded.load_state_dict({key: tensor for key, tensor in tensors_of(released).items()})
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    attention = {
        key.removeprefix("model.language_model.layers.1.self_attn."): tensor + 1
        for key, tensor in tensors_of(released).items()
        if ".layers.1.self_attn." in key
    }
    loaded.layers[1].attention.load_state_dict(attention)
    assert torch.equal(loaded.layers[1].attention.wg.weight, attention["gate_proj.weight"])


def test_its_keys_are_left_out_of_what_is_written_of_other_models():
    plain = ModelArgs(dim=16, n_layers=1, n_heads=2)
    young = {"attn_gate", "embed_norm", "logit_scale", "post_norm_eps", "final_norm_plain"}
    assert not young & plain.model_dump().keys()
    muse = plain.model_copy(update={"attn_gate": True, "logit_scale": 0.5})
    assert ModelArgs.model_validate(muse.model_dump(mode="json")) == muse


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"post_norm_eps": 0.1}, "model.post_norm_eps=0.1 is of norms that norm_place=pre does not have"),
        ({"final_norm_plain": True}, "model.final_norm_plain is of models with norm_offset"),
    ],
)
def test_keys_of_norms_that_are_not_there_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        ModelArgs.model_validate({"dim": 16, "n_layers": 1, "n_heads": 2} | keys)
