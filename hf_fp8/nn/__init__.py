"""Modules that hold codes and scales, and their ops."""
