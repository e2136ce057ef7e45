"""Measures the error of feature maps against exact attention."""
