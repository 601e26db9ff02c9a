"""Evaluation: metrics, rollouts, figures and model cards; run as `python -m eval.<job>` from a checkout."""
