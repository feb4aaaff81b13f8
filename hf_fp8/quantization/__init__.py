"""Quantizes models and checkpoints, and calibrates static input scales."""
