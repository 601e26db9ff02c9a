"""Speed and memory of our fast paths against their plain twins; the command is `python -m eval.speed`."""
