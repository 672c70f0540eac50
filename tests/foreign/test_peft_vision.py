"""Adapters of a vision tower and its projection as PEFT keeps them beside those of the text model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.adapters.peft_folder import open_peft
from llm.args import LoraArgs
from llm.datatypes import TransformerInput
from llm.errors import UserError
from llm.foreign.family import family_named
from llm.pretrained import adapter_of
from tests.foreign.multimodal import pixels, reference, row_of
from tests.foreign.test_peft import EVERYWHERE, OF_STATES, adapted, adapters_of, in_peft, write

FAMILY = family_named("llama4")
OF_VISION = (
    "vision.fc1", "vision.fc2", "vision.w1", "vision.w2", "vision.wk", "vision.wo", "vision.wq", "vision.wv",
    "vision_projection",
)  # fmt: skip
TARGETS = {
    "all": (*(name for name in EVERYWHERE if name not in OF_STATES), *OF_VISION),
    "the projection alone": ("vision_projection",),
    "what the text model calls otherwise": ("wq", "w2", "vision.fc2", "vision.w1", "vision.wk"),
    "what the text model calls so too": ("w1", "vision.fc1", "vision.wq"),
}
# of PEFT: that patterns of parameters "match no module", though it uses them
pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")


def args_of(base: Any, targets: tuple[str, ...]) -> ModelArgs:
    args = ModelArgs.model_validate(FAMILY.read_config(base.config.to_dict(), lambda _: None))
    return args.model_copy(update={"lora": LoraArgs(rank=3, alpha=6.0, targets=targets)})


@torch.no_grad()
def logits(model: Any, per_tile: int) -> Tensor:
    """Of a row with an image of two tiles."""
    ids, tiles = row_of(per_tile, 2)[None], pixels(2)
    if isinstance(model, LLM):
        return model(TransformerInput(ids, images=tiles)).logits
    return model(input_ids=ids, pixel_values=tiles).logits


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_peft_gives_the_logits_of_our_adapters_and_they_come_in_as_they_went_out(
    tmp_path: Path, targets: tuple[str, ...]
) -> None:
    base = reference()
    args = args_of(base, targets)
    assert args.vision is not None
    ours, per_tile = adapted(args, base), args.vision.tokens_per_tile
    folder = write(tmp_path / "adapter", ours, "llama4")
    again, tensors = open_peft(folder).adapter(args.merged, FAMILY)
    plain, expected = logits(base, per_tile), logits(ours, per_tile)
    theirs = in_peft(base, folder)
    assert (expected - plain).abs().max() > 0.01 * plain.abs().max(), "the adapters do nothing"
    # float32: products of other shapes in another order
    assert (logits(theirs, per_tile) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert again == args
    held = adapters_of(ours)
    assert tensors.keys() == held.keys() and all(torch.equal(tensors[key], held[key]) for key in held)
    drawn = {key for key, value in theirs.named_parameters() if "lora_" in key and "B" in key and not value.any()}
    assert not drawn, "PEFT has made adapters that ours do not have"


def test_an_adapter_that_peft_made_of_tower_and_text_is_a_model_of_ours(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = reference()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    modules = ["q_proj", "v_proj", "fc1", "linear_1"]
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules)).eval()
    with torch.no_grad():
        for i, (key, parameter) in enumerate(theirs.named_parameters()):
            if "lora_" in key:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    theirs.save_pretrained(tmp_path / "adapter")
    per_tile = args_of(base, ("wq",)).vision.tokens_per_tile
    expected, found = logits(theirs, per_tile), logits(LLM.from_pretrained(tmp_path / "adapter"), per_tile)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # float32: ours adds W and B A first
    lora = adapter_of(tmp_path / "adapter").lora
    assert lora.targets == ("wq", "wv", "vision.fc1", "vision.w1", "vision.wq", "vision.wv", "vision_projection")


@pytest.mark.parametrize(("module", "key"), [("linear", "patch_embedding.linear"), ("router", "feed_forward.router")])
def test_an_adapter_of_what_has_none_here_is_refused_by_its_key(tmp_path: Path, module: str, key: str) -> None:
    peft = pytest.importorskip("peft")
    base = reference()
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["o_proj", module]))
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"it has adapters of .*{key}\.weight, which can have none here; PEFT's merge"):
        open_peft(tmp_path / "adapter").adapter(args_of(base, ("wo",)).merged, FAMILY)


def test_an_adapter_of_the_tower_is_none_of_the_text_model_alone(tmp_path: Path) -> None:
    base = reference()
    args = args_of(base, ("wq", "vision.wq"))
    folder = write(tmp_path / "adapter", adapted(args, base), "llama4")
    blind = args.merged.model_copy(update={"vision": None})
    with pytest.raises(UserError, match="not an adapter of this llama4 model, which has no place for .*vision_model"):
        open_peft(folder).adapter(blind, FAMILY)
