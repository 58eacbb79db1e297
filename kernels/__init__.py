"""Fused operators of the mixed batch: one file per op, each with its plain-torch reference. Nothing heavy is imported here."""
