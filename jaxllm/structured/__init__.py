"""Grammars that outputs obey: compiled by llguidance out of the way, then walked token by token beside the engine."""
