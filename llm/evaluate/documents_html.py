"""Documents of an evaluation as HTML: prompt, pictures, answers and what they measured, everything escaped."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llm.evaluate.outputs import Sample

SHOWN = 1200
"""Characters of a text that are shown at once; the rest behind a click, up to MOST."""
MOST = 20_000
PIXELS = 256
"""Longer side of a picture as it is shown."""
CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
CHOICES = 12
"""Answers of a document that are shown."""


def text_html(text: str, kind: str = "text") -> str:
    """A text as it is, none of it markup; a long one folds."""
    if len(text) <= SHOWN:
        return f'<pre class="{kind}" dir="auto">{shown(text)}</pre>'
    half = SHOWN // 2
    left = len(text) - SHOWN
    rest = f"{shown(text[:MOST])}" + (f"\n... {len(text) - MOST:,} more characters" if len(text) > MOST else "")
    return (
        f'<details class="long"><summary><pre class="{kind}" dir="auto">{shown(text[:half])}'
        f'<span class="cut"> ... {left:,} characters ... </span>{shown(text[-half:])}</pre></summary>'
        f'<pre class="{kind}" dir="auto">{rest}</pre></details>'
    )


def shown(text: str) -> str:
    """Escaped text; control characters as their pictures, so that none does what it says."""
    return escape(text.translate(CONTROL))


def document_html(number: int, sample: Sample, roots: Sequence[Path], title: str = "") -> str:
    """A document, by its number from 1: what was asked, and what came."""
    measured = " ".join(
        f'<span class="metric">{escape(name)} <b>{_value(value)}</b></span>'
        for name, value in (sample.get("metrics") or {}).items()
    )
    parts = [f'<article><header>{escape(title)} document {number:,} {measured}</header>']
    parts += [picture_html(str(path), roots) for path in sample.get("images") or ()]
    prompt = sample.get("prompt")
    if isinstance(prompt, str) and prompt:
        parts.append(text_html(prompt))
    elif prompt:
        parts += [text_html(str(one)) for one in prompt]
    else:
        parts.append(text_html(str(sample.get("doc", ""))))
    parts.append(_responses(sample))
    gold = sample.get("gold")
    if gold is not None and not isinstance(gold, int):
        said = ", ".join(map(str, gold)) if isinstance(gold, list) else str(gold)
        parts.append(f'<p class="gold">expected</p>{text_html(said, "answer")}')
    return "".join([*parts, "</article>"])


def _responses(sample: Sample) -> str:
    responses: Sequence[Mapping[str, Any]] = sample.get("responses") or ()
    if not responses:
        return ""
    scored = [r for r in responses if isinstance(r.get("logprob"), int | float)]
    likeliest = max(scored, key=lambda r: r["logprob"]) if len(scored) > 1 else None
    gold = sample.get("gold")
    rows = []
    for i, response in enumerate(responses[:CHOICES]):
        right = isinstance(gold, int) and not isinstance(gold, bool) and i == gold
        marks = ["gold"] * right + ["likeliest"] * (response is likeliest) + ["greedy"] * bool(response.get("greedy"))
        badges = "".join(f'<span class="badge {mark}">{mark}</span>' for mark in marks)
        logprob, tokens = response.get("logprob"), response.get("tokens")
        n_tokens = len(tokens) if isinstance(tokens, list) else tokens
        if "extracted" in response:
            taken = response["extracted"]
            said = "nothing extracted" if taken is None else f"extracted {shown(str(taken))}"
            badges += f'<span class="badge">{said}</span>'
        score = f'<td class="num">{"" if logprob is None else f"{logprob:.3f}"}</td>' if scored else ""
        rows.append(
            f'<tr><td>{text_html(str(response.get("text", "")), "answer")}</td>{score}'
            f'<td class="num">{"" if n_tokens is None else n_tokens}</td><td>{badges}</td></tr>'
        )
    if len(responses) > CHOICES:
        rows.append(f'<tr><td colspan="4">... {len(responses) - CHOICES:,} more</td></tr>')
    score = '<th class="num">log prob</th>' if scored else ""
    head = f'<tr><th>answer</th>{score}<th class="num">tokens</th><th></th></tr>'
    return f'<table class="answers">{head}{"".join(rows)}</table>'


def picture_html(path: str, roots: Sequence[Path]) -> str:
    """A small copy of an image in the page itself; its name where it cannot be read any more."""
    data = _small(path, roots)
    if data is None:
        return f'<p class="missing">image {escape(path)}: not found beside this report</p>'
    encoded = base64.b64encode(data).decode()
    return f'<img src="data:image/webp;base64,{encoded}" alt="{escape(path)}" title="{escape(path)}">'


def _small(path: str, roots: Sequence[Path]) -> bytes | None:
    from PIL import Image  # comes with requirements-vision.txt, as the tasks that have images

    for place in [Path(path), *(root / path for root in roots)]:
        try:
            with Image.open(place) as image:
                small = image.convert("RGB")
        except (OSError, ValueError):
            continue
        small.thumbnail((PIXELS, PIXELS))
        file = io.BytesIO()
        small.save(file, "WEBP", quality=80)
        return file.getvalue()
    return None


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
