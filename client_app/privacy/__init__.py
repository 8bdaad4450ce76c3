"""Differential privacy of what leaves a node: the noise, the ledger, and the answers."""
