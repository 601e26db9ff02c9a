"""transformers' server on our models: the command `transformers serve`, with our classes registered.

    python -m eval.serve PATH --host 127.0.0.1 --port 8000 [any option of transformers serve]

Anything that speaks OpenAI's protocol then talks to the model: `/v1/completions`, and `/v1/chat/completions` where its
tokenizer has a chat template. `python -m eval.serve --help` shows transformers' own help.
"""

import importlib.util
import sys

from leviathan import LeviathanForCausalLM

REQUIRED = ("fastapi", "openai", "uvicorn")  # transformers' server imports them


def main() -> None:
    """The command: reads `sys.argv`, as transformers does.

    Raises:
        SystemExit: If a package is missing that the server needs.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"error: {', '.join(missing)} is not installed; install the extra clients: pip install '.[clients]' in the "
            "checkout."
        )
    # Not above: importing LLaMA's model makes transformers import itself anew.
    import transformers
    from transformers.cli.transformers import app

    transformers.LeviathanForCausalLM = LeviathanForCausalLM  # where the server looks a checkpoint's class up

    app(["serve", *sys.argv[1:]], prog_name="python -m eval")


if __name__ == "__main__":
    main()
