"""Open a model of Hugging Face as it is, and talk to it by its chat template.

    .venv/bin/python examples/import_and_chat.py FOLDER ["What the user says"]

FOLDER is what `save_pretrained` or a download leaves: config.json, weights in safetensors, a tokenizer. Nothing is
converted first, and nothing is fetched; docs/foreign.md says which families are read. It prints, of a tiny Llama with
random weights, so that the reply means nothing:

    35,232 parameters, context 128
    user: Is anybody there?
    assistant: ...
    the same reply from a folder of our own: True
"""

import sys
import tempfile
from pathlib import Path

from llm import LLM


def main(folder: Path, said: str = "Is anybody there?") -> None:
    model = LLM.from_pretrained(folder)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters, context {model.args.max_seq_len}")
    messages = [{"role": "user", "content": said}]
    reply = model.chat(messages, max_new_tokens=20)
    print(f"user: {said}\nassistant: {reply}")

    # to go on: messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "..."}]
    # token by token, in a terminal: launch/generate.py --model FOLDER --chat
    with tempfile.TemporaryDirectory() as parent:
        own = Path(parent) / "own"
        model.save_pretrained(own, tokenizer=model.tokenizer)
        again = LLM.from_pretrained(own).chat(messages, max_new_tokens=20, template=str(folder / "chat_template.jinja"))
        print(f"the same reply from a folder of our own: {again == reply}")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: import_and_chat.py FOLDER [\"What the user says\"]")
    main(Path(sys.argv[1]), *sys.argv[2:])
