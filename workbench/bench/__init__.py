"""The whole-engine bench: workload -> rows -> check, table, plot."""
