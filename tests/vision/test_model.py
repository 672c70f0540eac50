"""A model with a vision tower: where images go, what a batch without them does, and that how a forward is run changes
nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.cache import Cache
from llm.compile import compile_blocks
from llm.datatypes import TransformerInput
from llm.flops import tile_flops, token_flops, unit_flops
from llm.layers.dropout import token_keys
from llm.model import unit_names
from tests.vision.llama4 import PATCH, VOCAB, args, pictures, row

VISION = dict(image_size=8, patch_size=2, dim=16, n_layers=2, n_heads=2, pixel_shuffle_ratio=0.5)
SLOTS = 4
LENGTH = 24
IMAGES = ((1, 2), (), (3,))
"""Tiles of each image of each row."""


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(seed: int = 0, **changes: object) -> LLM:
    return LLM(ModelArgs.model_validate(args(VISION, 1, 2).model_dump() | changes), seed=seed)


def mixed() -> TransformerInput:
    ids = torch.stack([row(LENGTH, *tiles, slots=SLOTS, seed=b) for b, tiles in enumerate(IMAGES)])
    return TransformerInput(ids, images=pictures(6, 8))


def only_text() -> TransformerInput:
    return TransformerInput(torch.randint(0, PATCH, (2, LENGTH), generator=torch.Generator().manual_seed(3)))


def step(of: LLM, inputs: TransformerInput, keys_N: Tensor | None = None) -> list[Tensor]:
    """Loss and gradients; a parameter without one gives none."""
    of.zero_grad()
    out = of(inputs, labels=inputs.tokens.roll(-1, 1), keys_N=keys_N)
    out.loss_sum.backward()
    return [out.loss_sum.detach(), *(p.grad.clone() for p in of.parameters() if p.grad is not None)]


def of_vision(of: LLM) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in of.named_parameters() if name.startswith("vision_")}


def test_a_row_with_its_images_is_what_it_is_alone() -> None:
    whole, inputs = model(), mixed()
    together, first = whole(inputs).logits, 0
    for b, tiles in enumerate(IMAGES):
        alone = TransformerInput(inputs.tokens[b : b + 1], images=inputs.images[first : first + sum(tiles)])
        first += sum(tiles)
        torch.testing.assert_close(whole(alone).logits[0], together[b], rtol=0, atol=1e-5)  # products of other heights


def test_another_image_changes_its_own_row_from_its_slots_on_and_nothing_else() -> None:
    whole, inputs = model(), mixed()
    before = whole(inputs).logits
    inputs.images[-1] = 255 - inputs.images[-1]  # the last tile of the last row's image
    changed = (whole(inputs).logits != before).any(-1)
    first = 1 + 2 * SLOTS
    assert not changed[:2].any() and not changed[2, :first].any() and changed[2, first:].all()


def test_levels_and_normalised_floats_are_the_same_image() -> None:
    whole, inputs = model(), mixed()
    floats = TransformerInput(inputs.tokens, images=inputs.images.float() / 127.5 - 1)
    # 1/255 is rounded at another place
    torch.testing.assert_close(whole(floats).logits, whole(inputs).logits, rtol=0, atol=1e-5)


def test_text_alone_gives_every_weight_of_the_tower_a_gradient_of_zero() -> None:
    whole = model()
    step(whole, only_text())
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in of_vision(whole).values())


def test_text_alone_is_what_a_model_without_a_tower_makes_of_it() -> None:
    whole, inputs = model(), only_text()
    text = LLM(whole.args.model_copy(update={"vision": None}))
    text.load_state_dict({name: p for name, p in whole.named_parameters() if name not in of_vision(whole)})
    assert torch.equal(whole(inputs).logits, text(inputs).logits)


@pytest.mark.parametrize("inputs", [mixed(), only_text()], ids=["images", "text alone"])
def test_a_frozen_tower_gets_no_gradients_and_its_projection_the_same(inputs: TransformerInput) -> None:
    whole, frozen = model(), model()
    for name, parameter in of_vision(frozen).items():
        parameter.requires_grad_(name.startswith("vision_projection"))
    step(whole, inputs), step(frozen, inputs)
    assert torch.equal(frozen.vision_projection.weight.grad, whole.vision_projection.weight.grad)
    assert all(p.grad is None for p in frozen.vision_embeddings.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_keeps_losses_and_gradients_bit_for_bit(mode: str, dtype: torch.dtype) -> None:
    whole = model().to(dtype)
    expected = step(whole, mixed())
    whole.activation_checkpointing = mode
    assert all(map(torch.equal, step(whole, mixed()), expected))


def test_bf16_is_near_float32() -> None:
    exact, rounded = model()(mixed()).logits, model().to(torch.bfloat16)(mixed()).logits
    # 8 bits of mantissa, over 4 layers and the adapter
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.full  # compiles for a minute
def test_a_compiled_tower_takes_the_eager_ones_step(fresh_compiler: None) -> None:
    eager, compiled = model(), model()
    compile_blocks(compiled, backend="aot_eager")
    assert {name for name in compiled.compiled if name.startswith("vision")} == {
        f"vision_embeddings.layers.{i}" for i in range(2)
    }
    for inputs in (mixed(), only_text()):
        for value, expected in zip(step(compiled, inputs), step(eager, inputs), strict=True):
            assert (value - expected).norm() <= 1e-5 * expected.norm().clamp(min=1e-6)  # sums in another order


def test_a_text_goes_on_after_images_in_the_cache() -> None:
    whole, inputs, cut = model(), mixed(), 20  # behind the last slot
    assert not (inputs.tokens[:, cut:] == PATCH).any()
    expected, cache = whole(inputs).logits[:, cut:], Cache(whole.args)
    whole(TransformerInput(inputs.tokens[:, :cut], images=inputs.images), cache=cache)
    steps = [whole(TransformerInput(inputs.tokens[:, i : i + 1]), cache=cache).logits for i in range(cut, LENGTH)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-5)  # attention sums in another order


def test_the_stage_with_the_token_table_has_the_tower() -> None:
    whole, inputs = model(), mixed()
    names = unit_names(whole.args)
    assert names[:2] == ("vision", "tok_embeddings")
    first, second = (LLM(whole.args, units=part) for part in (names[:3], names[3:]))
    assert not of_vision(second)
    assert torch.equal(second(inputs, x=first(inputs, return_hidden=True).hidden).logits, whole(inputs).logits)


def test_dropout_in_the_tower_follows_the_tokens_of_a_row() -> None:
    lora = dict(rank=2, dropout=0.5, targets=["vision.wq", "vision.w2", "vision.fc1", "vision_projection"])
    whole, inputs = model(lora=lora), mixed()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    keys = token_keys(7, 1, torch.arange(3), inputs.tokens.numel())
    dropped = whole(inputs, keys_N=keys).logits
    alone = TransformerInput(inputs.tokens[2:], images=inputs.images[3:])
    assert (dropped - whole(inputs).logits).abs().max() > 1e-3
    # products of other heights
    torch.testing.assert_close(whole(alone, keys_N=keys[-LENGTH:]).logits[0], dropped[2], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pictures(5, 8), "5 tiles of images fill 20 slots, but the tokens have 24"),
        (None, "0 tiles of images fill 0 slots, but the tokens have 24"),
        (pictures(6, 10), r"images must be tiles \(n, 3, 8, 8\).*got \(6, 3, 10, 10\)"),
        (pictures(6, 8).long(), "images must be uint8 levels or floats; got torch.int64"),
    ],
    ids=["too few", "none", "another size", "another dtype"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_images_that_do_not_fit_are_refused(images: Tensor | None, message: str, grad: bool) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        model()(TransformerInput(mixed().tokens, images=images))


def test_images_for_a_model_without_a_tower_are_refused() -> None:
    with pytest.raises(ValueError, match="the model has no vision tower"):
        model(vision=None)(mixed())


def test_a_token_of_a_video_is_refused() -> None:
    inputs, video = mixed(), VOCAB - 1
    inputs.tokens[1, -1] = video
    with pytest.raises(ValueError, match=f"token {video} stands for a video"):
        model(vision={**args(VISION, 1, 2).vision.model_dump(), "video_token_id": video})(inputs)


def test_a_slot_must_be_a_token() -> None:
    with pytest.raises(ValueError, match=f"model.vision.patch_token_id=-1 must be a token.*vocab_size={VOCAB}"):
        model(vision=VISION)


def test_a_tiles_arithmetic_is_that_of_its_patches_and_vectors() -> None:
    whole = args(VISION, 1, 2)
    dim, places, hidden, out, text = 16, 17, 64, 20, whole.dim
    layer = places * (6 * (4 * dim * dim + 2 * dim * hidden + 5 * dim + hidden + 4 * dim) + 12 * dim * places)
    ends = 6 * (16 * 3 * 4 * dim + places * 4 * dim)
    after = SLOTS * 6 * (4 * dim * out + out * out + out * text)
    assert tile_flops(whole) == 2 * layer + ends + after
    assert unit_flops(whole, 64)["vision"] == round(tile_flops(whole) / (4 * SLOTS))  # a quarter of the tokens
    assert token_flops(whole, 64, 0) == token_flops(whole.model_copy(update={"vision": None}), 64)
