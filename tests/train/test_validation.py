"""When a run has stopped getting better."""

from dataclasses import asdict

from llm.train.validation import Best


def test_patience_counts_validations_since_the_best() -> None:
    best = Best()
    seen = [(best.update(loss, step), best.exhausted(2)) for step, loss in enumerate([3.0, 2.0, 2.5, 1.9, 1.9, 2.0], 1)]
    assert seen == [(True, False), (True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (best.valid_loss, best.step) == (1.9, 4)


def test_no_patience_is_endless_and_more_patience_goes_on() -> None:
    best = Best(valid_loss=1.0, step=1, since=5)
    assert not best.exhausted(None) and best.exhausted(5) and not best.exhausted(6)


def test_it_survives_a_checkpoint_also_one_from_before_patience() -> None:
    best = Best(valid_loss=1.0, step=1, since=5)
    assert Best(**asdict(best)) == best
    assert Best(**{"valid_loss": 1.0, "step": 1}) == Best(1.0, 1, 0)
