"""Files of completions: as each prompt alone, in order, and the same bytes however often the run was killed."""

import json
import os
from pathlib import Path

import pytest

from llm.errors import UserError
from llm.generation.batch import BatchSettings, complete_file, weights_digest
from llm.generation.beams import Beams
from llm.generation.sampling import Sampling
from llm.generation.text import Continuer
from llm.tokenizer import ByteTokenizer
from tests.generation.models import CONTEXT, shared_model, with_tokenizer

TEXTS = ["ab", "", "a longer one, of more tokens", "ab", "x" * 30, "the last"]
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0, seed=3)


def settings(sampling: Sampling = GREEDY, **changes) -> BatchSettings:
    base = dict(max_new_tokens=8, num_samples=1, stop=True, batch_tokens=100)
    return BatchSettings(sampling, **(base | changes))


def continuer(model=None) -> Continuer:
    return Continuer(model or shared_model(), ByteTokenizer(), "my/model")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_completions_stand_in_order_and_are_those_of_each_prompt_alone(prompts, tmp_path, batch_tokens):
    complete_file(continuer(), prompts, tmp_path / "out.jsonl", settings(batch_tokens=batch_tokens))
    rows = lines(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == list(range(len(TEXTS)))
    for row, text in zip(rows, TEXTS, strict=True):
        alone = shared_model().generate(text, max_new_tokens=8)
        assert row["prompt"] == text and row["completion"] == alone
        assert row["finish_reason"] in ("length", "stop") and 1 <= row["tokens"] <= 8


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.77, 0.99])
def test_a_killed_run_goes_on_to_the_same_bytes_and_repeats_nothing(prompts, tmp_path, share, monkeypatch):
    output, chosen = tmp_path / "out.jsonl", settings(SAMPLED, num_samples=3, batch_tokens=1)
    complete_file(continuer(), prompts, output, chosen)
    whole = output.read_bytes()
    output.write_bytes(whole[: int(len(whole) * share)])
    done = output.read_bytes().count(b"\n")
    made = []
    complete = Continuer.complete
    monkeypatch.setattr(
        Continuer, "complete", lambda self, batch, *rest, **by: made.extend(batch) or complete(self, batch, *rest, **by)
    )
    complete_file(continuer(), prompts, output, chosen)
    assert output.read_bytes() == whole
    assert len(made) == 3 * len(TEXTS) - done


def test_a_sample_depends_on_seed_row_and_number_alone(prompts, tmp_path):
    for n in (2, 3):
        complete_file(
            continuer(), prompts, tmp_path / f"{n}.jsonl", settings(SAMPLED, num_samples=n, batch_tokens=n * 60)
        )
    two, three = lines(tmp_path / "2.jsonl"), lines(tmp_path / "3.jsonl")
    assert two == [row for row in three if row["sample"] < 2]
    assert [row["sample"] for row in three] == [0, 1, 2] * len(TEXTS)
    assert len({row["completion"] for row in three if row["prompt"] == "ab"}) == 6  # other rows, other draws


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(max_new_tokens=9), "--max_new_tokens is 9, was 8"),
        (dict(sampling=SAMPLED), "--temperature is 1.0, was 0.0; --seed is 3, was 0"),
        (dict(stop=False), "--stop is false, was true"),
    ],
)
def test_another_setting_is_refused_and_nothing_is_touched(prompts, tmp_path, change, reason):
    output = tmp_path / "out.jsonl"
    complete_file(continuer(), prompts, output, settings())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=reason):
        complete_file(continuer(), prompts, output, settings(**change))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_model_or_other_prompts_are_refused(prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    complete_file(continuer(), prompts, output, settings())
    with pytest.raises(UserError, match="the model changed"):
        complete_file(continuer(with_tokenizer(seed=1)), prompts, output, settings())
    prompts.write_text(prompts.read_text().replace("the last", "the Last"))
    with pytest.raises(UserError, match="the prompts changed"):
        complete_file(continuer(), prompts, output, settings())


def test_a_file_that_is_no_output_of_ours_is_left_alone(prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    with pytest.raises(UserError, match="exists, and no out.jsonl.run.json beside it"):
        complete_file(continuer(), prompts, output, settings())
    assert output.read_text() == "precious\n"
    with pytest.raises(UserError, match="is a folder"):
        complete_file(continuer(), prompts, tmp_path, settings())


def test_a_changed_line_is_named(prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    complete_file(continuer(), prompts, output, settings())
    changed = output.read_text().splitlines()
    changed[1], changed[2] = changed[2], changed[1]
    output.write_text("\n".join(changed) + "\n")
    with pytest.raises(UserError, match="row 2: not the completion that belongs there"):
        complete_file(continuer(), prompts, output, settings())


def test_prompts_that_cannot_be_continued_are_named_by_row_before_any_work(tmp_path):
    prompts, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    prompts.write_text("ab\n" + "x" * CONTEXT + "\nab\n" + "y" * 99 + "\n")
    message = rf"in.txt row 2: has {CONTEXT + 1} tokens; the context of my/model is {CONTEXT} .*; row 4: has 100 tokens"
    with pytest.raises(UserError, match=message):
        complete_file(continuer(), prompts, output, settings())
    assert not output.exists()


def test_a_file_says_where_logits_are_not_finite(tmp_path, prompts):
    model = with_tokenizer()
    model.norm.weight.data[0] = float("inf")
    with pytest.raises(
        UserError, match=r"my/model: at new token 1 of the prompt in .*in.jsonl row \d, 258 of 258 logits"
    ):
        complete_file(continuer(model), prompts, tmp_path / "out.jsonl", settings())


def test_completions_cut_by_the_context_say_so(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("ab\n" + "x" * (CONTEXT - 4) + "\n")
    complete_file(continuer(), tmp_path / "in.txt", tmp_path / "out.jsonl", settings(stop=False))
    assert [row["finish_reason"] for row in lines(tmp_path / "out.jsonl")] == ["length", "context"]
    assert f"1 of them ended where the context of {CONTEXT} tokens does" in capsys.readouterr().err


def test_one_bit_of_one_weight_changes_the_digest():
    model = with_tokenizer()
    before = weights_digest(model)
    assert before == weights_digest(shared_model())
    bits = model.layers[2].attention.wk.weight.data.view(-1).numpy().view("uint32")
    bits[17] ^= 1
    assert weights_digest(model) != before
    bits[17] ^= 1
    bits[[17, 18]] = bits[[18, 17]]
    assert weights_digest(model) != before


@pytest.mark.parametrize("name", ["/dev/null", "-", "pipe"])
def test_an_output_that_no_later_run_could_go_on_with_is_refused(prompts, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(UserError, match=f"--output={name}: is no regular file"):
        complete_file(continuer(), prompts, Path(name), settings())
    assert sorted(os.listdir()) == ["in.jsonl", "pipe"] and not Path(f"{name}.run.json").exists()


@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
def test_the_best_of_a_search_stands_there_whatever_the_batches(prompts, tmp_path, batch_tokens):
    output, beams = tmp_path / "out.jsonl", Beams(3, 0.8)
    complete_file(continuer(), prompts, output, settings(batch_tokens=batch_tokens, beams=beams))
    for row, text in zip(lines(output), TEXTS, strict=True):
        assert row["completion"] == shared_model().generate(text, max_new_tokens=8, num_beams=3, length_penalty=0.8)


def test_a_search_and_its_settings_are_what_a_file_is_made_of(prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    complete_file(continuer(), prompts, output, settings(beams=Beams(3)))
    for beams, said in ((Beams(2), "--num_beams is 2, was 3"), (Beams(), "--num_beams is left out, was 3")):
        with pytest.raises(UserError, match=said):
            complete_file(continuer(), prompts, output, settings(beams=beams))
