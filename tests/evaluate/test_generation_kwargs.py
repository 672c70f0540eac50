"""What lm-eval's tasks say of how to generate, as settings of ours."""

import pytest

from llm.errors import UserError
from llm.evaluate.generation_kwargs import read_settings
from llm.generation.beams import Beams
from llm.generation.sampling import Sampling


def test_what_is_left_out_is_what_hflm_does_without_it() -> None:
    assert read_settings({}) == (256, (), Sampling(), Beams())


def test_stop_texts_are_one_or_several_and_empty_ones_are_none() -> None:
    assert read_settings({"until": "\n\n"})[1] == ("\n\n",)
    assert read_settings({"until": ["a", "", "b"]})[1] == ("a", "b")


def test_of_several_names_of_the_length_the_first_that_lm_eval_looks_at_counts() -> None:
    assert read_settings({"max_tokens": 7, "max_gen_toks": 5})[0] == 5
    assert read_settings({"max_new_tokens": 9, "max_completion_tokens": 3})[0] == 9


def test_without_do_sample_a_temperature_decides_and_with_it_false_nothing_is_drawn() -> None:
    drawn = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "seed": 4}
    assert read_settings(drawn)[2] == Sampling(0.7, 3, 0.9, 1.0, 4)
    assert read_settings({**drawn, "do_sample": False})[2] == Sampling(seed=4)
    assert read_settings({"temperature": 1.0, "top_k": 0, "top_p": 1.0})[2] == Sampling(1.0)


def test_a_search_has_its_settings_and_without_one_they_mean_nothing() -> None:
    given = {"num_beams": 4, "length_penalty": 0.6, "early_stopping": True}
    assert read_settings(given)[3] == Beams(4, 0.6, True)
    assert read_settings({**given, "num_beams": 1})[3] == Beams()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_beam_groups": 4}, "num_beam_groups=4: not known here"),
        ({"num_beams": 4, "early_stopping": "never"}, "early_stopping='never': not known here"),
        ({"num_beams": 4, "temperature": 0.7}, "num_beams=4 does not go with temperature=0.7"),
        ({"do_sample": True}, "do_sample=true needs a temperature above 0"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 must be at least 1"),
        ({"until": [1]}, "until=.* expected texts"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
    ],
)
def test_what_is_of_no_use_is_refused_by_name(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=f"generation_kwargs.{said}"):
        read_settings(given)


def test_settings_that_change_nothing_pass() -> None:
    assert read_settings({"num_beams": 1, "use_cache": True}) == read_settings({})
