"""Measuring: timing, peaks, results. No lower layer imports it."""
