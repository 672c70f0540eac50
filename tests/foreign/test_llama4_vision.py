"""The complete Llama 4, with its vision tower: in and out of Hugging Face's and Meta's files without a changed bit."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from llm import LLM
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.foreign import processor
from llm.foreign.export import meaning
from llm.foreign.families.llama4_vision import between_patches
from llm.foreign.files import open_foreign
from llm.foreign.processor import BOTH, IMAGE
from tests.foreign.folders import refused, rewrite, tensors_of
from tests.foreign.models import transformers
from tests.foreign.multimodal import SLOT, VOCAB, meta_shards, pixels, row_of, saved
from tools import convert

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("llama4") / "theirs"
    return folder, saved(folder)


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def differences(first: dict, second: dict, above: str = "") -> set[str]:
    found: set[str] = set()
    for key in first.keys() | second.keys():
        one, other = first.get(key), second.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= differences(one, other, f"{above}{key}.")
        elif one != other:
            found.add(above + key)
    return found


def test_hugging_face_s_files_come_back_as_they_were(theirs, tmp_path):
    folder, model = theirs
    convert.main(["import", str(folder), str(tmp_path / "ours")])
    convert.main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--shard_gb=4e-5"])
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert_same(tensors_of(tmp_path / "back"), tensors_of(folder))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    # of ids that no weight or number depends on: no tokenizer came with it
    assert differences(config.to_dict(), model.config.to_dict()) <= {"_name_or_path", "text_config.pad_token_id"}
    back, report = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    assert_same(back.state_dict(), model.state_dict())


def test_the_config_is_read_key_by_key(theirs):
    vision = open_foreign(theirs[0]).args.vision
    assert vision is not None
    assert (vision.image_size, vision.patch_size, vision.dim, vision.n_layers, vision.n_heads) == (16, 4, 16, 2, 2)
    assert (vision.mlp_ratio, vision.output_dim, vision.pixel_shuffle_ratio) == (4.0, 24, 0.5)
    assert (vision.patch_token_id, vision.max_tiles, vision.rope_theta, vision.norm_eps) == (SLOT, 16, 1e4, 1e-5)


REFUSED = {
    "intermediate_size": 48, "projector_input_dim": 32, "projector_output_dim": 32, "image_size": [16, 20],
    "norm_eps": 1e-6, "hidden_act": "relu", "num_channels": 1, "multi_modal_projector_bias": True,
    "vision_feature_select_strategy": "full", "rope_parameters": {"rope_type": "linear", "factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_tower_cannot_follow_is_refused_by_key(key, theirs, tmp_path):
    folder = Path(shutil.copytree(theirs[0], tmp_path / "a"))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"][key] = REFUSED[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config.json: vision_config\.{key}") as error:
        open_foreign(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("vision_model.layernorm_post.bias"), "misses vision_model.layernorm_post.bias"),
        (lambda state: state.pop("multi_modal_projector.linear_1.weight"), "misses multi_modal_projector.linear_1"),
        (
            lambda state: state.update({"vision_model.model.layers.2.mlp.fc1.bias": torch.zeros(64)}),
            "has vision_model.model.layers.2.mlp.fc1.bias, which the family does not know",
        ),
        (
            lambda state: state.update({"vision_model.class_embedding": torch.zeros(15)}),
            r"has vision_model.class_embedding of shape \(15,\), not \(16,\)",
        ),
    ],
    ids=["a bias of the tower", "the projection", "a layer too many", "another width"],
)
def test_a_tower_that_is_not_whole_is_refused_by_name(change, said, theirs, tmp_path):
    folder = Path(shutil.copytree(theirs[0], tmp_path / "a"))
    state = tensors_of(folder)
    change(state)
    put(folder, state)
    with pytest.raises(UserError, match=said):
        LLM.from_pretrained(folder)


def put(folder: Path, state: State) -> None:
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_a_tower_that_the_config_does_not_mention_is_refused(theirs, tmp_path, capsys):
    folder = Path(shutil.copytree(theirs[0], tmp_path / "a"))
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]
    (folder / "config.json").write_text(json.dumps(config))
    line = refused(capsys, "import", folder, tmp_path / "b")
    assert "config.json: vision_config is missing" in line and "--text_only" in line
    convert.main(["import", str(folder), str(tmp_path / "b"), "--text_only"])


def test_how_pictures_become_tiles_is_written_and_read_back(theirs, tmp_path):
    folder = Path(shutil.copytree(theirs[0], tmp_path / "a"))
    settings = {"image_processor_type": "Llama4ImageProcessorFast", "max_patches": 4, "mark": "as it came",
                "size": {"height": 16, "width": 16}, "rescale_factor": 0.00392156862745098}  # fmt: skip
    (folder / IMAGE).write_text(json.dumps(settings))
    convert.main(["import", str(folder), str(tmp_path / "b")])
    convert.main(["export", str(tmp_path / "b"), str(tmp_path / "c")])
    assert json.loads((tmp_path / "c" / IMAGE).read_text()) == settings
    assert LLM.from_pretrained(tmp_path / "b").args.vision.max_tiles == 4

    convert.main(["import", str(folder), str(tmp_path / "d"), '--set=vision={"max_tiles": 9}'])
    convert.main(["export", str(tmp_path / "d"), str(tmp_path / "e")])
    image, both = (json.loads((tmp_path / "e" / name).read_text()) for name in (IMAGE, BOTH))
    assert (image["max_patches"], image["size"], image["image_mean"]) == (9, {"height": 16, "width": 16}, [0.5] * 3)
    assert (both["processor_class"], both["patch_size"], both["patch_token"]) == ("Llama4Processor", 4, "<|patch|>")
    opened = open_foreign(tmp_path / "e")
    assert opened.args.vision.max_tiles == 9 and not opened.warnings


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (IMAGE, {"resize_to_max_canvas": True}, "resize_to_max_canvas=True, but"),
        (IMAGE, {"image_mean": [0.48, 0.45, 0.4]}, "image_mean="),
        (IMAGE, {"size": {"height": 32, "width": 32}}, "size={'height': 32, 'width': 32}, but"),
        (BOTH, {"image_processor": {"do_normalize": False}}, "processor_config.json: do_normalize=False, but"),
        (BOTH, {"patch_token": "<|spot|>"}, "patch_token=<|spot|>, but"),
    ],
)
def test_another_way_from_pictures_to_tiles_is_noted(name, content, said, theirs, tmp_path):
    folder = Path(shutil.copytree(theirs[0], tmp_path / "a"))
    (folder / name).write_text(json.dumps(content))
    (line,) = open_foreign(folder).warnings
    assert said in line


PARAMS = {
    "dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "vocab_size": VOCAB, "multiple_of": 8, "norm_eps": 1e-5,
    "ffn_dim_multiplier": 0.4765625, "ffn_exp": 4.5, "rope_theta": 500000.0, "use_qk_norm": True,
    "nope_layer_interval": 3, "attention_chunk_size": 64, "attn_temperature_tuning": True,
    "moe_args": {"num_experts": 2, "top_k": 1, "interleave_moe_layer_step": 2, "capacity_factor": 1.0},
    "vision_args": {
        "image_size": {"height": 16, "width": 16}, "patch_size": {"height": 4, "width": 4}, "dim": 16, "n_layers": 2,
        "n_heads": 2, "mlp_ratio": 4.0, "output_dim": 24, "pixel_shuffle_ratio": 0.5,
    },
}  # fmt: skip


def meta_folder(folder: Path, source: Path, ranks: int) -> Path:
    """The same model as Meta keeps it: the text part by our export, whose cuts test_meta.py compares with hand-made
    ones, the tower and the params by hand."""
    convert.main(["import", str(source), str(folder.parent / f"{folder.name}_text"), "--text_only"])
    convert.main(
        ["export", str(folder.parent / f"{folder.name}_text"), str(folder), "--format=meta", f"--shards={ranks}"]
    )
    for rank, tower in enumerate(meta_shards(tensors_of(source), ranks)):
        file = folder / f"consolidated.{rank:02d}.pth"
        torch.save({**torch.load(file), **tower}, file)
    (folder / "params.json").write_text(json.dumps(PARAMS))
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_meta_s_parts_come_back_as_they_were_and_are_the_same_model(ranks, theirs, tmp_path, capsys):
    folder = meta_folder(tmp_path / "meta", theirs[0], ranks)
    capsys.readouterr()
    convert.main(["import", str(folder), str(tmp_path / "ours"), f"--set=vision.patch_token_id={SLOT}"])
    assert "<|patch|>" not in capsys.readouterr().out
    convert.main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--format=meta", f"--shards={ranks}"])
    for rank in range(ranks):
        name = f"consolidated.{rank:02d}.pth"
        assert_same(torch.load(tmp_path / "back" / name), torch.load(folder / name))
    assert meaning(open_foreign(tmp_path / "back").args, True) == meaning(open_foreign(folder).args, True)
    assert json.loads((tmp_path / "back" / "params.json").read_text())["vision_args"] == PARAMS["vision_args"]

    convert.main(["export", str(tmp_path / "ours"), str(tmp_path / "hf")])
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(theirs[0]))


def test_a_part_of_the_tower_that_differs_between_files_is_refused(theirs, tmp_path, capsys):
    folder = meta_folder(tmp_path / "meta", theirs[0], 2)
    file = folder / "consolidated.01.pth"
    state = torch.load(file)
    state["vision_embeddings.vision_encoder.ln_pre.bias"] += 1
    torch.save(state, file)
    line = refused(capsys, "import", folder, tmp_path / "b", f"--set=vision.patch_token_id={SLOT}")
    assert "ln_pre.bias of part 1 holds the same weights" in line


def resampled(table: Tensor) -> Tensor:
    """Positions (G^2 + 1, D) as Meta's load hook resamples them, by torch's own sampling."""
    side = round((len(table) - 1) ** 0.5)
    at = torch.arange(side) / side * 2 - 1
    grid = torch.stack([at[None].expand(side, side), at[:, None].expand(side, side)], dim=-1)
    patches = table[1:].view(1, side, side, -1).permute(0, 3, 1, 2)
    sampled = grid_sample(patches, grid[None], padding_mode="zeros", align_corners=False)
    return torch.cat([sampled[0].permute(1, 2, 0).flatten(0, 1), table[:1]])


@pytest.mark.parametrize("side", [1, 4, 7])
def test_older_positions_are_resampled_as_meta_does(side):
    table = torch.randn(side * side + 1, 6, generator=torch.Generator().manual_seed(0))
    # weights of sampling are rounded: of positions up to 4
    torch.testing.assert_close(between_patches(table), resampled(table), rtol=0, atol=4e-6)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the newer name"])
def test_older_positions_in_files_hold(beside, theirs, tmp_path, caplog):
    folder = meta_folder(tmp_path / "meta", theirs[0], 2)
    older = torch.randn(17, 16)
    for file in folder.glob("*.pth"):
        state = torch.load(file)
        state["vision_embeddings.vision_encoder.positional_embedding"] = older
        if not beside:
            del state["vision_embeddings.vision_encoder.positional_embedding_vlm"]
        torch.save(state, file)
    table = LLM.from_pretrained(folder).get_parameter("vision_embeddings.pos_embedding")
    assert torch.equal(table, between_patches(older))
    assert "positional_embedding is resampled" in caplog.text and ("passed over" in caplog.text) == beside


def test_a_state_dict_loads_by_hugging_face_s_and_by_meta_s_names(theirs, tmp_path):
    folder, model = theirs
    expected = LLM.from_pretrained(folder)
    meta = torch.load(meta_folder(tmp_path / "meta", folder, 1) / "consolidated.00.pth")
    for state in (model.state_dict(), meta):
        loaded = LLM(expected.args, seed=5)
        loaded.load_state_dict(state)
        assert_same(loaded.state_dict(), expected.state_dict())
    older = "vision_embeddings.vision_encoder.positional_embedding"
    del meta[f"{older}_vlm"]
    loaded.load_state_dict({**meta, older: torch.ones(17, 16)})
    assert torch.equal(loaded.get_parameter("vision_embeddings.pos_embedding"), between_patches(torch.ones(17, 16)))
    with pytest.raises(UserError, match="misses vision_model.layernorm_pre.weight"):
        state = model.state_dict()
        del state["vision_model.layernorm_pre.weight"]
        loaded.load_state_dict(state)


def test_the_text_model_alone_is_taken_only_when_asked_for(theirs, tmp_path, capsys):
    folder, model = theirs
    convert.main(["import", str(folder), str(tmp_path / "text"), "--text_only"])
    tower = [key for key in tensors_of(folder) if not key.startswith("language_model.")]
    assert f"note: text_only: {len(tower)} tensors of multi_modal_projector and vision_model" in capsys.readouterr().out
    text, same = LLM.from_pretrained(tmp_path / "text"), LLM.from_pretrained(folder, text_only=True)
    assert text.args.vision is None and same.args == text.args
    assert LLM.from_pretrained(folder).args.vision is not None
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        # float32 sums in another order
        torch.testing.assert_close(text(ids).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    with pytest.raises(UserError, match="text_only is of foreign folders"):
        LLM.from_pretrained(tmp_path / "text", text_only=True)


def test_a_tower_that_is_not_there_makes_it_the_text_model(theirs, tmp_path, caplog):
    folder = Path(shutil.copytree(theirs[0], tmp_path / "a"))
    put(folder, {key: t for key, t in tensors_of(folder).items() if key.startswith("language_model.")})
    assert LLM.from_pretrained(folder).args.vision is None
    assert "describes a vision tower, but there are no weights of one" in caplog.text


def test_meta_s_slots_are_those_of_the_tokenizer_or_said_to_be_guessed(theirs, tmp_path, monkeypatch):
    folder = meta_folder(tmp_path / "meta", theirs[0], 1)
    opened = open_foreign(folder)
    assert opened.args.vision.patch_token_id == VOCAB - 1
    assert any("taken as id 96; give another as --set=vision.patch_token_id=ID" in line for line in opened.warnings)
    known = SimpleNamespace(control_tokens={"<|patch|>": SLOT})
    monkeypatch.setattr(processor, "foreign_tokenizer", lambda path: (known, None))
    opened = open_foreign(folder)
    assert opened.args.vision.patch_token_id == SLOT and not opened.warnings


ROWS = {"one tile": (1,), "three tiles": (3,), "rows of one and of two": (1, 2), "text and one tile": (0, 1)}


@pytest.mark.parametrize("tiles", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_logits_equal_those_of_transformers(tiles, top_k, tmp_path):
    model = saved(tmp_path / "a", text={"num_experts_per_tok": top_k})
    ours = LLM.from_pretrained(tmp_path / "a")
    rows = [row_of(4, n, seed) for seed, n in enumerate(tiles)]
    ids = torch.stack([torch.cat([row, torch.arange(max(map(len, rows)) - len(row))]) for row in rows])
    images = pixels(sum(tiles))
    with torch.no_grad():
        expected = model(ids, pixel_values=images).logits
        actual = ours(TransformerInput(ids, images=images)).logits
    # float32 sums in another order
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_verify_compares_rows_with_images_too(tmp_path, capsys):
    folder = tmp_path / "theirs"
    saved(folder)
    convert.main(["verify", str(folder), "--with=transformers", "--tokens=64"])
    said = capsys.readouterr().out
    assert "rows with images          2 of 3" in said and "equal in transformers" in said
    convert.main(["import", str(folder), str(tmp_path / "a")])
    rewrite(folder, lambda key, t: t + (key == "multi_modal_projector.linear_1.weight"))
    with pytest.raises(SystemExit):
        convert.main(["verify", str(folder), str(tmp_path / "a"), "--tokens=64"])
    assert "differ by more" in capsys.readouterr().out


def test_what_inspect_says_of_a_model_with_vision(theirs, capsys):
    convert.main(["inspect", str(theirs[0])])
    said = capsys.readouterr().out
    assert f"parameters  {theirs[1].num_parameters():,}, float32" in said and "not read" not in said
    assert '"patch_token_id": 90' in said
    convert.main(["inspect", str(theirs[0]), "--text_only"])
    said = capsys.readouterr().out
    assert "note: text_only: " in said and "vision:" not in said
