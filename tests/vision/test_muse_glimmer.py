"""The tower of Muse Glimmer equals that of transformers, given the same random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm import LLM, ModelArgs
from llm.datatypes import TransformerInput
from vision.levels import normalised
from vision.patches import unfolded

transformers = pytest.importorskip("transformers")

VOCAB, SLOT = 97, 90
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, sliding_window=5, initializer_range=0.1,
    pad_token_id=None, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TOWER = dict(image_size=12, patch_size=3, dim=16, n_layers=6, n_heads=2, mlp_ratio=2.5, output_dim=24)
SIZES = {
    "as large as a window": [(12, 12)],
    "smaller, larger, wide and high": [(6, 12), (18, 30), (6, 6), (30, 6)],
}
NAMES = {
    "model.vision_tower.patch_embedder.patch_embedding": "vision_embeddings.patch",
    "model.vision_tower.patch_embedder.position_embedding_table.weight": "vision_embeddings.pos_embedding",
    "model.vision_tower.ln_pre": "vision_embeddings.norm_pre",
    "model.vision_tower.ln_post": "vision_embeddings.norm",
    "model.vision_tower.layers": "vision_embeddings.layers",
    "model.vision_adapter": "vision_embeddings.adapter",
    "model.vision_projection": "vision_projection",
    "norm1": "attention_norm",
    "norm2": "ffn_norm",
    "attn.q_proj": "attention.wq",
    "attn.k_proj": "attention.wk",
    "attn.v_proj": "attention.wv",
    "attn.proj": "attention.wo",
    "mlp.fc1": "feed_forward.w1",
    "mlp.fc2": "feed_forward.w2",
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LLM]:
    torch.manual_seed(0)
    config = transformers.MuseGlimmerConfig(
        text_config=TEXT, image_token_id=SLOT, video_token_id=91, out_hidden_size=64, projector_hidden_size=24,
        vision_config=dict(
            patch_size=3, pos_emb_height=4, pos_emb_width=4, num_attention_heads=2, num_hidden_layers=6,
            hidden_size=16, intermediate_size=40, initializer_range=0.1,
        ),
    )  # fmt: skip
    theirs = transformers.MuseGlimmerForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "vision" in name:  # at 0.02 all attention would be nearly even
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    folder = tmp_path_factory.mktemp("muse")
    theirs.save_pretrained(folder)
    return theirs, with_tower(theirs, folder)


def with_tower(theirs: Any, folder: Path) -> LLM:
    text = LLM.from_pretrained(folder, text_only=True)
    vision = TOWER | {"kind": "native", "patch_token_id": SLOT}
    model = LLM(ModelArgs.model_validate(text.args.model_dump() | {"vision": vision}))
    model.load_state_dict(text.state_dict() | named_as_ours(theirs.state_dict()))
    return model


def named_as_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is of the tower."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("model.vision"):
            for part, own in NAMES.items():
                name = name.replace(part, own)
            found[name] = tensor
    return found


def batch(sizes: list[tuple[int, int]]) -> tuple[TransformerInput, dict[str, Tensor]]:
    """Two rows, the second of text, as we and as they take them."""
    draw = torch.Generator().manual_seed(3)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=draw) for size in sizes]
    ids = torch.randint(3, SLOT, (2, 80), generator=draw)
    first = 2
    for height, width in sizes:
        ids[0, first : first + height * width // 36] = SLOT
        first += height * width // 36 + 3
    patches = [unfolded(normalised(image[None]), 3)[0] for image in images]
    grids = torch.tensor([(1, height // 3, width // 3) for height, width in sizes])
    theirs = {"pixel_values": torch.cat([torch.cat([p, p], -1) for p in patches]), "image_grid_thw": grids}
    return TransformerInput(ids, images=images), theirs | {"input_ids": ids}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_logits_and_the_towers_vectors_equal_those_of_transformers(
    both: tuple[Any, LLM], sizes: list[tuple[int, int]]
) -> None:
    theirs, model = both
    inputs, given = batch(sizes)
    seen = []
    hook = model.vision_embeddings.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        expected, actual = theirs(**given).logits, model(inputs).logits
        tower = theirs.model.vision_tower(given["pixel_values"], given["image_grid_thw"]).last_hidden_state
        tower = theirs.model.vision_adapter(tower)
    hook.remove()
    assert_near(seen[0], tower, 1e-5)  # both sum the same float32 terms in another order
    assert_near(actual, expected, 1e-5)


def test_gradients_of_the_tower_equal_those_of_transformers(both: tuple[Any, LLM]) -> None:
    theirs, model = both
    inputs, given = batch(SIZES["smaller, larger, wide and high"])
    labels = inputs.tokens.roll(-1, 1)
    theirs.zero_grad(), model.zero_grad()
    logits = theirs(**given).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    model(inputs, labels=labels).loss_sum.backward()
    expected = named_as_ours({name: p.grad for name, p in theirs.named_parameters()})
    mine = {name: p.grad for name, p in model.named_parameters() if name.startswith("vision")}
    assert mine.keys() == expected.keys()
    for name, gradient in mine.items():
        assert_near(gradient, expected[name], 1e-4)  # sums over all patches, in another order


def test_a_row_with_its_pictures_is_what_it_is_beside_others(both: tuple[Any, LLM]) -> None:
    _, model = both
    (one, _), (many, _) = (batch(sizes) for sizes in SIZES.values())
    length = 80
    rows = torch.cat([one.tokens[:1], many.tokens[:1]])
    together = model(TransformerInput(rows, images=[*one.images, *many.images])).logits
    alone = model(TransformerInput(many.tokens[:1], images=many.images)).logits
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-5)  # products of other heights
    assert alone.shape == (1, length, VOCAB)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.zeros(3, 12, 12)] * 2, "2 images fill 8 slots, but the tokens have 4"),
        ([torch.zeros(3, 12, 9)], r"images must be \(3, H, W\) with sides that 6 divides.*got \(3, 12, 9\)"),
        (torch.zeros(1, 3, 12, 9), r"with sides that 6 divides.*got \(3, 12, 9\)"),
    ],
    ids=["too many", "half a vector", "as tiles"],
)
def test_pictures_that_do_not_fit_are_refused(both: tuple[Any, LLM], images: Any, message: str) -> None:
    inputs, _ = batch(SIZES["as large as a window"])
    with pytest.raises(ValueError, match=message):
        both[1](TransformerInput(inputs.tokens, images=images))


def test_text_alone_gives_every_weight_of_the_tower_a_gradient_of_zero(both: tuple[Any, LLM]) -> None:
    _, model = both
    model.zero_grad()
    tokens = torch.randint(3, SLOT, (1, 20))
    model(TransformerInput(tokens), labels=tokens).loss_sum.backward()
    vision = [p for name, p in model.named_parameters() if name.startswith("vision")]
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in vision)
