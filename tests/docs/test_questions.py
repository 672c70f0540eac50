"""The questions that a newcomer asks first have their page, which the README leads to, under a heading that says so."""

import re

import pytest

from tests.docs.pages import anchors, links, target, text_of
from tests.shared import ROOT

QUESTIONS = {
    "how to choose a layout": ("docs/layouts.md", "how-to-choose", "--dry_run"),
    "what a row is": ("docs/data.md", "what-a-row-is-and-what-a-step", "train.seq_len"),
    "layer_pattern": ("docs/model.md", "the-layer-pattern", "mixer[@stride][:flag...][+feed-forward]"),
    "packing": ("docs/data.md", "packing", "best_fit"),
    "how to add a layer": ("docs/extend/README.md", "a-mixer", "llm.layers.mixers.register"),
    "memory": ("docs/memory.md", "what-to-change-first", "activation_checkpointing"),
    "learning rate and batch": ("docs/training.md", "how-to-choose-learning-rate-and-batch", "optim.lr"),
    "what to expect of GPUs": ("docs/layouts.md", "on-gpus", "GPU"),
    "use as a library": ("docs/library.md", "a-model", "from llm import LLM"),
    "publishing a model": ("docs/publishing.md", "1-write-the-folder", "--format hf"),
    "what to do when it fails": ("docs/troubleshooting.md", "a-job-that-ends-by-itself", "was not heard for"),
}
"""Question -> page, heading, and words that an answer cannot do without."""


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_has_its_page(question: str) -> None:
    page, heading, words = QUESTIONS[question]
    assert heading in anchors(page) and words in text_of(page)
    linked = {target("README.md", link)[0] for link in links("README.md") if not link.startswith("https://")}
    assert ROOT / page in linked


def test_the_readme_is_short_and_shows_the_project() -> None:
    lines = text_of("README.md").splitlines()
    assert 80 <= len(lines) <= 120
    assert re.search(r"<img|!\[", text_of("README.md")), "one picture"
