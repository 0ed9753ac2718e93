"""Build small random configurations of released code, from a checkout that the user has.

A family has a module here, named as in `lipass.adapters.families.FAMILIES`, with one function:
`build(checkout: Path) -> Subject`. What is examined is the same for all (`examine.py`).
"""
