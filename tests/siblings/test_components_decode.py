"""Transformer Components' `decode` with a cache: what it returns, when it begins anew, that it equals the whole row."""

import pytest
import torch

from llm.siblings.components import FFNConfig
from tests.siblings.test_components_layers import CLOSE, states
from tests.siblings.test_components_models import FULL, encoder_decoder


def both(**changes):
    """The same model with the cache and without."""
    cached = encoder_decoder(use_kv_cache=True, output_dim=3, **changes).eval()
    plain = encoder_decoder(output_dim=3, **changes).eval()
    plain.load_state_dict(cached.state_dict())
    return cached, plain


@pytest.mark.parametrize("kind", ["mha", "gqa", "mqa"])
def test_a_growing_target_is_computed_once_and_returned_whole(kind):
    cached, plain = both(attention_type=kind)
    memory, target = cached.encode(states(2, 6, 3)), states(2, 1, 3, seed=1)
    for _ in range(10):  # past max_seq_len, too
        found = cached.decode(target, memory, expanding_context=True)
        torch.testing.assert_close(found, plain.decode(target, memory), **CLOSE)
        assert cached._cache.length == target.shape[1]
        target = torch.cat([target, found[:, -1:]], dim=1)
    generated = plain.generate(states(2, 6, 3), states(2, 1, 3, seed=1), 10)
    torch.testing.assert_close(generated, target[:, 1:], **CLOSE)


def test_new_positions_alone_give_theirs_alone():
    cached, plain = both()
    memory, target = cached.encode(states(2, 6, 3)), states(2, 7, 3, seed=1)
    found = torch.cat([cached.decode(part, memory) for part in target.split([3, 1, 2, 1], dim=1)], dim=1)
    torch.testing.assert_close(found, plain.decode(target, memory), **CLOSE)


def test_the_same_target_again_and_a_shorter_one_are_what_they_were():
    cached, plain = both()
    memory, target = cached.encode(states(2, 6, 3)), states(2, 5, 3, seed=1)
    first = cached.decode(target, memory)
    torch.testing.assert_close(cached.decode(target, memory), first, rtol=0, atol=0)
    torch.testing.assert_close(cached.decode(target[:, :2], memory), plain.decode(target[:, :2], memory), **CLOSE)
    assert cached._cache.length == 5


def test_a_target_that_turns_off_after_its_first_position_begins_anew():
    cached, plain = both()
    memory, target = cached.encode(states(2, 6, 3)), states(2, 5, 3, seed=1)
    cached.decode(target, memory)
    other = torch.cat([target[:, :1], states(2, 3, 3, seed=2)], dim=1)
    torch.testing.assert_close(cached.decode(other, memory), plain.decode(other, memory), **CLOSE)


@pytest.mark.parametrize("source", [states(2, 6, 3, seed=5), states(2, 4, 3, seed=5), states(3, 6, 3, seed=5)])
def test_another_source_is_noticed(source):
    cached, plain = both()
    target = states(2, 5, 3, seed=1)
    cached.decode(target, cached.encode(states(2, 6, 3)))
    memory, other = cached.encode(source), states(len(source), 4, 3, seed=8)
    torch.testing.assert_close(cached.decode(other, memory), plain.decode(other, memory), **CLOSE)
    cached.reset_cache()
    torch.testing.assert_close(cached.decode(other, memory), plain.decode(other, memory), **CLOSE)


def test_keys_of_the_source_are_computed_once_for_all_steps():
    cached, _ = both()
    memory, target, calls = cached.encode(states(2, 6, 3)), states(2, 4, 3, seed=1), []
    cached.llm.layers[0].cross.wk.register_forward_hook(lambda *_: calls.append(1))
    for length in range(1, 5):
        cached.decode(target[:, :length], memory)
    assert len(calls) == 1


def test_padding_of_a_source_stays_unseen_in_every_step():
    cached, plain = both()
    source, mask = states(2, 6, 3), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    memory, target = cached.encode(source, mask=mask), states(2, 4, 3, seed=1)
    for length in (2, 3, 4):
        found = cached.decode(target[:, :length], memory, source_mask=mask)
    torch.testing.assert_close(found, plain(source, target, source_mask=mask), **CLOSE)


def test_a_sliding_context_forgets_the_oldest_positions_of_the_target_alone():
    cached, _ = both(max_seq_len=3)
    memory, target = cached.encode(states(1, 6, 3)), states(1, 8, 3, seed=1)
    results = []
    for first in (target[:, :4], states(1, 4, 3, seed=9)):
        cached.reset_cache()
        rows = torch.cat([first, target[:, 4:]], dim=1)
        results.append([cached.decode(part, memory, expanding_context=False) for part in rows.split(1, dim=1)][-1])
    torch.testing.assert_close(*results, **CLOSE)  # one decoder layer: four positions back nothing is seen


def test_with_experts_decoding_has_no_limit():
    cached, plain = both(ffn_config=FULL)
    memory, target = cached.encode(states(2, 6, 3)), states(2, 5, 3, seed=1)
    found = [cached.decode(target[:, :length], memory) for length in range(1, 6)]
    torch.testing.assert_close(found[-1], plain.decode(target, memory), **CLOSE)
    assert cached.overflow_rate is None or cached.overflow_rate == 0


def test_in_training_targets_are_whole_and_have_gradients():
    cached, plain = both(ffn_config=FFNConfig(16, 24))
    cached.train()
    source, target = states(2, 6, 3), states(2, 5, 3, seed=1)
    found = cached.decode(target, cached.encode(source))
    torch.testing.assert_close(found, plain(source, target), **CLOSE)
    assert found.requires_grad and cached._cache is None
