"""Verbs of time and life, with no noun of the domain in them. Standard library only.

Reading order: `deadlines` (every wait is bounded and named), `settle` (finish despite cancellation), `crew` (tasks with
an owner), `ledger` (give back what was taken, in order), `gate` (drain), `machine` (tables of states); then `keyqueue`,
`breaker`, `clock`.
"""
