"""Attacks on inputs, and models whose inputs are pixels within bounds."""
