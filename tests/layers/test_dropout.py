"""Dropout's masks: what they depend on, and what not."""

import torch

from llm.kernels.keyed import with_numbers
from llm.layers.dropout import dropout_at, dropped, key_of, token_keys

SITE = key_of("layers.0.attention.wq")


def kept(rows: list[int], width: int = 24, rate: float = 0.25, *, step: int = 3, site: int = SITE) -> torch.Tensor:
    """(rows, 8 tokens, width) bool."""
    keys = token_keys(1, step, torch.tensor(rows), 8 * len(rows))
    return dropped(torch.ones(8 * len(rows), width), keys, site, rate).view(len(rows), 8, width) != 0


def test_a_rows_mask_is_its_own_however_rows_are_batched() -> None:
    whole = kept([5, 6, 7, 8])
    assert torch.equal(whole, torch.cat([kept([5, 6]), kept([7]), kept([8])]))
    assert torch.equal(whole.flip(0), kept([8, 7, 6, 5]))


def test_a_part_of_a_tokens_elements_has_its_part_of_the_mask() -> None:
    keys, x = token_keys(0, 0, torch.tensor([4]), 8), torch.ones(8, 30)
    whole = dropped(x, keys, SITE, 0.5)
    for first, end in ((0, 30), (3, 17), (8, 9), (13, 30)):
        assert torch.equal(dropped(x[:, first:end], keys, SITE, 0.5, first), whole[:, first:end])


def test_rows_positions_steps_sites_and_seeds_choose_apart() -> None:
    one = kept([5], 4096)
    others = [kept([6], 4096), kept([5], 4096, step=4), kept([5], 4096, site=key_of("layers.1.attention.wq"))]
    keys = token_keys(2, 3, torch.tensor([5]), 8)
    others.append((dropped(torch.ones(8, 4096), keys, SITE, 0.25) != 0)[None])
    others.append(one.roll(1, dims=1))
    numbered = with_numbers(token_keys(1, 3, torch.tensor([5]), 8), torch.ones(8, dtype=torch.int64))
    others.append((dropped(torch.ones(8, 4096), numbered, SITE, 0.25) != 0)[None])
    for other in others:  # independent masks agree in 0.75^2 + 0.25^2 = 0.625 of 32768 places, +-0.0027
        assert abs(float((one == other).float().mean()) - 0.625) < 0.016


def test_about_the_rate_is_dropped_and_the_mean_stays() -> None:
    keys, x = token_keys(0, 1, torch.arange(64), 64 * 16), torch.ones(64 * 16, 256)
    for rate in (0.0, 0.1, 0.5, 0.999):
        out = dropped(x, keys, SITE, rate)
        share = float((out == 0).float().mean())
        assert abs(share - rate) < 6 * (rate * (1 - rate) / x.numel()) ** 0.5 + 2**-17
        assert len(out.unique()) <= 2
        # the mean of 262,144 values of 0 and 1 / (1 - rate)
        assert abs(float(out.double().mean()) - 1) < 6 * (rate / (1 - rate) / x.numel()) ** 0.5 + 1e-6
    assert torch.equal(dropped(x, keys, SITE, 0.0), x)


def test_the_bits_are_those_of_numbers_without_a_limit_cut_to_64_bits() -> None:
    golden, word = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mixed(z: int) -> int:
        z &= word
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        return z ^ (z >> 31)

    rows = [0, 2**40]
    expected = [mixed(mixed(row * golden + key_of(7, 11)) + place * golden) for row in rows for place in (0, 1)]
    keys = token_keys(7, 11, torch.tensor(rows), 4)
    assert [key & word for key in keys.tolist()] == expected
    lanes = []
    for key in expected:
        words = [mixed(mixed(key ^ (SITE & word)) + number * golden) for number in range(3)]
        lanes.append([words[e // 4] >> 16 * (e % 4) & 0xFFFF for e in range(9)])
    mask = dropped(torch.ones(4, 9), keys, SITE, 0.25) != 0
    # a lane is read as a signed number, of which the lowest quarter is dropped
    assert mask.tolist() == [[(lane ^ 0x8000) >= 0x4000 for lane in row] for row in lanes]


def test_the_gradient_passes_where_the_value_does() -> None:
    keys = token_keys(0, 0, torch.tensor([4]), 8)
    x = torch.randn(8, 30, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropped(x, keys, SITE, 0.5, 3), x)
    assert torch.autograd.gradgradcheck(lambda x: dropped(x, keys, SITE, 0.5, 3), x)


def test_masks_of_places_and_layers_are_independent() -> None:
    rate, n = 0.1, 64 * 8 * 256
    keys, x = token_keys(0, 1, torch.arange(64), 64 * 8), torch.ones(64 * 8, 256)
    places = [dropout_at(rate, kind, f"layers.{i}.attention") for kind in ("residual", "hidden") for i in (0, 1, 2)]
    lost = torch.stack([(place(x, keys) == 0).double().flatten() for place in places if place is not None])
    share = rate * (1 - rate)
    # an exact share of 6554 / 65536; its error in n draws, and that of a correlation, n^-1/2
    assert (lost.mean(1) - 6554 / 65536).abs().max() < 4 * (share / n) ** 0.5
    assert (torch.corrcoef(lost) - torch.eye(len(lost))).abs().max() < 4 * n**-0.5
