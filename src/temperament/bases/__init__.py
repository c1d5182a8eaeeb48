"""Bases: loading them, and the small real ones that ship with the package (`lab/...`) with the worlds they know."""
