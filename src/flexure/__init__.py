"""Measure, steer and train the curvature of neural networks in input space."""
