"""EleutherAI's lm-evaluation-harness on our models: its command line, with our classes registered.

    python -m eval.lm_harness --model hf --model_args pretrained=PATH --tasks lambada_openai [any option of lm_eval]

`python -m eval.lm_harness --help` shows lm_eval's own help, `python -m eval.lm_harness ls tasks` its tasks.
"""

import importlib.util

import leviathan  # noqa: F401 -- registers the classes that lm_eval looks up


def main() -> None:
    """The command: reads `sys.argv`, as lm_eval does."""
    if importlib.util.find_spec("lm_eval") is None:
        raise SystemExit(
            "error: lm_eval is not installed; install the extra lm-eval: pip install '.[lm-eval]' in the checkout."
        )
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
