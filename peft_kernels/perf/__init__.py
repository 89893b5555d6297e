"""Measuring: timing, peaks, results; nothing below imports it."""
