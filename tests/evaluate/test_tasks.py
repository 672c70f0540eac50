"""What tasks ask of a model for their rows, and what its answers give."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llm.evaluate.encode import Encoder
from llm.evaluate.requests import Continue
from llm.evaluate.tasks import TaskOptions, open_task, open_tasks
from llm.generation.sampling import Sampling
from llm.tokenizers.chat import ChatTemplate
from tests.evaluate.tasks import (
    BOS,
    TEMPLATE,
    TOKENIZER,
    contexts,
    documents,
    ids,
    made,
    result,
    said,
    scored,
    targets,
    text_of,
)  # fmt: skip
from tests.shared import SHARED, needs_shared

CHOICE: dict[str, Any] = {"kind": "multiple_choice", "prompt": "Q: {{ q }}", "choices": "{{ c }}", "gold": "{{ g }}"}
ROWS = [{"q": f"q{i}", "c": [f"a{i}", f"bb{i}"], "g": i % 2} for i in range(6)]


def test_a_prompt_and_its_choices_are_joined_by_one_blank_which_counts_in_no_length(tmp_path: Path) -> None:
    task = made(tmp_path, [{"q": "x", "c": ["ab", "äöü"], "g": 1}], metrics=["acc", "acc_norm", "acc_bytes"], **CHOICE)
    (document,) = documents(task)
    assert contexts(document) == ["Q: x", "Q: x"]
    assert targets(document) == [" ab", " äöü"]
    assert document.requests[0].context[0] == BOS  # type: ignore[union-attr]
    measured = task.measure(document, scored(-2.0, -4.0))
    # by characters -1 and -1.33, by bytes -1 and -0.67
    assert [measured[name] for name in ("acc", "acc_norm", "acc_bytes")] == [0.0, 0.0, 1.0]


def test_results_of_choices_have_standard_errors_and_counts(tmp_path: Path) -> None:
    answers = [scored(-1.0, -2.0), scored(-1.0, -2.0), scored(-1.0, -1.0), scored(-2.0, -1.0)]
    found = result(made(tmp_path, ROWS[:4], metrics=["acc"], **CHOICE), answers)
    assert found["acc"] == 0.75  # the third is a tie, whose first choice counts
    assert found["acc_stderr"] == pytest.approx(0.25)
    assert (found["n"], found["ties"], found["truncated"], found["joint"]) == (4, 1, 0, 0)
    assert (found["version"], found["prompt"], found["num_fewshot"]) == (1, "Q: {{ q }}", 0)
    assert "partial" not in found


def test_several_prompts_with_one_target_score_the_target_after_each(tmp_path: Path) -> None:
    rows = [{"p": ["the cat", "the dog"], "t": "ran.", "g": 1}]
    keys = {"prompts": "{{ p }}", "target": "{{ t }}", "gold": "{{ g }}"}
    task = made(tmp_path, rows, kind="multiple_choice", metrics=["acc"], **keys)
    (document,) = documents(task)
    assert (contexts(document), targets(document)) == (["the cat", "the dog"], [" ran.", " ran."])
    assert task.measure(document, scored(-3.0, -2.0))["acc"] == 1.0
    found = result(task, [scored(-3.0, -2.0)])
    assert (found["prompts"], found["target"]) == ("{{ p }}", "{{ t }}")


@pytest.mark.parametrize(("gold", "place"), [(1, 1), ("b", 1), ("0", 0), (1.0, 1)])
def test_gold_is_a_place_or_a_text(tmp_path: Path, gold: Any, place: int) -> None:
    (document,) = documents(made(tmp_path, [{"q": "x", "c": ["a", "b"], "g": gold}], **CHOICE))
    assert document.gold == place


def test_choices_may_be_a_list_of_templates(tmp_path: Path) -> None:
    keys = CHOICE | {"choices": ["{{ one }}", "not {{ one }}"]}
    (document,) = documents(made(tmp_path, [{"q": "x", "one": "so", "g": 0}], **keys))
    assert targets(document) == [" so", " not so"]


def test_examples_stand_before_the_prompt_and_are_never_the_document_itself(tmp_path: Path) -> None:
    task = made(tmp_path, ROWS, fewshot={"k": 5, "seed": 3}, description="D. ", **CHOICE)
    for i, document in enumerate(documents(task)):
        *examples, last = document.prompt.removeprefix("D. ").split("\n\n")
        assert last == f"Q: q{i}"
        assert sorted(examples) == [f"Q: q{j} {ROWS[j]['c'][j % 2]}" for j in range(6) if j != i]


def test_examples_depend_on_the_seed_and_the_row_alone(tmp_path: Path) -> None:
    def prompts(seed: int, limit: int | None = None) -> list[str]:
        options = TaskOptions(limit=limit)
        return [d.prompt for d in documents(made(tmp_path, ROWS, options, fewshot={"k": 2, "seed": seed}, **CHOICE))]

    assert prompts(0)[:2] == prompts(0, limit=2)
    assert prompts(0) != prompts(1)


def test_examples_of_another_file_are_all_possible(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    task = made(tmp_path, ROWS, fewshot={"k": 2, "path": "train.jsonl"}, **CHOICE)
    assert {tuple(sorted(d.prompt.split("\n\n")[:2])) for d in documents(task)} == {("Q: q0 a0", "Q: q1 bb1")}


def test_the_tasks_own_file_named_for_examples_is_its_own(tmp_path: Path) -> None:
    task = made(tmp_path, ROWS[:3], fewshot={"k": 2, "path": "rows.jsonl"}, **CHOICE)
    assert all(f"Q: q{i} " not in document.prompt for i, document in enumerate(documents(task)))


def test_first_examples_are_the_same_rows_before_each_document(tmp_path: Path) -> None:
    task = made(tmp_path, ROWS, fewshot={"k": 2, "draw": "first"}, **CHOICE)
    assert [document.prompt for document in documents(task)][::5] == [
        "Q: q1 bb1\n\nQ: q2 a2\n\nQ: q0", "Q: q0 a0\n\nQ: q1 bb1\n\nQ: q5"
    ]  # fmt: skip


def test_num_fewshot_takes_the_place_of_k_and_changes_the_digest(tmp_path: Path) -> None:
    task, other = (made(tmp_path, ROWS, TaskOptions(num_fewshot=k), **CHOICE) for k in (0, 1))
    assert documents(other)[0].prompt.count("\n\n") == 1
    assert task.digest != other.digest


def test_a_digest_is_of_keys_and_data_and_not_of_limit_or_place(tmp_path: Path) -> None:
    task = made(tmp_path, ROWS, **CHOICE)
    (tmp_path / "elsewhere").mkdir()
    assert made(tmp_path / "elsewhere", ROWS, TaskOptions(limit=2), **CHOICE).digest == task.digest
    assert made(tmp_path, ROWS[:5], **CHOICE).digest != task.digest
    assert made(tmp_path, ROWS, **(CHOICE | {"prompt": "{{ q }}"})).digest != task.digest


def test_limit_takes_the_first_rows_and_marks_the_result_partial(tmp_path: Path) -> None:
    found = result(made(tmp_path, ROWS, TaskOptions(limit=2), **CHOICE), [scored(-1.0, -2.0)] * 2)
    assert (found["n"], found["partial"]) == (2, True)
    assert "partial" not in result(made(tmp_path, ROWS, TaskOptions(limit=6), **CHOICE), [scored(-1.0, -2.0)] * 6)


def test_with_a_chat_template_examples_are_turns_and_nothing_joins_prompt_and_answer(tmp_path: Path) -> None:
    task = made(tmp_path, ROWS[:2], fewshot={"k": 1}, description="Answer.", **CHOICE)
    document = task.documents(Encoder(TOKENIZER, 256), ChatTemplate(TEMPLATE, "t.jinja", TOKENIZER))[0]
    assert document.prompt == "system: Answer.</s>user: Q: q1</s>assistant: bb1</s>user: Q: q0</s>assistant:"
    request = document.requests[0]
    assert request.context.count(TOKENIZER.eos_id) == 4  # type: ignore[union-attr]
    assert request.context[0] == ord("s")  # type: ignore[union-attr]
    assert targets(document) == ["a0", "bb0"]


def test_what_is_cut_or_scored_together_is_counted(tmp_path: Path) -> None:
    found = result(made(tmp_path, ROWS[:2], **CHOICE), [scored(-1.0, -2.0)] * 2, context=8)
    assert found["truncated"] == 2  # BOS, five letters and four of a choice, the last of which is only scored


def test_a_target_is_greedy_or_not_and_its_perplexity_counts_it_once(tmp_path: Path) -> None:
    rows = [{"c": "one two", "t": "three"}, {"c": "four", "t": "five six"}]
    task = made(tmp_path, rows, kind="loglikelihood", prompt="{{ c }}", target="{{ t }}")
    assert [targets(document) for document in documents(task)] == [[" three"], [" five six"]]
    found = result(task, [scored(-1.0, greedy=True), scored(-3.0)])
    assert (found["acc"], found["acc_stderr"]) == (0.5, 0.5)
    assert found["perplexity"] == pytest.approx(math.exp(2.0))
    assert found["perplexity_stderr"] > 0
    assert result(task, [scored(-2000.0), scored(-3000.0)])["perplexity"] is None  # beyond what a float holds


def test_texts_are_scored_in_windows_and_measured_by_their_own_bytes_and_words(tmp_path: Path) -> None:
    rows = [{"text": "ab cd é", "from": "x"}, {"text": "hello", "from": "y"}]
    task = made(tmp_path, rows, kind="perplexity", source="{{ from }}", metrics=["bits_per_byte", "word_ppl", "ppl"])
    first, second = documents(task, context=4)
    assert targets(first) == ["ab c", "d é"]
    answers = [scored(-5.0, -3.0), scored(-1.0, -1.0)]
    found = result(task, answers, context=4)
    assert found["bits_per_byte"] == pytest.approx(10 / (math.log(2) * 13))
    assert found["word_ppl"] == pytest.approx(math.exp(10 / 4))
    assert found["ppl"] == pytest.approx(math.exp(10 / 13))
    assert found["bits_per_byte/x"] == pytest.approx(8 / (math.log(2) * 8))
    assert (found["n/x"], found["n_tokens"], found["n_words"], found["n_bytes"]) == (1, 13, 4, 13)
    line = task.sample(first, answers[0], task.measure(first, answers[0]))
    assert line["responses"] == [{"text": "ab cd é", "logprob": -8.0, "greedy": False, "tokens": 8}]


def test_a_stream_is_one_text_of_all_rows_of_a_source(tmp_path: Path) -> None:
    rows = [{"text": "ab", "from": "x"}, {"text": "cd", "from": "y"}, {"text": "ef", "from": "x"}]
    keys: dict[str, Any] = {"kind": "perplexity", "stream": True, "separator": "|"}
    assert [targets(d) for d in documents(made(tmp_path, rows, **keys))] == [["ab|cd|ef"]]
    assert [targets(d) for d in documents(made(tmp_path, rows, source="{{ from }}", **keys))] == [["ab|ef"], ["cd"]]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    task = made(tmp_path, [], kind="perplexity", data={"path": "a.txt"})
    assert [targets(document) for document in documents(task)] == [["one\n\ntwo\n"]]


def test_a_text_file_is_cut_where_split_matches_and_keeps_its_blanks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n = A = \none\n = = B = = \n = C = \ntwo\n")
    task = made(tmp_path, [], kind="perplexity", data={"path": "a.txt", "split": r"(?m)^(?= = [^=\n]+ = $)"})
    assert [targets(d) for d in documents(task)] == [[" \n = A = \none\n = = B = = \n"], [" = C = \ntwo\n"]]
    (tmp_path / "a.txt").write_text("one---two---  ")
    task = made(tmp_path, [], kind="perplexity", data={"path": "a.txt", "split": "-+"})
    assert [targets(d) for d in documents(task)] == [["one"], ["two  "]]


GENERATE: dict[str, Any] = {"kind": "generate", "prompt": "{{ q }}", "gold": "{{ a }}", "max_new_tokens": 8}


def test_a_prompt_is_continued_until_a_stop_text_and_compared_without_blanks_around(tmp_path: Path) -> None:
    task = made(tmp_path, [{"q": "x =", "a": "18"}, {"q": "y =", "a": ["4", "four"]}], stop=["\n"], **GENERATE)
    assert documents(task)[0].requests == (Continue((BOS, *ids("x =")), 8, ("\n",)),)
    assert result(task, [said(" 18"), said(" four")])["exact_match"] == 1.0
    assert result(task, [said(" 19"), said(" Four")])["exact_match"] == 0.0


def test_an_answer_is_extracted_from_text_and_reference_and_what_has_none_is_counted(tmp_path: Path) -> None:
    rows = [{"q": "x", "a": "so 6 * 3\n#### 18"}] * 3
    keys = GENERATE | {"extract": ["#### (-?[0-9.,]+)", {"pattern": "[0-9]+", "match": "last"}]}
    task = made(tmp_path, rows, metrics=["exact_match", "number"], **keys)
    answers = [said("it is #### 18 #### 19"), said("7 or 18"), said("none")]
    found = result(task, answers)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert (found["not_extracted"], found["by_fallback"]) == (1, 1)
    lines = [task.sample(d, a, task.measure(d, a)) for d, a in zip(documents(task), answers, strict=True)]
    found_in = [(line["responses"][0]["extracted"], line["responses"][0]["extracted_by"]) for line in lines]
    assert found_in == [("18", 1), ("18", 2), (None, 0)]


def test_exact_match_can_pass_over_case_punctuation_and_patterns(tmp_path: Path) -> None:
    keys = GENERATE | {"ignore_case": True, "ignore_punctuation": True, "ignore": [r"\(.*?\)", "metres"]}
    task = made(tmp_path, [{"q": "x", "a": "Ten"}], **keys)
    assert result(task, [said("ten! (about) metres.")])["exact_match"] == 1.0


def test_several_answers_are_drawn_each_by_its_number(tmp_path: Path) -> None:
    keys = GENERATE | {"samples": 4, "temperature": 0.8, "top_p": 0.9, "seed": 5}
    task = made(tmp_path, [{"q": "x", "a": "1"}], metrics=["exact_match", "pass@1", "pass@2", "maj@3", "maj@4"], **keys)
    requests = documents(task)[0].requests
    assert [request.sample for request in requests] == [0, 1, 2, 3]  # type: ignore[union-attr]
    assert requests[0].sampling == Sampling(0.8, top_p=0.9, seed=5)  # type: ignore[union-attr]
    found = result(task, [said("2", "1", "1", "2")])
    assert found["exact_match"] == 0.5
    assert found["pass@1"] == pytest.approx(0.5)
    assert found["pass@2"] == pytest.approx(1 - 1 / 6)
    assert (found["maj@3"], found["maj@4"]) == (1.0, 0.0)  # of two and two the first


def test_answers_that_are_the_same_number_are_alike_for_a_majority(tmp_path: Path) -> None:
    keys = GENERATE | {"samples": 3, "temperature": 1.0, "correct": "number"}
    task = made(tmp_path, [{"q": "x", "a": "1000"}], metrics=["maj@3", "pass@1"], **keys)
    found = result(task, [said("5", "1,000", "1000.0")])
    assert (found["maj@3"], found["pass@1"]) == (1.0, pytest.approx(2 / 3))


def test_f1_is_the_best_of_the_references(tmp_path: Path) -> None:
    task = made(tmp_path, [{"q": "x", "a": ["a dog", "two cats"]}], metrics=["f1"], **GENERATE)
    assert result(task, [said("two cats ran")])["f1"] == pytest.approx(4 / 5)


def test_a_prompt_too_long_to_leave_room_is_cut_on_the_left_and_counted(tmp_path: Path) -> None:
    task = made(tmp_path, [{"q": "abcdefgh", "a": "1"}], **GENERATE)
    (document,) = documents(task, context=12)
    assert text_of(document.requests[0].prompt) == "fgh"  # type: ignore[union-attr]
    assert document.counts["truncated"] == 1


def test_a_task_without_a_name_is_called_as_its_file(tmp_path: Path) -> None:
    assert made(tmp_path, ROWS, name=None, **CHOICE).name == "t"


SHARED_TASKS = ("arc_easy", "hellaswag", "piqa", "winogrande", "lambada", "gsm8k", "wikitext")


@needs_shared
@pytest.mark.parametrize("name", SHARED_TASKS)
def test_a_shipped_task_reads_the_file_that_it_is_for(name: str) -> None:
    data = SHARED / "data"
    task = open_task(name, TaskOptions(limit=3, data_dirs=(data / "eval", data / "text/wikitext-2")))
    found = documents(task, context=4096)
    assert len(found) == 3 and all(document.requests for document in found)
    assert not any(document.counts.get("truncated") for document in found if task.kind == "multiple_choice")


def test_a_group_opens_its_tasks_once_and_reports_the_mean_of_what_they_share(tmp_path: Path) -> None:
    made(tmp_path, ROWS[:4], metrics=["acc", "acc_norm"], **CHOICE)
    (tmp_path / "t.yaml").rename(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text((tmp_path / "a.yaml").read_text().replace("name: t", "name: u"))
    (tmp_path / "g.yaml").write_text("{name: g, kind: group, tasks: [a.yaml, b.yaml]}")
    tasks, groups = open_tasks([str(tmp_path / "g.yaml"), str(tmp_path / "a.yaml")])
    assert ([task.name for task in tasks], [group.tasks for group in groups]) == (["t", "u"], [("t", "u")])
    one = {"acc": 0.5, "acc_stderr": 0.3, "n": 4, "only": 1.0}
    assert groups[0].result({"t": one, "u": {"acc": 1.0, "acc_stderr": 0.4, "n": 2}}) == {
        "acc": 0.75, "acc_stderr": pytest.approx(0.25), "n": 6, "tasks": ["t", "u"]
    }  # fmt: skip
