"""Exact solutions of enumerable text environments."""
