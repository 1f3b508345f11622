"""The terms in which each phase describes its costs: compiled programs, memory and transfers.

The costs of a phase lie beside its code, such as `distill/tuning_costs.py`; `phases.PHASES` lists
them, and `planning/estimate.py` adds them up.
"""
