"""Whole-engine bench: workload -> rows -> check, table, plot."""
