"""Rewards: the calling convention and compositions, learned models, metrics, judges and the command-line form."""
