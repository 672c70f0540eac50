"""Which ranks are together along each dimension of a layout."""

from typing import get_args

import pytest

from llm.parallel.layout import Dimension, Layout

LAYOUT = Layout(48, tensor=2, pipeline=2, context=3, expert=2)


@pytest.mark.parametrize("dimension", get_args(Dimension))
def test_every_rank_is_in_one_group_of_a_dimension(dimension: Dimension) -> None:
    groups = list(LAYOUT.groups(dimension))
    assert sorted(rank for group in groups for rank in group) == list(range(LAYOUT.world))
    assert {len(group) for group in groups} == {LAYOUT.size(dimension)}


def test_gradients_are_summed_over_ranks_that_differ_in_rows_or_context() -> None:
    for group in LAYOUT.groups("reduce"):
        places = [LAYOUT.place(rank) for rank in group]
        assert len({(place.pipeline, place.tensor) for place in places}) == 1
        assert len({(place.data, place.context) for place in places}) == LAYOUT.data * LAYOUT.context


def test_without_context_parallelism_they_are_the_ranks_of_other_rows() -> None:
    layout = Layout(8, tensor=2)
    assert list(layout.groups("reduce")) == list(layout.groups("data"))
