"""Jobs run as modules from a checkout (`python -m training.<job>`): data, training; never installed."""
