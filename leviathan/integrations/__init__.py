"""Bridges to other libraries: each module is the only one that imports its library."""
